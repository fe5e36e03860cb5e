"""Workers of `pipefleet up` are spread over the devices of their pool: at the start, when resized, after deaths and moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipefleet.fleet.file import load_fleet
from pipefleet.fleet.pools import Pool, WorkerRange
from pipefleet_workers.fleet.local.autoscale import within_the_host
from pipefleet_workers.fleet.local.spread import devices_of, emptiest, misplaced, room_of, surplus
from tests.unit.fake_crew import FakeCrew, table

VECTORS = ("vectors", "b")
World = Callable[..., FakeCrew]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A started crew on a host with so many GPUs."""
    made: list[FakeCrew] = []

    def start(*tables: str, gpus: int, least: int = 1) -> FakeCrew:
        made.append(FakeCrew(tmp_path, *tables, least=least, gpus=gpus))
        made[-1].begin()
        return made[-1]

    yield start
    for one in made:
        one.stop()


def on(crew: FakeCrew, pool: str) -> dict[str | None, int]:
    """How many workers of a pool that stay are on each device, by what their processes were told."""
    found: Counter[str | None] = Counter()
    for worker in crew.crew.of(pool):
        assert worker.child is not None
        argv = list(worker.child.spec.argv)
        found[argv[argv.index("--device") + 1] if "--device" in argv else None] += 1
    return dict(found)


def gpus(*counts: int) -> dict[str, int]:
    return {f"cuda:{index}": count for index, count in enumerate(counts) if count}


def texts(*lines: str) -> str:
    return table("texts", "a", *lines)


def test_workers_without_a_device_of_their_own_are_spread_over_the_gpus(world: World) -> None:
    one = world(texts("workers = { min = 6, max = 6 }"), gpus=4)
    assert sorted(on(one, "texts").values()) == [1, 1, 2, 2]
    one.take(texts("workers = { min = 8, max = 8 }"))
    assert on(one, "texts") == gpus(2, 2, 2, 2)
    one.take(texts("workers = { min = 3, max = 8 }"))
    assert on(one, "texts") == gpus(1, 1, 1)


def test_two_pools_do_not_meet_on_one_gpu_while_another_is_empty(world: World) -> None:
    one = world(texts(), table(*VECTORS, task="feature-extraction"), gpus=2)
    assert on(one, "texts") == gpus(1)
    assert on(one, "vectors") == gpus(0, 1)


@pytest.mark.parametrize(("count", "line"), [(4, 'device = "cuda:1"'), (1, ""), (0, ""), (4, 'device_map = "auto"')])
def test_where_there_is_nothing_to_choose_workers_find_their_device_themselves(
    world: World, count: int, line: str
) -> None:
    one = world(texts("workers = { min = 2, max = 2 }", line), gpus=count)
    assert on(one, "texts") == {None: 2}


@pytest.mark.parametrize(
    ("lines", "count", "spread"),
    [
        (['devices = "all"'], 3, gpus(1, 1, 1)),
        (['devices = "all"', "workers_per_device = 2"], 2, gpus(2, 2)),
        (['devices = "all"'], 0, {"cpu": 1}),
        (["devices = 2"], 4, gpus(1, 1)),
        (['devices = ["cuda:0", "cuda:2"]', "workers_per_device = 2"], 4, {"cuda:0": 2, "cuda:2": 2}),
        (['devices = ["cpu"]', "workers_per_device = 3"], 4, {"cpu": 3}),
        # One host has room for four; the others of `workers` are for other hosts.
        (["devices = 4", "workers = { min = 8, max = 20 }"], 4, gpus(1, 1, 1, 1)),
    ],
)
def test_a_pool_with_devices_has_a_worker_for_each_place(
    world: World, lines: list[str], count: int, spread: dict[str, int]
) -> None:
    assert on(world(texts(*lines), gpus=count), "texts") == spread


def test_a_worker_that_ends_starts_again_on_its_device(world: World) -> None:
    one = world(texts("devices = 3"), gpus=3)
    victim = one.crew.of("texts")[1]
    one.kill(victim)
    one.step()
    one.steps_until(lambda: len(one.serving("texts")) == 3)
    assert on(one, "texts") == gpus(1, 1, 1)
    assert victim.device == "cuda:1"


