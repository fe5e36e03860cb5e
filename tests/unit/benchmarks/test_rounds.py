"""Contenders take turns, round by round; what was measured is kept, whatever happens next."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.benchmarks import rounds


class Book:
    """Contenders that note each call, and a save that keeps what would have been written."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.record: dict[str, Any] = {}
        self.saved: list[dict[str, Any]] = []

    def contender(self, name: str, error: BaseException | None = None) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            self.calls.append(name)
            if error is not None:
                raise error
            return {"items": 1, "seconds": 1.0}

        return measure

    def measure(self, contenders: dict[str, Any], count: int) -> None:
        rounds.measure("texts", self.record, contenders, count, lambda: self.saved.append(copy.deepcopy(self.record)))


def test_rounds_are_interleaved() -> None:
    book = Book()
    book.measure({name: book.contender(name) for name in "ABC"}, 3)
    assert "".join(book.calls) == "ABCABCABC"
    assert [one["round"] for one in book.record["rounds"]] == [1, 2, 3]
    assert [run["round"] for run in book.record["contenders"]["B"]["runs"]] == [1, 2, 3]
    assert {"load_before", "load_after", "foreign_cores", "stolen_cores", "own_cores"} <= set(book.record["rounds"][0])


def test_a_later_call_measures_only_what_is_missing() -> None:
    assert rounds.order({"A": 2, "B": 1, "C": 0}, 3) == [["C"], ["B", "C"], ["A", "B", "C"]]
    book = Book()
    book.measure({name: book.contender(name) for name in "AB"}, 1)
    book.measure({name: book.contender(name) for name in "ABC"}, 2)
    assert "".join(book.calls) == "ABCABC"
    book.measure({name: book.contender(name) for name in "ABC"}, 2)
    assert "".join(book.calls) == "ABCABC"


def test_an_interrupt_loses_only_the_run_that_it_meets() -> None:
    book = Book()
    able = {"A": book.contender("A"), "B": book.contender("B", KeyboardInterrupt()), "C": book.contender("C")}
    with pytest.raises(KeyboardInterrupt):
        book.measure(able, 2)
    last = book.saved[-1]
    assert (len(last["contenders"]["A"]["runs"]), last["contenders"]["B"]["runs"]) == (1, [])
    assert last["rounds"][-1]["contenders"] == ["A"], "the load of the cut round is kept as well"
    book.calls.clear()
    book.measure({name: book.contender(name) for name in "ABC"}, 2)
    assert "".join(book.calls) == "BCABC"


def test_a_contender_that_fails_costs_nobody_else(capsys: pytest.CaptureFixture[str]) -> None:
    book = Book()
    able = {"A": book.contender("A", RuntimeError("no room")), "B": book.contender("B"), "C": "not installed"}
    book.measure(able, 2)
    assert "".join(book.calls) == "ABAB"
    assert [one["error"] for one in book.record["contenders"]["A"]["failures"]] == ["no room", "no room"]
    assert book.record["contenders"]["C"] == {"missing": "not installed"}
    assert "A FAILED in round 1: no room" in capsys.readouterr().out
