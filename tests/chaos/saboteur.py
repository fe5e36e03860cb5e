"""What makes a worker misbehave at a point that the suite names. Runs inside the worker, around its real stages.

A file `kill-<point>` in the folder CHAOS_FOLDER is taken away by the first worker that passes the point, which then kills itself
with SIGKILL, so that each such file kills one worker. Texts are orders as well: with KILL their forward kills the process, with
HANG it never returns, with SLOW:n it takes n seconds; with LOOP they are never decoded; with LARGE:n their result holds n
megabytes. Every text that is forwarded is noted in the folder's file `ran`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipefleet_workers import build
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.consume.shards import Shards
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import Decoded, ItemError, Unit
from pipefleet_workers.results.lines import PartWriter, ResultWriter
from pipefleet_workers.results.reports import Reporter

TASK = "text-classification"
POINTS = (
    *("consume", "fetch", "decode", "preprocess", "forward", "postprocess", "store"),
    *("before-write", "after-write", "before-report", "after-report"),
)
"""Where a worker can be killed: in a stage, and before and after each of the two writes that make a result known."""
_LARGE = re.compile(r"LARGE:([0-9]+)")
_SLOW = re.compile(r"SLOW:([0-9.]+)")


def pass_by(point: str) -> None:
    """Die here if somebody has ordered it."""
    folder = os.environ.get("CHAOS_FOLDER")
    with contextlib.suppress(FileNotFoundError):
        if folder:
            Path(folder, f"kill-{point}").unlink()
            os.kill(os.getpid(), signal.SIGKILL)


class SabotagedClassifier(TextClassifier):
    """A real classifier of texts, which obeys them."""

    def prepare(self, decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
        pass_by("preprocess")
        return super().prepare(decoded)

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        pass_by("forward")
        texts = [text_of(unit) for unit in units]
        note(texts)
        for text in texts:
            obey(text)
        return super().run(inputs, units, progress)

    def finish(self, assembly: Any) -> Any:
        pass_by("postprocess")
        result = super().finish(assembly)
        large = _LARGE.search(str(assembly.work.item.inputs))
        return [*result, np.zeros(int(large[1]) << 18, np.float32)] if large else result


def text_of(unit: Unit) -> str:
    """The text of a unit as it was submitted; of a text in an object, its address."""
    work = unit.assembly.work
    return str(getattr(getattr(work, "item", None), "inputs", ""))


def obey(text: str) -> None:
    if "KILL" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "HANG" in text:
        time.sleep(3600)
    if slow := _SLOW.search(text):
        time.sleep(float(slow[1]))


def note(texts: Sequence[str]) -> None:
    folder = os.environ.get("CHAOS_FOLDER")
    if folder:
        with Path(folder, "ran").open("a") as file:
            file.write("".join(f"{text}\n" for text in texts if text))  # warm-up has none


def never_decode_loops() -> None:
    """Texts with LOOP are never decoded, neither alone nor with others."""
    decode, texts = Decoder.decode, Decoder.texts

    def loop(fetched: Sequence[Any]) -> None:
        while any("LOOP" in str(one.work.item.inputs) for one in fetched):
            time.sleep(1)

    def looping(self: Decoder, fetched: Any) -> Any:
        loop([fetched])
        return decode(self, fetched)

    def looping_together(self: Decoder, fetched: Sequence[Any]) -> Any:
        loop(fetched)
        return texts(self, fetched)

    Decoder.decode, Decoder.texts = looping, looping_together  # type: ignore[method-assign]


def around(owner: type, name: str, *, before: str | None = None, after: str | None = None) -> None:
    """Put points before and after a method."""
    method: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            pass_by(before)
        result = method(*args, **kwargs)
        if after is not None:
            pass_by(after)
        return result

    setattr(owner, name, wrapped)


def sabotage() -> None:
    """Put the points into this process."""
    row = dataclasses.replace(RUNTIME[TASK], adapter=SabotagedClassifier)
    build.RUNTIME = {**RUNTIME, TASK: row}  # type: ignore[attr-defined]
    around(Shards, "run", before="consume")
    around(Fetcher, "fetch", before="fetch")
    never_decode_loops()
    around(Decoder, "decode", before="decode")
    around(Decoder, "texts", before="decode")
    around(ResultWriter, "write", before="store")
    around(PartWriter, "write", before="before-write", after="after-write")
    around(Reporter, "finish_many", before="before-report", after="after-report")
