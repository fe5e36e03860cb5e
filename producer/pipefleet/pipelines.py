"""`pipefleet.pipeline(...)`: the call people know from transformers, served by the fleet.

Same arguments, same return values: one input gives one result, a list gives a list, and a generator (or a data set) gives a
generator that keeps a bounded number of inputs under way and yields in order.
"""

from __future__ import annotations

import itertools
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipefleet.client import Client
from pipefleet.errors import InputError, ParameterError
from pipefleet.inputs import is_message
from pipefleet.jobs import Job
from pipefleet.tasks import Media, TaskSpec, task_spec

_ACCEPTED = {"batch_size", "num_workers", "device", "device_map", "dtype", "torch_dtype", "framework"}
"""Arguments of transformers that choose hardware or batching, which the fleet decides: accepted, without effect."""
_MAIN = ("inputs", "text_inputs", "sequences", "text", "images", "image", "audio", "audios", "videos", "video")
"""Names that transformers' pipelines have for their first argument."""
_SINGLE = (Media.TEXT, Media.IMAGE, Media.AUDIO, Media.VIDEO)
"""Fields that hold one value, so that a list of them means several inputs."""


class FleetPipeline:
    """A task on the fleet, callable like a transformers pipeline. Thread-safe."""

    def __init__(self, client: Client, spec: TaskSpec, *, model: str | None, revision: str | None) -> None:
        self._client = client
        self._spec = spec
        self._model = model
        self._revision = revision

    @property
    def task(self) -> str:
        """The canonical name of the task."""
        return self._spec.name

    def __call__(self, *inputs: Any, **parameters: Any) -> Any:
        """Run one input, a list, or a lazy iterable; parameters are those of the transformers call.

        Fields of an input may come as keywords or in their order (`pipe(image, question)`), each of them one value or a list.
        Raises UsageError before anything is queued, JobFailedError for the first input that fails.
        """
        given, wanted = arguments_of(self._spec, inputs, parameters)
        wanted = {name: value for name, value in wanted.items() if name not in _ACCEPTED}
        if wanted.get("is_split_into_words") and _is_words(given):
            given = [given]
        if self._is_one_input(given):
            return self._restored(self.submit(given, **wanted).result(), wanted)
        if isinstance(given, list | tuple):
            results = [self._restored(one, wanted, bare=True) for one in self._stream(given, wanted)]
            return results[0] if self._spec.answers_one_alone and len(results) == 1 else results
        if isinstance(given, types.GeneratorType) or _is_dataset(given):
            return (self._restored(one, wanted, bare=True) for one in self._stream(given, wanted))
        return self._restored(self.submit(given, **wanted).result(), wanted)

    def submit(self, inputs: Any, *, priority: str = "normal", expires: float | None = None, **parameters: Any) -> Job:
        """Queue one input and return its Job at once."""
        reserved = {"output", "idempotency_key"} & set(parameters)
        if reserved:
            raise ParameterError(f"{sorted(reserved)[0]} is an argument of Client.submit, not of a pipeline")
        return self._client.submit(
            self._spec.name,
            inputs,
            model=self._model,
            revision=self._revision,
            parameters=parameters,
            priority=priority,
            expires=expires,
        )

    def _stream(self, inputs: Iterable[Any], parameters: Mapping[str, Any]) -> Iterator[Any]:
        """Results in order, with at most `in_flight` inputs under way."""
        under_way: deque[Job] = deque()
        source = iter(inputs)
        try:
            for one in itertools.islice(source, self._client.settings.in_flight):
                under_way.append(self.submit(one, **parameters))
            while under_way:
                yield under_way.popleft().result()
                for one in itertools.islice(source, 1):
                    under_way.append(self.submit(one, **parameters))
        finally:
            for job in under_way:
                job.cancel()

    def _is_one_input(self, inputs: Any) -> bool:
        """Whether a list is one input by itself: the messages of a chat, or a pair of images."""
        if not isinstance(inputs, list | tuple):
            return False
        if self._spec.media is Media.IMAGE_PAIR:
            return not any(isinstance(one, list | tuple) for one in inputs)
        return self._spec.media is Media.PROMPT and bool(inputs) and is_message(inputs[0])

    def _restored(self, output: Any, parameters: Mapping[str, Any], *, bare: bool = False) -> Any:
        """A result in the very form of transformers: its tuples, and without the list around the only one of a batch."""
        if self._spec.tuples:
            output = _with_tuples(output, self._spec.tuples)
        alone = isinstance(output, list) and len(output) == 1
        kept = any(name in parameters for name in self._spec.kept_with)
        return output[0] if bare and self._spec.bare_in_lists and alone and not kept else output


