"""The micro-batcher: what must hold for any units, arrivals and limits, and that nothing starves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipefleet.contract.messages import JobItem
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.batcher import BatchLimits, MicroBatcher
from pipefleet_workers.items import Assembly, Batch, JobContext, Unit, Work

KEYS = ("short labels", ("nested", 1), ("nested", 2))
PRIORITIES = (0, 3, 9)

# Either a slice of units to add (length, key, priority), or a number of seconds that pass before a batch is taken.
_UNITS = st.tuples(st.integers(1, 60), st.sampled_from(KEYS), st.sampled_from(PRIORITIES))
_SLICES = st.lists(_UNITS, min_size=1, max_size=12)
_STEPS = st.lists(st.one_of(_SLICES, st.integers(0, 400).map(lambda hundredths: hundredths / 100)), max_size=60)
_LIMITS = st.builds(BatchLimits, st.integers(1, 120), st.integers(1, 9), st.sampled_from((0.5, 3.0, 1_000_000.0)))


def unit(length: int, key: Any = "one", priority: int = 3) -> Unit:
    context = JobContext("job", None, {}, priority, None, Outcomes(range(1)))
    return Unit(Assembly(Work(context, 0, JobItem("0", ""), {}, 1), expected=1), 0, key, length, None)


def check_batch(batch: Batch, held: Sequence[Unit], now: float, limits: BatchLimits, *, after_aged: bool) -> bool:
    """What must be true of every batch, given the units that were held when it was taken at `now`.

    `after_aged` tells that the batch before was taken for its age; returns whether this one was.
    """
    assert batch.units
    identities = [id(one) for one in batch.units]
    assert len(set(identities)) == len(identities)
    assert set(identities) <= {id(one) for one in held}, "a batch holds a unit that was not waiting"
    assert {one.key for one in batch.units} == {batch.key}
    assert len(batch.units) <= limits.max_items
    assert batch.cost <= limits.max_cost or len(batch.units) == 1
    oldest = min(held, key=lambda one: one.created)
    aged = [one for one in held if one.created == oldest.created]
    most_urgent = min(one.priority for one in held)
    takes_turns = after_aged and most_urgent < max(one.priority for one in aged)
    if now - oldest.created > limits.max_age and not takes_turns:
        assert min(one.created for one in batch.units) == oldest.created, "an aged unit was passed over"
        return True
    holds_aged = min(one.created for one in batch.units) == oldest.created
    assert holds_aged or min(one.priority for one in batch.units) == most_urgent
    return holds_aged and now - oldest.created > limits.max_age


def drive(steps: Sequence[Any], limits: BatchLimits) -> tuple[list[Unit], list[Unit]]:
    """Units that were added and units that came out, in the order of the steps; everything is taken at the end."""
    batcher, now = MicroBatcher(limits), 0.0
    added: list[Unit] = []
    held: list[Unit] = []
    out: list[Unit] = []
    after_aged = False

    def take() -> None:
        nonlocal after_aged
        batch = batcher.take(now)
        assert (batch is None) == (not held), "work-conserving: a batch whenever there is a unit"
        if batch is not None:
            after_aged = check_batch(batch, held, now, limits, after_aged=after_aged)
            gone = {id(one) for one in batch.units}
            held[:] = [one for one in held if id(one) not in gone]
            out.extend(batch.units)
        assert len(batcher) == len(held)

    for step in steps:
        if isinstance(step, float):
            now += step
            take()
        else:
            units = [unit(*one) for one in step]
            added += units
            held += units
            batcher.add(units, now)
    while held:
        take()
    assert batcher.take(now) is None
    return added, out


@settings(max_examples=300, deadline=None)
@given(_STEPS, _LIMITS)
def test_every_unit_comes_out_once_in_batches_within_the_limits(steps: list[Any], limits: BatchLimits) -> None:
    added, out = drive(steps, limits)
    assert sorted(map(id, added)) == sorted(map(id, out))


class PlainBatcher:
    """The rules of the batcher once more, as plainly as they can be written: every batch looks at every unit."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._groups: dict[Any, list[Unit]] = {}
        self._below: dict[Any, float] = {}
        self._served_aged = False

    def add(self, units: Sequence[Unit]) -> None:
        for one in units:
            group = self._groups.setdefault(one.key, [])
            group.insert(sum(other.length <= one.length for other in group), one)

    def take(self, now: float) -> list[Unit]:
        held = [one for group in self._groups.values() for one in group]
        urgent = min(one.priority for one in held)
        oldest = max(held, key=lambda one: now - one.created)
        aged = now - oldest.created > self._limits.max_age
        self._served_aged = aged and not (self._served_aged and urgent < oldest.priority)
        first = oldest if self._served_aged else self._longest(urgent)
        batch = self._around(self._groups[first.key], first)
        self._groups[first.key] = [one for one in self._groups[first.key] if not any(one is gone for gone in batch)]
        self._below[first.key] = batch[0].length
        if not self._groups[first.key]:
            del self._groups[first.key], self._below[first.key]
        return batch

    def _longest(self, urgent: int) -> Unit:
        most = [key for key, group in self._groups.items() if min(one.priority for one in group) == urgent]
        key = max(most, key=lambda one: sum(each.length for each in self._groups[one]))
        urgents = [one for one in self._groups[key] if one.priority == urgent]
        below = [one for one in urgents if one.length <= self._below.get(key, float("inf"))]
        return (below or urgents)[-1]

    def _around(self, group: list[Unit], first: Unit) -> list[Unit]:
        low = next(index for index, one in enumerate(group) if one is first)
        high = low + 1
        while low > 0 and self._fits(group[low - 1 : high]):
            low -= 1
        while high < len(group) and self._fits(group[low : high + 1]):
            high += 1
        return group[low:high]

    def _fits(self, units: list[Unit]) -> bool:
        return len(units) <= self._limits.max_items and Batch(units[0].key, units).cost <= self._limits.max_cost


