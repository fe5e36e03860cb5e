"""The memory of a worker: what stays for its whole life is looked at once; what comes later is collected."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from pipefleet_workers.process import memory


class Node:
    """Refers to itself, so that only the garbage collector can free it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_a_settled_process_looks_only_at_what_came_later() -> None:
    before, kept = weakref.ref(Node()), Node()
    memory.settle()
    assert before() is None, "garbage goes before the rest is set apart"
    assert gc.get_freeze_count() > 10_000
    assert not any(one is kept for one in gc.get_objects())
    later = weakref.ref(Node())
    gc.collect()
    assert later() is None


def test_the_objects_of_items_inside_are_seldom_looked_at() -> None:
    memory.settle()
    looks = sum(one["collections"] for one in gc.get_stats())
    held = [[] for _ in range(memory.YOUNG_OBJECTS // 2)]  # type: ignore[var-annotated]
    assert sum(one["collections"] for one in gc.get_stats()) == looks
    del held
