"""`pipefleet.pipeline(...)`: the call people know from transformers, served by the fleet.

Same arguments, same return values: one input gives one result, a list gives a list, and a generator (or a data set) gives a
generator that keeps a bounded number of inputs under way and yields in order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from typing import Any

from pipefleet.client import Client
from pipefleet.errors import (
    InputError,
    ParameterError,
    PipefleetError,
    ResultTimeoutError,
    ServiceUnavailableError,
    UnknownModelError,
)
from pipefleet.inputs import is_message, is_table
from pipefleet.jobs import Job
from pipefleet.loading import fleet_line
from pipefleet.patience import PATIENCE_SECONDS, Patience
from pipefleet.streaming import stream
from pipefleet.tasks import Media, TaskSpec, implied_parameters

_ACCEPTED = {"batch_size", "num_workers", "device", "device_map", "dtype", "torch_dtype", "framework"}
"""Arguments of transformers that choose hardware or batching, which the fleet decides: accepted, without effect."""
_OF_THE_POOL = {
    "attn_implementation", "config", "feature_extractor", "image_processor", "model_kwargs", "pipeline_class", "processor",
    "quantization_config", "token", "tokenizer", "trust_remote_code", "use_fast",
}  # fmt: skip
"""Arguments of transformers that say how the model is loaded, which the fleet file does."""
_DEFAULT: Any = object()
"""A call without a time-out of its own; None is one without end."""
_MAIN = ("inputs", "text_inputs", "sequences", "text", "images", "image", "audio", "audios", "videos", "video")
"""Names that transformers' pipelines have for their first argument."""
_SINGLE = (Media.TEXT, Media.IMAGE, Media.AUDIO, Media.VIDEO)
"""Fields that hold one value, so that a list of them means several inputs."""


