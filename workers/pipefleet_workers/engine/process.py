"""A process that decodes and preprocesses: its description (`Recipe`), and its loop (`serve`) until the parent is gone.

    parent: (name, items) ─▶ pipe ─▶ decode, adapter.prepare ─▶ Answers; their arrays in shared memory called `name` ─▶ parent

`processes.PreprocessPool` starts it. Before each item the child names the item that it begins, so that the parent knows which item
never ends. A failure of one item becomes its Answer.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch

from pipefleet.contract.messages import JobItem, Priority
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.base import Adapter, brief
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.items import Decoded, Fetched, ItemError, JobContext, Nowhere, Unit, Work
from pipefleet_workers.process.tether import tie
from pipefleet_workers.process.watchdog import listen, working_on
from pipefleet_workers.settings import WorkerSettings

SHARED = 1 << 16
"""An answer with more bytes of arrays than this goes through shared memory."""
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The things that a child needs to prepare items as its parent would: the whole pipeline except the weights."""

    task: str
    pads: bool
    settings: WorkerSettings
    kind: type
    state: Mapping[str, Any]
    model: torch.nn.Module
    """On the device `meta`: it has shapes and a config, and takes no memory."""

    @classmethod
    def of(cls, task: str, adapter: Adapter, settings: WorkerSettings) -> Recipe:
        """The recipe of a worker's adapter. Raises any error of a model that cannot be made without weights."""
        pipe = adapter.pipe
        with torch.device("meta"):
            model = type(pipe.model)(copy.deepcopy(pipe.model.config)).to(pipe.model.dtype)  # inputs get this dtype
        state = {name: value for name, value in vars(pipe).items() if name != "model"}
        return cls(
            task, adapter.pads, settings, _importable(type(pipe)), {**state, "device": torch.device("cpu")}, model
        )

    def adapter(self) -> Adapter:
        """An adapter that can only prepare."""
        pipe: Any = object.__new__(self.kind)
        vars(pipe).update(self.state)
        pipe.model = self.model.eval()
        found = RUNTIME[self.task].adapter(pipe)
        found.pads = self.pads
        return found


def _importable(kind: type) -> type:
    """The first class among a pipeline's bases that another process can import."""
    for one in kind.__mro__:
        if one is not object and getattr(sys.modules.get(one.__module__), one.__qualname__, None) is one:
            found: type = one
            return found
    raise TypeError(f"{kind.__name__} cannot be imported")


@dataclass(frozen=True, slots=True)
class Request:
    """One item: its fetched inputs and its parameters."""

    inputs: Any
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Begun:
    """The child begins the item at `position` of the request, together with the next `others` items: any of them may hang."""

    position: int
    others: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The units of one item as (index, key, length, features, fixed), or its failure; and the seconds of its stages."""

    units: Sequence[tuple[int, Any, int, Any, int]]
    context: Any
    expected: int
    failure: tuple[str, str, str] | None
    seconds: Mapping[str, float]
    warnings: Sequence[str] = ()


def serve(connection: Connection, recipe: Recipe) -> None:
    """Answer requests until the parent sends None or is gone. A child that hangs in an item also dies with its parent."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        tie(parent.pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which still needs the running items
    torch.set_num_threads(1)
    adapter = recipe.adapter()
    decoder = Decoder(task_spec(recipe.task), recipe.settings, sampling_rate=adapter.sampling_rate)
    connection.send(None)
    listen(_Telling(connection))
    try:
        while (asked := connection.recv()) is not None:
            name, requests = asked
            connection.send(packed(answers(adapter, decoder, requests), name))
    except (EOFError, OSError):
        return


