"""`pipeline()` and `FleetPipeline`: the call of transformers, with the same arguments and results, served by the fleet.

One input gives one result, a list gives a list, and a generator (or a data set) gives a generator, which keeps a bounded number of
inputs under way and yields in order. Each input is a single job of a `Client`. UsageError says that a call cannot work;
JobFailedError that an input failed.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from typing import Any

from pipefleet.arguments import seconds_of
from pipefleet.client import Client
from pipefleet.errors import (
    ParameterError,
    PipefleetError,
    ResultTimeoutError,
    ServiceUnavailableError,
    UnknownModelError,
)
from pipefleet.fleet.model_names import check_loading, model_name
from pipefleet.inputs.prepare import is_message, is_pair
from pipefleet.jobs.job import Job
from pipefleet.jobs.text_stream import TextStream
from pipefleet.patience import PATIENCE_SECONDS, Patience
from pipefleet.pipelines.calls import Beside, Joined, arguments_of, each_of, is_dataset
from pipefleet.pipelines.chats import with_media
from pipefleet.pipelines.streamed_text import streamed_parameters
from pipefleet.pipelines.streaming import stream
from pipefleet.pipelines.tensors import with_tensors
from pipefleet.tasks import Media, TaskSpec, implied_parameters
from pipefleet.tasks.parameters import called_parameters, layered

_ACCEPTED = {"batch_size", "num_workers", "device", "device_map", "dtype", "torch_dtype", "framework"}
"""Arguments of transformers that choose hardware or batching. The fleet decides those, so they are accepted without effect."""
_OF_THE_POOL = {
    "attn_implementation", "config", "feature_extractor", "image_processor", "model_kwargs", "pipeline_class", "processor",
    "quantization_config", "token", "tokenizer", "trust_remote_code", "use_fast",
}  # fmt: skip
"""Arguments of transformers that say how the model is loaded. The fleet file says that."""
_PARTS = {
    "model", "tokenizer", "feature_extractor", "image_processor", "processor", "device", "dtype", "torch_dtype",
    "generation_config", "save_pretrained", "call_count", "preprocess", "forward", "postprocess",
}  # fmt: skip
"""Attributes of a transformers pipeline that exist only in the process of the model."""
_SPLIT = "is_split_into_words"
_DEFAULT: Any = object()
"""The time-out of a call that names none. None means without end."""


class FleetPipeline:
    """A task on the fleet, callable like a transformers pipeline. Thread-safe.

    `defaults` are parameters of every call. `timeout` holds for a call that names none.
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
        """Run one input, a list, or a lazy iterable, with the parameters of the transformers call.

        Fields of an input may come as keywords or in order (`pipe(image, question)`); each is one value, a list, or a lazy
        iterable. If the task takes chats, the first item of a generator is taken at once, to see whether the items are messages.
        `timeout` is in seconds for each result, from the moment when it is the next one due (default: that of the pipeline; None:
        without end). A thread takes the inputs of an iterable, so a result is there when its job has ended, although the next
        input may take long.

        Raises UsageError for a call that cannot work, JobFailedError for the first input that fails, and ResultTimeoutError. Jobs
        under way are cancelled then, because nobody has a handle on them.
        """
        wait = self._timeout if timeout is _DEFAULT else _checked_timeout(timeout)
        given, called = arguments_of(self._spec, inputs, parameters)
        wanted = self._wanted({name: value for name, value in called.items() if name not in _ACCEPTED})
        if called.get(_SPLIT) and _is_words(given):
            given = [given]
        if self._is_one_input(given):
            return self._restored(self._answer(given, wanted, wait), wanted)
        if isinstance(given, list | tuple):
            with closing(self._stream(given, wanted, wait, eager=True)) as stream_of_results:
                answers = [self._restored(one, wanted, listed=True) for one in stream_of_results]
            if isinstance(given, Joined):
                return [record for records in answers for record in records]
            return answers[0] if self._spec.answers_one_alone and len(answers) == 1 else answers
        if is_dataset(given):
            results = (self._restored(one, wanted, streamed=True) for one in self._stream(given, wanted, wait))
            return Results(results, len(given)) if hasattr(given, "__len__") else results
        result = self._restored(self._answer(given, wanted, wait), wanted)
        return [result] if self._is_nested(given, called) else result

    def predict(self, inputs: Any) -> Any:
        """A call without parameters, for code that is written for scikit-learn."""
        return self(inputs)

    def transform(self, inputs: Any) -> Any:
        """As `predict`."""
        return self(inputs)

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError for every name. For parts of a transformers pipeline the message says where they are."""
        where = "; the model is with the workers, load it with transformers to look at it" if name in _PARTS else ""
        raise AttributeError(f"a pipeline of the fleet has no {name!r}{where}")

    def _wanted(self, called: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a call over those of the pipeline."""
        return layered(self._spec, self._defaults, called)

    def submit(self, inputs: Any, *, priority: str = "normal", expires: float | None = None, **parameters: Any) -> Job:
        """Queue one input and return its Job at once."""
        return self._submit(inputs, Patience(), priority=priority, expires=expires, **self._wanted(parameters))

    def stream(
        self,
        inputs: Any,
        *,
        timeout: float | None = _DEFAULT,
        priority: str = "normal",
        expires: float | None = None,
        **parameters: Any,
    ) -> TextStream:
        """Queue one prompt or chat, and return an iterator over the new text while a worker writes it.

        `timeout` is in seconds for each piece. The pieces are the text of the call with the same parameters and
        `return_full_text=False`; `stream(...).result()` is its result. Raises ParameterError for a task that writes no text,
        and for a call with several texts or with tokens as its result.

        >>> for piece in pipe.stream("Once upon a time", max_new_tokens=50):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
        """
        wanted = self._wanted({name: value for name, value in parameters.items() if name not in _ACCEPTED})
        wanted = streamed_parameters(self._spec, wanted)
        wait = self._timeout if timeout is _DEFAULT else _checked_timeout(timeout)
        job = self._submit(inputs, Patience(), priority=priority, expires=expires, stream=True, **wanted)
        return TextStream(self._client, job, wait)

    def _submit(
        self,
        inputs: Any,
        patience: Patience,
        *,
        priority: str = "normal",
        expires: float | None = None,
        stream: bool = False,
        **parameters: Any,
    ) -> Job:
        reserved = {"output", "idempotency_key"} & set(parameters)
        if reserved:
            raise ParameterError(f"{sorted(reserved)[0]} is an argument of Client.submit, not of a pipeline")
        if self._defaults.get(_SPLIT) and isinstance(inputs, str):
            parameters.pop(_SPLIT, None)  # the pipeline's default is for lists of words, and this input is a text
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
            stream=stream,
        )

    def _answer(self, given: Any, wanted: Mapping[str, Any], wait: float | None) -> Any:
        """The result of one input."""
        return self._completed(_result(self._submit(given, Patience(), **wanted), wait), given)

    def _completed(self, output: Any, given: Any) -> Any:
        return with_media(output, given) if self._spec.media is Media.PROMPT else output

    def _stream(
        self, inputs: Iterable[Any], parameters: Mapping[str, Any], timeout: float | None, *, eager: bool = False
    ) -> Generator[Any]:
        """Results in order, with at most `in_flight` inputs under way. `eager` as in `stream`.

        After the first input is under way, services that are away are waited for.
        """
        stopped = threading.Event()
        patience = Patience(stopped)
        chats: deque[Any] = deque()  # those under way, in the order of their results

        def submit(one: Any) -> Job:
            job = self._submit(one, patience, **parameters)
            patience.seconds = PATIENCE_SECONDS
            chats.append(one if self._spec.media is Media.PROMPT else None)
            return job

        def result(job: Job) -> Any:
            return self._completed(_result(job, timeout), chats.popleft())

        bound = self._client.settings.in_flight
        try:
            yield from stream(each_of(inputs), submit, result, bound=bound, eager=eager)
        finally:
            stopped.set()

    def _is_one_input(self, inputs: Any) -> bool:
        """Whether a list is one input: the messages of a chat, a pair of images, a tuple of a text and its pair."""
        if not isinstance(inputs, list | tuple):
            return False
        if self._spec.media is Media.IMAGE_PAIR:
            return not any(isinstance(one, list | tuple) for one in inputs)
        if "text_pair" in self._spec.fields and isinstance(inputs, tuple):
            return is_pair(inputs)
        return self._spec.media is Media.PROMPT and bool(inputs) and is_message(inputs[0])

    def _is_nested(self, given: Any, called: Mapping[str, Any]) -> bool:
        """Whether one more list goes around a result. transformers adds it to a text's result unless the call names top_k.

        call                               result of the worker    answer
        pipeline(task)(text)               [{…}]                   [{…}]           False
        pipeline(task)(text, text_pair=t)  {…}                     [{…}]           True: a text, given beside a field
        pipeline(task, top_k=2)(text)      [{…}, {…}]              [[{…}, {…}]]    True: the call names no top_k
        pipeline(task)(text, top_k=2)      [{…}, {…}]              [{…}, {…}]      False
        """
        kept_with = self._spec.kept_with
        if not kept_with or any(name in called for name in kept_with):
            return False
        return isinstance(given, Beside) or (
            isinstance(given, str) and any(name in self._defaults for name in kept_with)
        )

    def _restored(
        self, output: Any, parameters: Mapping[str, Any], *, listed: bool = False, streamed: bool = False
    ) -> Any:
        """A result in transformers' form: with tensors and tuples, without the list around a single answer in a list or stream."""
        if self._spec.tensors and ("" not in self._spec.tensors or parameters.get("return_tensors")):
            output = with_tensors(output, self._spec.tensors)
        if self._spec.tuples:
            output = _with_tuples(output, self._spec.tuples)
        alone = isinstance(output, list) and len(output) == 1
        kept = any(name in parameters for name in self._spec.kept_with)
        bare = (listed and self._spec.bare_in_lists) or (streamed and self._spec.bare_in_streams)
        return output[0] if bare and alone and not kept else output