@settings(max_examples=300, deadline=None)
@given(_STEPS, _LIMITS)
def test_the_batches_are_those_of_the_plain_rules(steps: list[Any], limits: BatchLimits) -> None:
    batcher, plain, now = MicroBatcher(limits), PlainBatcher(limits), 0.0

    def take() -> None:
        batch = batcher.take(now)
        assert batch is not None
        assert list(map(id, batch.units)) == list(map(id, plain.take(now)))

    for step in steps:
        if not isinstance(step, float):
            units = [unit(*one) for one in step]
            batcher.add(units, now)
            plain.add(units)
            continue
        now += step
        if len(batcher):
            take()
    while len(batcher):
        take()


def test_a_unit_above_the_cost_goes_alone() -> None:
    batcher = MicroBatcher(BatchLimits(max_cost=10, max_items=8))
    for length in (50, 1, 60, 2):
        batcher.add([unit(length)], 0.0)
    batches = [batcher.take(0.0) for _ in range(3)]
    lengths = [sorted(one.length for one in batch.units) for batch in batches if batch is not None]
    assert sorted(lengths) == [[1, 2], [50], [60]]


def test_work_that_arrives_late_but_urgent_passes_bulk() -> None:
    batcher = MicroBatcher(BatchLimits(max_cost=100, max_items=4))
    for _ in range(50):
        batcher.add([unit(20, "bulk", priority=9)], 0.0)
    batcher.add([unit(1, "interactive", priority=0)], 5.0)
    batch = batcher.take(5.0)
    assert batch is not None
    assert batch.key == "interactive"


def test_the_key_with_the_most_work_goes_first() -> None:
    batcher = MicroBatcher(BatchLimits(max_cost=1000, max_items=8))
    batcher.add([unit(30, "little")], 0.0)
    for _ in range(5):
        batcher.add([unit(10, "much")], 0.0)
    batch = batcher.take(0.0)
    assert batch is not None
    assert (batch.key, len(batch.units)) == ("much", 5)