def answers(adapter: Adapter, decoder: Decoder, requests: Sequence[Request]) -> list[Answer]:
    """The answer to each request, in order."""
    found: dict[int, Answer] = {}
    decoded: dict[int, Decoded] = {}
    for index, request in enumerate(requests):
        work = _work(request, index)
        working_on(work)
        try:
            decoded[index] = decoder.decode(Fetched(work, request.inputs))
        except Exception as error:  # noqa: BLE001 - an item's failure is its own
            found[index] = _failed(error, work)
    if decoded:
        working_on(next(iter(decoded.values())).work, len(decoded) - 1)
    prepared = adapter.prepare(list(decoded.values()))
    for (index, one), units in zip(decoded.items(), prepared, strict=True):
        found[index] = _failed(units, one.work) if isinstance(units, ItemError) else _answer(units, one.work)
    return [found[index] for index in range(len(requests))]


class _Telling:
    """Tells the parent which item begins."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def begin(self, work: Work | None, others: int = 0) -> None:
        if work is not None:
            self._connection.send(Begun(work.position, others))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        yield


def _work(request: Request, position: int) -> Work:
    context = JobContext("", None, request.parameters, int(Priority.NORMAL), None, Nowhere())
    return Work(context, position, JobItem("", "", request.parameters), request.parameters, 0)


def _answer(units: Sequence[Unit], work: Work) -> Answer:
    rows = [(unit.index, unit.key, unit.length, unit.features, unit.fixed) for unit in units]
    context, expected = (units[0].assembly.context, units[0].assembly.expected) if units else (None, 0)
    return Answer(rows, context, expected, None, dict(work.seconds), work.warnings)


def _failed(error: Exception, work: Work) -> Answer:
    if isinstance(error, ItemError):
        failure = error.failure
        return Answer((), None, 0, (failure.code, failure.message, failure.stage), dict(work.seconds), work.warnings)
    return Answer((), None, 0, ("internal_error", brief(error), "decode"), dict(work.seconds))


class _Pickler(pickle.Pickler):
    """Pickles tensors as NumPy arrays; the bytes of arrays go beside the pickle instead of into it."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.detach().contiguous().numpy(),)
        return NotImplemented


def packed(value: Any, name: str) -> tuple[bytes, list[int], bytes]:
    """A value as its pickle, the sizes of its arrays, and their bytes.

    The bytes are empty where shared memory `name` holds them.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    keep: Callable[[pickle.PickleBuffer], None] = buffers.append
    _Pickler(stream, protocol=5, buffer_callback=keep).dump(value)
    views = [one.raw() for one in buffers]
    sizes = [len(view) for view in views]
    if sum(sizes) <= SHARED or not _has_room(sum(sizes)):
        return stream.getvalue(), sizes, b"".join(views)
    memory = SharedMemory(name, create=True, size=sum(sizes))
    content, at = memory.buf, 0
    assert content is not None
    for view, size in zip(views, sizes, strict=True):
        content[at : at + size] = view
        at += size
    del content  # shared memory cannot be closed while a view of it exists
    memory.close()
    return stream.getvalue(), sizes, b""


def _has_room(size: int) -> bool:
    """Whether shared memory can hold `size` bytes.

    A container may have little of it, and writing beyond its end kills a process.
    """
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free > 2 * size
    except FileNotFoundError:  # a system that keeps shared memory elsewhere, with other bounds
        return True


def unpacked(message: tuple[bytes, list[int], bytes], name: str) -> Any:
    """The packed value; its shared memory is given back."""
    body, sizes, own = message
    content = memoryview(bytearray(own) if own or not sum(sizes) else _taken(name, sum(sizes)))
    views, at = [], 0
    for size in sizes:
        views.append(content[at : at + size])
        at += size
    return pickle.loads(body, buffers=views)


def _taken(name: str, size: int) -> bytearray:
    memory = SharedMemory(name)
    try:
        content = memory.buf
        assert content is not None
        return bytearray(content[:size])
    finally:
        memory.close()
        memory.unlink()


def discard(name: str) -> None:
    """Give back the shared memory of a child that died before it could announce it."""
    try:
        memory = SharedMemory(name)
    except FileNotFoundError:
        return
    memory.close()
    memory.unlink()