class Results(Iterator[Any]):
    """The results of a data set: an iterator with a length, for progress bars. For one thread."""

    def __init__(self, results: Generator[Any], count: int) -> None:
        self._results = results
        self._count = count

    def __next__(self) -> Any:
        return next(self._results)

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Cancel the jobs that are under way."""
        self._results.close()


def pipeline(
    task: str | None = None,
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    client: Client | None = None,
    timeout: float | None = None,
    **parameters: Any,
) -> FleetPipeline:
    """A pipeline whose model runs on the fleet. `timeout` is the default of its calls, see `FleetPipeline.__call__`.

    Without `model`, the task's default pool serves. Without `task`, it is the task that the model is served for. Parameters of the
    task hold for every call that does not replace them. Parameters that choose hardware (`device`, `dtype`, `batch_size` …) are
    accepted and left to the fleet. Raises UnknownModelError, which lists the served models, and ParameterError.
    """
    model = model_name(model)
    check_loading(parameters, _OF_THE_POOL, model)
    parameters = {key: value for key, value in parameters.items() if key not in _OF_THE_POOL}
    client = client or Client()
    name = _task_of(client, model, revision) if task is None else task
    spec, _ = client.route(name, model, revision)
    defaults = called_parameters(spec, {key: value for key, value in parameters.items() if key not in _ACCEPTED})
    defaults = layered(spec, implied_parameters(name), defaults)
    return FleetPipeline(client, spec, model=model, revision=revision, defaults=defaults, timeout=timeout)


def _task_of(client: Client, model: str | None, revision: str | None) -> str:
    """The task that a model is served for. Raises UnknownModelError for none, ParameterError for several."""
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
    """The result of a job on which nobody else has a handle. After the time-out, or Ctrl-C, the job is cancelled.

    Missing pieces of the result become warnings of Python's.
    """
    try:
        result = job.result(timeout)
        for text in job.warnings:
            warnings.warn(text, stacklevel=3)
        return result
    except ResultTimeoutError:
        why = job.why_waiting()
        try:
            if not job.cancel():
                return job.result(timeout)  # the job ended in between
        except ServiceUnavailableError as error:
            raise ResultTimeoutError(f"job {job.id} had no result within {timeout:g} s; {error}") from None
        text = f"job {job.id} had no result within {timeout:g} s and was cancelled" + (f": {why}" if why else "")
        raise ResultTimeoutError(text) from None
    except KeyboardInterrupt:
        with suppress(PipefleetError):
            job.cancel()
        raise


def _checked_timeout(value: Any) -> float | None:
    if value is None:
        return None
    found = seconds_of(value)
    if found is None or not 0 <= found < math.inf:
        raise ParameterError("timeout must be a number of seconds, finite and not below 0, or None")
    return found


def _with_tuples(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _tuples(item) if name in keys and isinstance(item, list) else _with_tuples(item, keys)
            for name, item in value.items()
        }
    return [_with_tuples(item, keys) for item in value] if isinstance(value, list) else value


def _is_words(value: Any) -> bool:
    """Whether `value` is a flat list of words, which is one text."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, str) for one in value)


def _tuples(value: list[Any]) -> Any:
    """A list becomes a tuple; a list of lists, also an empty list, becomes a list of tuples."""
    return tuple(value) if value and not isinstance(value[0], list) else [tuple(one) for one in value]