def _takes_until_served(victim: Unit, flood: Sequence[tuple[int, Any, int]], *, ahead: int) -> tuple[int, float]:
    """How many batches go before the victim's, and its age then, while each taken batch is replaced by a flood."""
    limits = BatchLimits(max_cost=64, max_items=8, max_age=10.0)
    batcher, now = MicroBatcher(limits), 0.0
    for index in range(ahead):
        batcher.add([unit(*flood[index % len(flood)])], now)
    batcher.add([victim], now)
    for count in range(1000):
        now += 1.0
        for one in flood:
            batcher.add([unit(*one)], now)
        batch = batcher.take(now)
        assert batch is not None
        if any(one is victim for one in batch.units):
            return count, now
    raise AssertionError("the victim was not served in 1000 batches")


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 64), st.sampled_from(("own", "flood")), st.sampled_from(PRIORITIES)),
    st.lists(st.tuples(st.integers(1, 64), st.just("flood"), st.sampled_from(PRIORITIES)), min_size=8, max_size=12),
    st.integers(0, 20),
)
def test_nothing_starves_under_a_flood(
    victim: tuple[int, Any, int], flood: list[tuple[int, Any, int]], ahead: int
) -> None:
    """The flood brings more units a second than one batch takes: long ones, urgent ones, of another key."""
    takes, age = _takes_until_served(unit(*victim), flood, ahead=ahead)
    assert takes <= 10 + 2 * (ahead + 1), (
        "once the victim is over age, only older units and every second batch go first"
    )
    assert age <= 10.0 + 2 * (ahead + 1) + 1


def _padded(batches: Sequence[Sequence[int]]) -> int:
    return sum(max(batch) * len(batch) for batch in batches)


def _in_arrival_order(lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    batches: list[list[int]] = []
    for length in lengths:
        last = [*batches[-1], length] if batches else []
        if last and len(last) <= limits.max_items and max(last) * len(last) <= limits.max_cost:
            batches[-1] = last
        else:
            batches.append([length])
    return batches


@pytest.mark.parametrize(("max_cost", "window"), [(2048, 256), (2048, 512), (8192, 512)])
def test_ragged_lengths_are_padded_far_less_than_in_arrival_order(max_cost: int, window: int) -> None:
    rng = random.Random(7)
    lengths = [max(1, min(512, int(rng.lognormvariate(3.5, 1.0)))) for _ in range(8192)]
    limits = BatchLimits(max_cost, 64)
    batcher, batches = MicroBatcher(limits), []
    waiting = iter(lengths)
    for _ in range(window):
        batcher.add([unit(next(waiting))], 0.0)
    while (batch := batcher.take(0.0)) is not None:
        batches.append([one.length for one in batch.units])
        for _, length in zip(batch.units, waiting, strict=False):
            batcher.add([unit(length)], 0.0)
    assert sum(map(len, batches)) == len(lengths)
    waste = _padded(batches) / sum(lengths) - 1
    arrival = _padded(_in_arrival_order(lengths, limits)) / sum(lengths) - 1
    assert waste < 0.3, f"waste {waste:.2f}, in arrival order {arrival:.2f}"


def test_none_is_a_key_like_any_other() -> None:
    batcher = MicroBatcher(BatchLimits(10, 1, max_age=1.0))
    batcher.add([unit(1, None)], 0.0)
    batcher.add([unit(1, "late")], 9.0)
    batch = batcher.take(9.0)
    assert batch is not None
    assert batch.key is None


def test_interactive_work_passes_bulk_that_has_waited_long() -> None:
    batcher, now = MicroBatcher(BatchLimits(100, 4, max_age=10.0)), 0.0
    for _ in range(500):
        batcher.add([unit(20, "bulk", priority=9)], now)
    now = 11.0
    urgent = unit(20, "interactive", priority=0)
    batcher.add([urgent], now)
    for _taken in range(500):
        batch = batcher.take(now)
        assert batch is not None
        now += 2.0
        if any(one is urgent for one in batch.units):
            break
    assert _taken <= 3, f"{_taken} batches of bulk went first, {now - 11.0:.0f} s"


def test_a_bound_of_the_caller_cuts_the_batch_or_leaves_its_unit_where_it_is() -> None:
    batcher = MicroBatcher(BatchLimits(1000, 9))
    for length in (5, 6, 7):
        batcher.add([unit(length, "one")], 0.0)
    batcher.add([unit(4, "urgent", priority=0)], 0.0)
    assert batcher.take(1.0, lambda one: 0 if one.key == "urgent" else 9) is None, "the urgent one stays first"
    assert len(batcher) == 4
    bounded = [batcher.take(1.0, lambda one: 2) for _ in range(3)]
    assert [sorted(one.length for one in batch.units) for batch in bounded if batch] == [[4], [6, 7], [5]]
    assert batcher.take(1.0, lambda one: 2) is None
