"""`RunProgress`, the state and counts of a run, and its display: a bar on a terminal, plain lines elsewhere, both on stderr.

`Run.progress` makes it, `_SUCCESS` holds it as JSON, `Run.wait` and the command line show it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from pipefleet.foreign import number, whole
from pipefleet.printable import printable

PLAIN_SECONDS = 5.0
"""Seconds between two plain lines."""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """The state and the counts of a run.

    `state` is planning, stopped, running, succeeded, partial (some items failed), failed (all items failed) or cancelled. A run is
    stopped when its planning ended before its source, when its queueing ended early, or when Redis lost its messages; `reason`
    says which, and `resume` goes on. `items` counts the known items of the source; `succeeded + failed` of them have ended.
    `seconds` counts from the start. `refused` counts the shards that no worker will run, and `refused_reason` is the reason of one;
    their items are failed items once the run has ended. `waiting` is a sentence if no worker serves the queue, or if Redis is a
    replica.
    """

    uri: str
    state: str
    items: int
    succeeded: int
    failed: int
    shards: int
    parts: int
    seconds: float
    reason: str | None = None
    refused: int = 0
    refused_reason: str | None = None
    waiting: str | None = None

    @property
    def ended(self) -> bool:
        """True if nothing will change any more, unless somebody resumes the run."""
        return self.state in ("succeeded", "partial", "failed", "cancelled")

    def to_json(self) -> dict[str, Any]:
        """The JSON of `--json`. It has `reason`, `refused_reason` and `waiting` only if they are not empty."""
        names = ("uri", "state", "items", "succeeded", "failed", "shards", "parts", "seconds", "refused")
        said = {name: getattr(self, name) for name in ("reason", "refused_reason", "waiting")}
        return {name: getattr(self, name) for name in names} | {name: one for name, one in said.items() if one}

    @classmethod
    def from_json(cls, uri: str, totals: Mapping[str, Any]) -> RunProgress:
        """The reverse of `to_json`. Unknown fields are passed over.

        Raises ValueError or LookupError for a wrong or missing field.
        """
        counts: dict[str, Any] = {
            name: whole(totals[name]) for name in ("items", "succeeded", "failed", "shards", "parts")
        }
        seconds, refused = number(totals["seconds"]), whole(totals.get("refused", 0))
        texts: dict[str, Any] = {name: totals.get(name) for name in ("reason", "refused_reason", "waiting")}
        if not isinstance(totals["state"], str) or not all(isinstance(one, str | None) for one in texts.values()):
            raise ValueError("not a text")
        return cls(uri=uri, state=totals["state"], seconds=seconds, refused=refused, **counts, **texts)


Show = Callable[[RunProgress], None]


@contextmanager
def show_progress(*, enabled: bool, stream: TextIO | None = None) -> Iterator[Show]:
    """A function that shows a RunProgress at each call. Unless `enabled` it shows nothing."""
    stream = stream or sys.stderr
    if not enabled:
        yield lambda progress: None
    elif stream.isatty():
        with _bar(stream) as show:
            yield show
    else:
        yield _PlainLines(stream)


def describe(progress: RunProgress) -> str:
    """One line: ended and known items, failed items, items a second, and hindrances."""
    done = progress.succeeded + progress.failed
    total = f"{progress.items}" + ("+" if progress.state == "planning" else "")
    failed = f", {progress.failed} failed" if progress.failed else ""
    rate = done / progress.seconds if progress.seconds > 0 else 0.0
    shards = f", {progress.parts}/{progress.shards} shards" if progress.state == "planning" and progress.shards else ""
    state = printable(progress.state)
    line = f"{done}/{total} items{failed}{shards}, {rate:.1f} items/s, {progress.seconds:.0f} s, {state}"
    return "; ".join([line, *_hindrances(progress)])


def _hindrances(progress: RunProgress) -> list[str]:
    """Sentences on why items do not become results."""
    shards = "1 shard was" if progress.refused == 1 else f"{progress.refused} shards were"
    refused = f"{shards} refused: {printable(progress.refused_reason or '', 300)}" if progress.refused else None
    return [text for text in (refused, printable(progress.waiting or "", 1000)) if text]


class _PlainLines:
    """Prints a line when a count has changed, at most once in PLAIN_SECONDS; at once for a new hindrance; always the last."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next = 0.0
        self._shown: tuple[Any, ...] = ()

    def __call__(self, progress: RunProgress) -> None:
        hindrances = _hindrances(progress)
        news = (progress.succeeded + progress.failed, *hindrances)
        due = news != self._shown and (time.monotonic() >= self._next or news[1:] != self._shown[1:])
        if due or progress.ended:
            print(describe(progress), file=self._stream, flush=True)
            self._next, self._shown = time.monotonic() + PLAIN_SECONDS, news


@contextmanager
def _bar(stream: TextIO) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}", markup=False), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(file=stream)) as bar:
        line = bar.add_task("planning", total=None, detail="")

        def show(progress: RunProgress) -> None:
            done = progress.succeeded + progress.failed
            rate = done / progress.seconds if progress.seconds > 0 else 0.0
            failed = f" {progress.failed} failed" if progress.failed else ""
            bar.update(
                line, description=printable(progress.state), completed=done, total=progress.items or None,
                detail="; ".join([f"{rate:.1f}/s{failed}", *_hindrances(progress)]),
            )  # fmt: skip

        yield show
