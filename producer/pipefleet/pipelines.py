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
from pipefleet.errors import ParameterError
from pipefleet.inputs import is_message
from pipefleet.jobs import Job
from pipefleet.tasks import Media, TaskSpec, task_spec

_ACCEPTED = {"batch_size", "num_workers", "device", "device_map", "dtype", "torch_dtype", "framework"}
"""Arguments of transformers that choose hardware or batching, which the fleet decides: accepted, without effect."""


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

    def __call__(self, inputs: Any, **parameters: Any) -> Any:
        """Run one input, a list, or a lazy iterable; parameters are those of the transformers call.

        Raises UsageError before anything is queued, JobFailedError for the first input that fails.
        """
        wanted = {name: value for name, value in parameters.items() if name not in _ACCEPTED}
        if self._is_chat(inputs):
            return self.submit(inputs, **wanted).result()
        if isinstance(inputs, list | tuple):
            return [self._as_in_list(one, wanted) for one in self._stream(inputs, wanted)]
        if isinstance(inputs, types.GeneratorType) or _is_dataset(inputs):
            return (self._as_in_list(one, wanted) for one in self._stream(inputs, wanted))
        return self.submit(inputs, **wanted).result()

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

    def _is_chat(self, inputs: Any) -> bool:
        chats = self._spec.media is Media.PROMPT and isinstance(inputs, list | tuple)
        return chats and bool(inputs) and is_message(inputs[0])

    def _as_in_list(self, output: Any, parameters: Mapping[str, Any]) -> Any:
        """Transformers wraps the best label in a list for a single text, but not for one in a list of texts."""
        wrapped = self._spec.name == "text-classification" and "top_k" not in parameters
        return output[0] if wrapped and isinstance(output, list) and len(output) == 1 else output


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


def _is_dataset(value: Any) -> bool:
    """An iterator, or a lazy collection such as `datasets.Dataset` or a torch data set; not a string, bytes, dict or array."""
    if (
        isinstance(value, str | bytes | bytearray | memoryview | Mapping)
        or hasattr(value, "__array_interface__")
        or hasattr(value, "save")
    ):
        return False
    return hasattr(value, "__next__") or (hasattr(value, "__getitem__") and hasattr(value, "__len__"))