def test_other_devices_in_the_file_move_only_the_workers_that_must(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    one = world(texts('devices = ["cuda:0", "cuda:1"]', "workers_per_device = 2"), gpus=4)
    before = set(one.pids("texts"))
    one.take(texts('devices = ["cuda:1", "cuda:2"]', "workers_per_device = 2"))
    assert on(one, "texts") == {"cuda:1": 2, "cuda:2": 2}
    assert len(before & set(one.pids("texts"))) == 2
    assert "2 of 4 workers move to other devices, by the fleet file" in capsys.readouterr().out
    one.take(texts('devices = ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]'))  # as many as before, one each
    assert on(one, "texts") == gpus(1, 1, 1, 1)
    one.take(texts("devices = 1"))
    assert on(one, "texts") == gpus(1)
    one.steps_until(lambda: len(list(one.crew)) == 1)


def test_a_roll_out_spreads_the_new_workers_like_the_old(world: World, tmp_path: Path) -> None:
    one = world(texts("devices = 2"), gpus=2)
    one.take(table("texts", "b", "devices = 2"))
    assert on(one, "texts") == gpus(1, 1)
    one.steps_until(lambda: one.serving("texts") == ["b", "b"] and not one.crew.replaced)


def test_under_an_autoscaler_workers_move_but_their_number_is_its_own(world: World) -> None:
    one = world(texts("devices = 4", "workers = { min = 2, max = 4 }"), gpus=4, least=0)
    assert on(one, "texts") == gpus(1, 1)
    for _ in range(2):
        one.crew.start("texts")
    assert on(one, "texts") == gpus(1, 1, 1, 1)
    one.take(texts('devices = ["cuda:0", "cuda:1"]', "workers_per_device = 2", "workers = { min = 2, max = 4 }"))
    assert on(one, "texts") == gpus(2, 2)
    one.take(texts("devices = 1", "workers = { min = 1, max = 4 }"))
    assert on(one, "texts") == gpus(1)


def test_an_autoscaler_on_one_host_wants_no_more_than_there_is_room_for(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(
        texts('devices = "all"', "workers_per_device = 2")
        + table("vectors", "b", "devices = 4", "workers = { min = 6, max = 20 }", task="feature-extraction")
        + table("pictures", "c", "workers = { min = 0, max = 9 }", task="image-classification")
    )
    fleet, limited = within_the_host(load_fleet(path, allow_unpinned=True), {"texts"}, lambda: 3)
    ranges = {name: pool.workers for name, pool in fleet.pools.items()}
    assert ranges == {"texts": WorkerRange(0, 6), "vectors": WorkerRange(4, 4), "pictures": WorkerRange(0, 9)}
    assert limited == {"texts", "vectors"}


@dataclass(frozen=True)
class One:
    name: str
    device: str | None


WORKERS = [One("a", "cuda:0"), One("b", "cuda:1"), One("c", "cuda:0"), One("d", "cuda:1"), One("e", "cuda:0")]


def test_the_fullest_device_gives_first_and_of_equals_the_first_in_order() -> None:
    assert [one.name for one in surplus(WORKERS, 3)] == ["a", "b", "c"]
    assert [one.name for one in surplus(WORKERS[::-1], 3)] == ["e", "d", "c"]
    assert surplus(WORKERS, 0) == []
    assert len(surplus(WORKERS, 5)) == 5


def test_the_emptiest_device_takes_first() -> None:
    devices = ("cuda:0", "cuda:1", "cuda:2")
    assert emptiest(devices, WORKERS, WORKERS) == "cuda:2"
    assert emptiest(devices[:2], WORKERS, WORKERS) == "cuda:1"
    assert emptiest(devices, [], WORKERS) == "cuda:2"
    assert emptiest((), [], WORKERS) is None


def test_who_is_elsewhere_or_too_many_has_to_move() -> None:
    assert [one.name for one in misplaced(WORKERS, ["cuda:0"], 2)] == ["b", "d", "e"]
    assert misplaced(WORKERS, ["cuda:0", "cuda:1"], 3) == []


def test_the_room_of_a_host() -> None:
    pool = Pool("texts", "text-classification", "/model", devices="all", workers_per_device=2)
    assert room_of(pool, lambda: 3) == 6
    assert room_of(pool, lambda: 0) == 2
    assert devices_of(pool, lambda: 0) == ("cpu",)
    assert room_of(Pool("texts", "text-classification", "/model"), lambda: 3) is None