class FleetPipeline:
    """A task on the fleet, callable like a transformers pipeline. Thread-safe.

    `defaults` are parameters of every call, `timeout` is that of a call that names none.
    """

    def __init__(
        self,
        client: Client,
        spec: TaskSpec,
        *,
        model: str | None,
        revision: str | None,
        defaults: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> None:
        self._client = client
        self._spec = spec
        self._model = model
        self._revision = revision
        self._defaults = dict(defaults or {})
        self._timeout = _checked_timeout(timeout)

    @property
    def task(self) -> str:
        """The canonical name of the task."""
        return self._spec.name

    def __call__(self, *inputs: Any, timeout: float | None = _DEFAULT, **parameters: Any) -> Any:
        """Run one input, a list, or a lazy iterable; parameters are those of the transformers call.

        Fields of an input may come as keywords or in their order (`pipe(image, question)`), each of them one value or a list.
        `timeout` is in seconds for each result, from when it is the next one due (default: that of the pipeline; None: without
        end). Inputs of an iterable are taken by a thread of its own, so a result is there when its job has ended, however long the
        next input takes. Raises UsageError for what cannot work, JobFailedError for the first input that fails, and
        ResultTimeoutError; jobs that are under way then are cancelled, for nobody has a handle on them.
        """
        wait = self._timeout if timeout is _DEFAULT else _checked_timeout(timeout)
        given, called = arguments_of(self._spec, inputs, parameters)
        wanted = {**self._defaults, **{name: value for name, value in called.items() if name not in _ACCEPTED}}
        if wanted.get("is_split_into_words") and _is_words(given):
            given = [given]
        if self._is_one_input(given):
            return self._restored(_result(self.submit(given, **wanted), wait), wanted)
        if isinstance(given, list | tuple):
            with closing(self._stream(given, wanted, wait, eager=True)) as stream_of_results:
                results = [self._restored(one, wanted, bare=True) for one in stream_of_results]
            if self._are_joined(given, inputs):
                return [record for records in results for record in records]
            return results[0] if self._spec.answers_one_alone and len(results) == 1 else results
        if _is_dataset(given):
            return (self._restored(one, wanted, bare=True) for one in self._stream(given, wanted, wait))
        result = self._restored(_result(self.submit(given, **wanted), wait), wanted)
        return [result] if self._is_nested(given, called) else result

    def submit(self, inputs: Any, *, priority: str = "normal", expires: float | None = None, **parameters: Any) -> Job:
        """Queue one input and return its Job at once."""
        return self._submit(inputs, Patience(), priority=priority, expires=expires, **parameters)

    def _submit(
        self,
        inputs: Any,
        patience: Patience,
        *,
        priority: str = "normal",
        expires: float | None = None,
        **parameters: Any,
    ) -> Job:
        parameters = {**self._defaults, **parameters}
        reserved = {"output", "idempotency_key"} & set(parameters)
        if reserved:
            raise ParameterError(f"{sorted(reserved)[0]} is an argument of Client.submit, not of a pipeline")
        if "timeout" in parameters:
            raise ParameterError("submit() does not wait: say timeout to the result() of the job that it returns")
        return self._client.submit_patiently(
            patience,
            self._spec.name,
            inputs,
            model=self._model,
            revision=self._revision,
            parameters=parameters,
            priority=priority,
            expires=expires,
        )

    def _stream(
        self, inputs: Iterable[Any], parameters: Mapping[str, Any], timeout: float | None, *, eager: bool = False
    ) -> Generator[Any]:
        """Results in order, with at most `in_flight` inputs under way. `eager` as in `stream`.

        Once an input is under way, services that are away are waited for.
        """
        stopped = threading.Event()
        patience = Patience(stopped)

        def submit(one: Any) -> Job:
            job = self._submit(one, patience, **parameters)
            patience.seconds = PATIENCE_SECONDS
            return job

        bound = self._client.settings.in_flight
        try:
            yield from stream(_each_of(inputs), submit, lambda job: _result(job, timeout), bound=bound, eager=eager)
        finally:
            stopped.set()

    def _is_one_input(self, inputs: Any) -> bool:
        """Whether a list is one input by itself: the messages of a chat, or a pair of images."""
        if not isinstance(inputs, list | tuple):
            return False
        if self._spec.media is Media.IMAGE_PAIR:
            return not any(isinstance(one, list | tuple) for one in inputs)
        return self._spec.media is Media.PROMPT and bool(inputs) and is_message(inputs[0])

    def _are_joined(self, given: Iterable[Any], inputs: tuple[Any, ...]) -> bool:
        """Whether results make one list: transformers takes texts beside pictures (`images=[…], text=[…]`) for a single input."""
        pairs = all(isinstance(one, Mapping) and "text" in one and len(one) > 1 for one in given)
        return self._spec.media is Media.PROMPT and pairs and not (inputs and isinstance(inputs[0], list | tuple))

    def _is_nested(self, given: Any, called: Mapping[str, Any]) -> bool:
        """Whether a text's list stands in another: with top_k in pipeline(), transformers looks for it in the call alone."""
        return isinstance(given, str) and any(name in self._defaults.keys() - called for name in self._spec.kept_with)

    def _restored(self, output: Any, parameters: Mapping[str, Any], *, bare: bool = False) -> Any:
        """A result in the very form of transformers: its tuples, and without the list around the only one of a batch."""
        if self._spec.tuples:
            output = _with_tuples(output, self._spec.tuples)
        alone = isinstance(output, list) and len(output) == 1
        kept = any(name in parameters for name in self._spec.kept_with)
        return output[0] if bare and self._spec.bare_in_lists and alone and not kept else output


def pipeline(
    task: str | None = None,
    model: str | None = None,
    *,
    revision: str | None = None,
    client: Client | None = None,
    timeout: float | None = None,
    **parameters: Any,
) -> FleetPipeline:
    """A pipeline whose model runs on the fleet; `timeout` is the default of its calls, see `FleetPipeline.__call__`.

    Without `model`, the task's default pool serves; without `task`, the one that the model is served for. Parameters of the task
    hold for every call that does not say otherwise; those that choose hardware (`device`, `dtype`, `batch_size` …) are accepted
    and left to the fleet. Raises UnknownModelError with a list of what is served, ParameterError for anything else.
    """
    for foreign in sorted(_OF_THE_POOL & set(parameters)):
        raise ParameterError(
            f"{foreign} belongs to how a pool loads its model: write `{fleet_line(foreign, parameters[foreign])}` under its "
            "[pools.NAME] in fleet.toml, not in pipeline()"
        )
    client = client or Client()
    name = _task_of(client, model, revision) if task is None else task
    spec, _ = client.route(name, model, revision)
    defaults = {key: value for key, value in parameters.items() if key not in _ACCEPTED}
    spec.check(defaults)
    defaults = {**implied_parameters(name), **defaults}
    return FleetPipeline(client, spec, model=model, revision=revision, defaults=defaults, timeout=timeout)


def _task_of(client: Client, model: str | None, revision: str | None) -> str:
    """The one task that a model is served for."""
    if model is None:
        raise ParameterError("pipeline() needs a task, a model, or both")
    pools = [one for one in client.fleet.pools.values() if one.model == model and revision in (None, one.revision)]
    tasks = sorted({pool.task for pool in pools})
    if not tasks:
        raise UnknownModelError(f"no pool of the fleet serves {model}; `pipefleet queues` lists those there are")
    if len(tasks) > 1:
        raise ParameterError(f"{model} is served for {' and '.join(tasks)}; name one of them as task")
    return tasks[0]


def _result(job: Job, timeout: float | None) -> Any:
    """The result of a job that nobody else knows of: it is cancelled when it is not waited for any longer."""
    try:
        return job.result(timeout)
    except ResultTimeoutError:
        why = job.why_waiting()
        try:
            if not job.cancel():
                return job.result(timeout)  # it ended in this very moment
        except ServiceUnavailableError as error:
            raise ResultTimeoutError(f"job {job.id} had no result within {timeout} s; {error}") from None
        text = f"job {job.id} had no result within {timeout} s and was cancelled" + (f": {why}" if why else "")
        raise ResultTimeoutError(text) from None
    except KeyboardInterrupt:
        with suppress(PipefleetError):
            job.cancel()
        raise


def _checked_timeout(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ParameterError("timeout must be a number of seconds, finite and not below 0, or None")
    return value


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
    fields = {
        name: wanted.pop(name)
        for name in spec.fields
        if name in wanted and (name not in spec.parameters or _is_nested(wanted[name]))
    }
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
    if kind is Media.LABELS:
        return _is_nested(value)
    return bool(value) and not is_message(value[0]) if kind is Media.PROMPT else kind in _SINGLE


def _is_nested(value: Any) -> bool:
    """A list of lists: labels for each of several pictures."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], list | tuple)


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
    """Whether `value` holds inputs to be taken one by one: an iterator, a column or set of `datasets`, a torch data set.

    Not a text, bytes, a dict, a picture, an array, a tensor or a table: each of these is one input.
    """
    single = isinstance(value, str | bytes | bytearray | memoryview | Mapping)
    if single or is_table(value) or any(hasattr(value, name) for name in ("__array_interface__", "detach", "save")):
        return False
    return hasattr(value, "__iter__") or (hasattr(value, "__getitem__") and hasattr(value, "__len__"))


def _each_of(values: Any) -> Iterator[Any]:
    """The values of an iterable, or of a torch data set, which has a length and may answer beyond its end."""
    return iter(values) if hasattr(values, "__iter__") else (values[index] for index in range(len(values)))
