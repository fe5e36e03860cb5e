"""A pool of processes that decode and preprocess, for a device that is faster than one Python process can feed it.

The threads of the `cpu` stage call `prepare`; each waits for one process with Python's lock released. Priorities and bounds stay
with the engine. A process that dies or hangs is replaced; an item that hangs, or kills two processes, fails.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import queue
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from pipefleet.errors import UsageError
from pipefleet_workers.adapters.base import Adapter, brief
from pipefleet_workers.adapters.text.encoder import FeatureExtractor, TextClassifier
from pipefleet_workers.engine.process import Answer, Begun, Recipe, Request, discard, serve, unpacked
from pipefleet_workers.items import Assembly, Fetched, ItemError, Unit, spend
from pipefleet_workers.process.watchdog import LOOKS
from pipefleet_workers.settings import WorkerSettings

log = logging.getLogger(__name__)

SERVED = (Adapter, TextClassifier, FeatureExtractor)
"""The adapters with units of plain data and a `prepare` that needs only the config and the shapes of the model."""
STAGE = "preprocess"
START_SECONDS = 120.0
STOP_SECONDS = 10.0


class PreprocessPool:
    """Processes that prepare items as the adapter would. At most as many threads as processes may call `prepare` at once.

    An item may take `seconds`; after that its process is killed, and the item fails.
    """

    def __init__(self, recipe: Recipe, count: int, seconds: float = 900.0) -> None:
        self._children = [_Child(recipe, seconds) for _ in range(count)]
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)
        self._started = False

    @classmethod
    def of(cls, task: str, adapter: Adapter, settings: WorkerSettings) -> PreprocessPool:
        """The pool that `settings.preprocess_processes` asks for. Raises UsageError for a task that cannot have one."""
        if type(adapter) not in SERVED:
            raise UsageError(f"{task} is preprocessed beside its model; unset PIPEFLEET_WORKER_PREPROCESS_PROCESSES")
        try:
            recipe = Recipe.of(task, adapter, settings)
            pickle.dumps(recipe)
        except Exception as error:
            raise UsageError(
                f"{task} cannot be preprocessed in processes ({brief(error)}); unset PIPEFLEET_WORKER_PREPROCESS_PROCESSES"
            ) from error
        return cls(recipe, settings.preprocess_processes, settings.stage_timeout)

    def start(self) -> None:
        """Start all processes, unless they run; returns when each can work. Raises UsageError when a process cannot start."""
        if self._started:
            return
        self._started = True
        for child in self._children:
            child.spawn()
        try:
            for child in self._children:
                child.await_ready()
        except ChildDiedError as error:
            self.stop()
            raise UsageError(
                f"a process that preprocesses cannot start ({error}); see the log, or unset PIPEFLEET_WORKER_PREPROCESS_PROCESSES"
            ) from None

    def prepare(self, fetched: Sequence[Fetched]) -> list[list[Unit] | ItemError]:
        """The units or the failure of each item, in the order of `fetched`; also notes the seconds of the stages.

        When a process dies, a fresh one gets its items, once. An item that never ends fails alone.
        """
        child = self._idle.get()
        try:
            return _prepared(child, fetched)
        finally:
            self._idle.put(child)

    def stop(self) -> None:
        """End the processes. A process at work gets a few seconds to finish."""
        self._started = False
        for child in self._children:
            child.stop()


class ChildDiedError(Exception):
    """A process ended before it had answered."""


class ChildHungError(Exception):
    """A process did not end the item that it had begun, and was killed."""

    def __init__(self, begun: Begun, seconds: float) -> None:
        super().__init__(f"its process had not ended it within {seconds:.0f} s, and was killed")
        self.begun = begun


def _prepared(child: _Child, fetched: Sequence[Fetched]) -> list[list[Unit] | ItemError]:
    try:
        return _twice(child, fetched)
    except ChildHungError as error:
        work, text = fetched[error.begun.position].work, str(error)
        log.error("stage %s: item %s of job %s: %s", STAGE, work.item.id, work.job.id, text)
        if len(fetched) == 1:
            return [ItemError("internal_error", text, STAGE)]
        if error.begun.others:  # any of these items may be the culprit
            return [units for one in fetched for units in _prepared(child, [one])]
        culprit = error.begun.position
        rest = [one for position, one in enumerate(fetched) if position != culprit]
        prepared = _prepared(child, rest)
        return [*prepared[:culprit], ItemError("internal_error", text, STAGE), *prepared[culprit:]]


def _twice(child: _Child, fetched: Sequence[Fetched]) -> list[list[Unit] | ItemError]:
    try:
        return child.prepare(fetched)
    except ChildDiedError as error:
        log.warning("a process died over %d items (%s); a fresh one takes them", len(fetched), error)
        try:
            return child.prepare(fetched)
        except ChildDiedError as again:
            return [ItemError("internal_error", f"two processes died over it: {again}", STAGE) for _ in fetched]


class _Child:
    """One process and the pipe to it; one thread at a time uses it. The next `prepare` replaces a dead process."""

    _numbers = itertools.count()

    def __init__(self, recipe: Recipe, seconds: float) -> None:
        self._recipe = recipe
        self._seconds = seconds
        self._process: Any = None
        self._pipe: Connection | None = None

    def spawn(self) -> None:
        """Start the process; returns before it is ready."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._recipe), name="preprocess", daemon=True)
        self._process.start()
        theirs.close()

    def await_ready(self) -> None:
        """Wait until the process is ready. Raises ChildDiedError."""
        assert self._pipe is not None
        try:
            if not self._pipe.poll(START_SECONDS):
                raise EOFError
            self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None

    def prepare(self, fetched: Sequence[Fetched]) -> list[list[Unit] | ItemError]:
        """The units or the failure of each item. Raises ChildDiedError or ChildHungError; the process is gone then."""
        if self._pipe is None:
            self.spawn()
            self.await_ready()
        name = f"pipefleet-{os.getpid()}-{next(self._numbers)}"
        requests = [Request(one.inputs, dict(one.work.parameters)) for one in fetched]
        assert self._pipe is not None
        try:
            self._pipe.send((name, requests))
            answers: list[Answer] = unpacked(self._answer(), name)
        except ChildHungError:
            self._died()
            discard(name)
            raise
        except (EOFError, OSError):
            discard(name)
            raise self._died() from None
        return [_units(one, answer) for one, answer in zip(fetched, answers, strict=True)]

    def _answer(self) -> Any:
        """The answer that follows the signs of life.

        Raises ChildHungError when the signs of life cease, and EOFError or OSError when the process ends.
        """
        assert self._pipe is not None
        begun = Begun(0, 0)
        while self._says_something(self._pipe):
            said = self._pipe.recv()
            if not isinstance(said, Begun):
                return said
            begun = said
        raise ChildHungError(begun, self._seconds)

    def _says_something(self, pipe: Connection) -> bool:
        """Whether the child says something in time. Waits in several short pieces.

        If both processes are stopped and continued (SIGSTOP, SIGCONT), only one piece runs out, not the whole time.
        """
        return any(pipe.poll(self._seconds / LOOKS) for _ in range(LOOKS))

    def stop(self) -> None:
        """Ask the process to end, and kill it if it does not."""
        if self._pipe is None:
            return
        try:
            self._pipe.send(None)
        except OSError:
            log.debug("a process that preprocesses has ended before it was told to")
        self._process.join(STOP_SECONDS)
        self._died()

    def _died(self) -> ChildDiedError:
        assert self._pipe is not None
        self._pipe.close()
        self._pipe = None
        self._process.kill()
        self._process.join()
        return ChildDiedError(f"exit code {self._process.exitcode}")


def _units(fetched: Fetched, answer: Answer) -> list[Unit] | ItemError:
    for stage, seconds in answer.seconds.items():
        spend([fetched.work], stage, seconds)
    fetched.work.warnings[:] = answer.warnings
    if answer.failure is not None:
        return ItemError(*answer.failure)
    assembly = Assembly(fetched.work, answer.expected, answer.context)
    return [Unit(assembly, index, key, length, features, fixed) for index, key, length, features, fixed in answer.units]