def pipeline(
    task: str,
    model: str | None = None,
    *,
    revision: str | None = None,
    client: Client | None = None,
    **accepted: Any,
) -> FleetPipeline:
    """A pipeline whose model runs on the fleet.

    Without `model`, the task's default pool serves; a model that no pool serves raises UnknownModelError with a list of what
    is served. Arguments that choose hardware (`device`, `dtype`, `batch_size` …) are accepted and left to the fleet.
    """
    unknown = set(accepted) - _ACCEPTED
    if unknown:
        raise ParameterError(f"pipeline() takes no argument {sorted(unknown)[0]!r}; pass task parameters per call")
    client = client or Client()
    spec = task_spec(task)
    client.route(spec.name, model, revision)
    return FleetPipeline(client, spec, model=model, revision=revision)


def arguments_of(spec: TaskSpec, inputs: tuple[Any, ...], parameters: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The inputs and the parameters of a call. Raises InputError for none, and for inputs that are given twice."""
    wanted = dict(parameters)
    if len(inputs) > max(1, len(spec.positional)):
        raise InputError(f"{spec.name} takes {max(1, len(spec.positional))} positional arguments, not {len(inputs)}")
    if len(inputs) > 1:
        named = dict(zip(spec.positional, inputs, strict=False))
        if twice := named.keys() & wanted.keys():
            raise InputError(f"{spec.name} was given {sorted(twice)[0]} twice")
        wanted.update(named)
        inputs = (wanted.pop(spec.positional[0]),) if spec.positional[0] not in spec.fields else ()
    fields = {name: wanted.pop(name) for name in spec.fields if name in wanted and name not in spec.parameters}
    first = spec.positional[0] if spec.positional else None
    if inputs and fields and first in spec.fields.keys() - fields.keys() and not isinstance(inputs[0], Mapping):
        fields, inputs = {str(first): inputs[0], **fields}, ()
    if inputs and fields:
        raise InputError(f"{spec.name} was given an input and {', '.join(fields)} beside it; put them into one dict")
    if inputs:
        given = inputs[0]
        return (_each(spec, given) if spec.fields and isinstance(given, Mapping) else given), wanted
    if fields:
        return _each(spec, fields), wanted
    main = [name for name in _MAIN if name in wanted and name not in spec.parameters]
    if len(main) != 1:
        raise InputError(f"{spec.name} needs an input as its first argument")
    return wanted.pop(main[0]), wanted


def _each(spec: TaskSpec, fields: Mapping[str, Any]) -> Any:
    """One dict, or a list of them where a field that holds one value is given as a list; single values go with each."""
    lists = {name: value for name, value in fields.items() if _is_several(spec.fields.get(name), value)}
    if not lists:
        return dict(fields)
    # Beside several texts, a list of pictures holds one for each; beside one text they all belong to it.
    lists |= {name: fields[name] for name in fields if _is_list_of_images(spec.fields.get(name), fields[name])}
    if len({len(value) for value in lists.values()}) > 1:
        raise InputError(f"{', '.join(lists)} are lists of different lengths")
    count = len(next(iter(lists.values())))
    return [{**fields, **{name: value[index] for name, value in lists.items()}} for index in range(count)]


def _is_several(kind: Media | None, value: Any) -> bool:
    """Whether the value of a field stands for several inputs."""
    if not isinstance(value, list | tuple):
        return False
    return bool(value) and not is_message(value[0]) if kind is Media.PROMPT else kind in _SINGLE


def _is_list_of_images(kind: Media | None, value: Any) -> bool:
    return kind is Media.IMAGES and isinstance(value, list | tuple)


def _with_tuples(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _tuples(item) if name in keys and isinstance(item, list) else _with_tuples(item, keys)
            for name, item in value.items()
        }
    return [_with_tuples(item, keys) for item in value] if isinstance(value, list) else value


def _is_words(value: Any) -> bool:
    """A flat list of words, which is one text."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, str) for one in value)


def _tuples(value: list[Any]) -> Any:
    """A list as a tuple, a list of lists as a list of tuples."""
    return [tuple(one) for one in value] if value and isinstance(value[0], list) else tuple(value)


def _is_dataset(value: Any) -> bool:
    """An iterator, or a lazy collection such as `datasets.Dataset` or a torch data set; not a string, bytes, dict or array."""
    if (
        isinstance(value, str | bytes | bytearray | memoryview | Mapping)
        or hasattr(value, "__array_interface__")
        or hasattr(value, "save")
    ):
        return False
    return hasattr(value, "__next__") or (hasattr(value, "__getitem__") and hasattr(value, "__len__"))
