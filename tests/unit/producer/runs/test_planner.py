"""Planning a run: how shards grow, that memory does not, and that an interrupted plan goes on exactly."""

from __future__ import annotations

import itertools
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout, RunPlan, index_of
from pipefleet.contract.messages import CONTRACT_VERSION, JobItem, encode_json
from pipefleet.contract.references import split_uri
from pipefleet.contract.shards import (
    MEDIA_BYTES,
    TEXT_BYTES,
    ShardLimits,
    decode_shard_line,
    encode_shard_line,
    shard_id,
    shard_limits,
    shard_message,
)
from pipefleet.errors import ObjectMissingError, PipefleetError, RunError
from pipefleet.inputs.rows import SourceItem
from pipefleet.inputs.sources import Source, open_source
from pipefleet.queues.keys import run_key
from pipefleet.queues.looking import queued_ids
from pipefleet.runs.planner import Planner, SignOfLife, planner_alive, read_plan, write_plan
from pipefleet.storage.store import ListedObject
from pipefleet.tasks import TASKS
from tests.unit.conftest import eventually

LAYOUT = RunLayout.at("s3://out/run")
QUEUE = "pipefleet.text-classification"


def plan(**changes: Any) -> RunPlan:
    values: dict[str, Any] = {
        "id": "run1", "task": "text-classification", "model": "/models/texts", "revision": None, "parameters": {"top_k": 2},
        "source": None, "queue": QUEUE, "format": "jsonl", "shard_size": None, "created": 1.0,
        "contract_version": CONTRACT_VERSION,
    }  # fmt: skip
    return RunPlan(**{**values, **changes})


class MemoryStore:
    """Objects in a dict, with the methods that planning uses; `keep` drops the bodies of shards to measure the planner."""

    def __init__(self, *, keep: bool = True) -> None:
        self.objects: dict[str, bytes] = {}
        self.keep = keep

    def put_new(self, uri: str, body: bytes, **_: Any) -> bool:
        if uri in self.objects:
            return False
        self.objects[uri] = body if self.keep else b""
        return True

    def get(self, uri: str, *, max_bytes: int | None = None) -> bytes:
        if uri not in self.objects:
            raise ObjectMissingError(uri)
        return self.objects[uri]

    def head(self, uri: str) -> bytes | None:
        return self.objects.get(uri)

    def list(self, uri: str) -> Iterator[ListedObject]:
        for found in sorted(one for one in self.objects if one.startswith(uri)):
            yield ListedObject(split_uri(found)[1], 0, "")

    def lines(self, uri: str, *, max_bytes: int | None = None) -> Iterator[bytes]:
        yield from self.objects[uri].splitlines()


class MarkedRedis:
    """A Redis that knows of the run, whose parts are not counted."""

    def ignore(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is kept."""

    set = hget = hset = hdel = expire = delete = hmget = ignore

    def bitcount(self, key: str) -> int:
        return 0

    def hlen(self, key: str) -> int:
        return 0

    def hgetall(self, key: str) -> dict[bytes, bytes]:
        return {}

    def time(self) -> tuple[int, int]:
        return 2, 0

    def pipeline(self, *, transaction: bool) -> MarkedRedis:
        return self

    def execute(self) -> list[Any]:
        return [[b"1", None, None, None], 0, 0]


class Published:
    """Stands for the client: counts messages and keeps those of the last shards only."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.now = lambda: 2.0
        self.settings = SimpleNamespace(redis_url="redis://", run_ttl=1.0, outstanding_shards=1 << 30)
        self.redis = MarkedRedis()
        self.shards: list[tuple[int, int, int]] = []

    def publish(self, messages: Iterable[Any], queue: str, priority: Any) -> None:
        self.shards.extend((one.shard.index, one.shard.first, one.shard.count) for one in messages)


class Numbers:
    """A source of `count` numbered texts of `size` bytes each."""

    def __init__(self, count: int, size: int = 10, inputs: Any = "text") -> None:
        self.count, self.size, self.inputs = count, size, inputs

    def describe(self) -> None:
        return

    def check(self) -> None:
        return

    def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
        return (SourceItem(None, self.inputs, self.size) for _ in range(skip, self.count))


def planned(source: Any, *, keep: bool = True, **changes: Any) -> Published:
    client = Published(MemoryStore(keep=keep))
    Planner(cast(Client, client), LAYOUT, plan(**changes), cast(Source, source)).run()
    return client


class TestShards:
    def test_they_double_every_eight_up_to_512(self) -> None:
        sizes = [shard_limits(index, None, media=False).items for index in range(60)]
        assert sizes == [16] * 8 + [32] * 8 + [64] * 8 + [128] * 8 + [256] * 8 + [512] * 20
        assert shard_limits(10**9, None, media=False).items == 512

    def test_a_size_of_the_users_own_fixes_the_count_but_not_the_bytes(self) -> None:
        assert {shard_limits(index, 7, media=True) for index in range(99)} == {ShardLimits(7, MEDIA_BYTES)}
        assert shard_limits(0, 7, media=False).size == TEXT_BYTES

    @given(st.lists(st.integers(0, 2 * TEXT_BYTES), max_size=80), st.none() | st.integers(1, 9))
    def test_every_item_is_in_one_shard_in_order_and_within_the_bounds(
        self, sizes: list[int], shard_size: int | None
    ) -> None:
        class Sized(Numbers):
            def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
                return (SourceItem(str(position), "x", size) for position, size in enumerate(sizes))

        client = planned(Sized(0), shard_size=shard_size)
        ids = []
        for number, (index, first, count) in enumerate(client.shards):
            limits = shard_limits(index, shard_size, media=False)
            assert (index, first) == (number, len(ids))
            assert 1 <= count <= limits.items
            assert count == 1 or sum(sizes[first : first + count]) <= limits.size
            lines = [decode_shard_line(line) for line in client.store.lines(LAYOUT.shard(index))]
            assert [position for position, *_ in lines] == list(range(first, first + count))
            ids += [item.id for _, item, _ in lines]
        assert ids == [str(position) for position in range(len(sizes))]

    def test_media_may_weigh_more_than_texts(self) -> None:
        media = planned(Numbers(16, size=TEXT_BYTES, inputs={"$ref": "s3://media/a"}))
        texts = planned(Numbers(16, size=TEXT_BYTES))
        assert (len(media.shards), len(texts.shards)) == (1, 16)

    def test_a_line_of_a_shard_survives(self) -> None:
        item = JobItem("a", {"$ref": "s3://media/ü b.txt"}, {"top_k": 1})
        assert decode_shard_line(encode_shard_line(7, item).encode()) == (7, item, None)
        assert encode_shard_line(7, item, written=encode_json(item.inputs)) == encode_shard_line(7, item)

    def test_the_same_shard_has_the_same_job_id_whoever_queues_it(self) -> None:
        message = shard_message(plan(), LAYOUT, 7, 112, 16)
        assert message == shard_message(plan(), LAYOUT, 7, 112, 16)
        assert message.id == shard_id("run1", 7) == "run1-00007"
        assert message.shard is not None
        assert message.shard.uri == "s3://out/run/_run/shards/00007.jsonl"
        assert (message.parameters, message.cost, message.items) == ({"top_k": 2}, 16.0, ())

    @pytest.mark.parametrize("index", [0, 99_999, 100_000, 12_345_678])
    def test_the_number_of_a_shard_is_read_from_its_name(self, index: int) -> None:
        assert (
            index_of(LAYOUT.shard(index))
            == index_of(LAYOUT.part(index))
            == index_of(LAYOUT.failed_shard(index))
            == index
        )
        assert index_of("s3://out/run/_run/run.json") is None


def test_a_plan_ends_with_its_totals() -> None:
    client = planned(Numbers(50))
    totals = RunPlan.from_json(json.loads(client.store.objects[LAYOUT.run]), LAYOUT.run)
    assert (totals.shards, totals.items) == (4, 50)
    assert totals == plan(shards=4, items=50)
    with pytest.raises(RunError, match="was not written by this version"):
        RunPlan.from_json({**totals.to_json(), "later": 1}, LAYOUT.run)
    with pytest.raises(RunError, match=r"run\.json follows contract version 2, this is version 1; use the release"):
        RunPlan.from_json({**totals.to_json(), "contract_version": 2}, LAYOUT.run)


def test_memory_does_not_grow_with_the_source() -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        planned(Numbers(count), keep=False, shard_size=100)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(1_000)  # what is imported or cached once is no part of it
    small, large = peak(10_000), peak(200_000)
    names_and_counts = 2_000 * 400  # what the stand-ins here remember of a shard, and nothing of an item
    assert large < small + names_and_counts


class Stop(Exception):
    """The source breaks off."""


def broken_off(values: Iterable[str], after: int) -> Iterator[str]:
    yield from itertools.islice(values, after)
    raise Stop


def shards_of(client: Client, layout: RunLayout) -> list[list[tuple[int, JobItem]]]:
    return [
        [decode_shard_line(line)[:2] for line in client.store.lines(layout.shard(index))]
        for index, _ in enumerate(client.store.list(layout.shards))
    ]


class TestInterrupted:
    TEXTS = [f"text {number}" for number in range(100)]

    @pytest.mark.parametrize("after", [17, 48, 99])
    def test_a_run_of_an_iterable_goes_on_with_the_same_call(
        self, client: Client, prefix: str, after: int, queued: Callable[[str], list[str]]
    ) -> None:
        first = client.map("text-classification", broken_off(self.TEXTS, after), output=prefix)
        first.join_planner()
        with pytest.raises(RunError, match="the source raised Stop"):
            first.wait(timeout=30)
        written = shards_of(client, RunLayout.at(prefix))
        assert {len(shard) for shard in written} == {16}
        assert after - 16 <= 16 * len(written) <= after
        client.redis.flushall()

        second = client.map("text-classification", self.TEXTS, output=prefix)
        second.join_planner()
        every = shards_of(client, RunLayout.at(prefix))
        assert every[: len(written)] == written
        assert [position for shard in every for position, _ in shard] == list(range(100))
        assert [item.inputs for shard in every for _, item in shard] == self.TEXTS
        assert second.id == first.id
        assert sorted(queued(QUEUE)) == [shard_id(first.id, index) for index in range(len(every))]
        assert (second.plan.shards, second.plan.items) == (len(every), 100)

    def test_a_run_of_a_prefix_goes_on_from_its_output_alone(
        self, client: Client, prefix: str, queued: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.runs.planner.ALIVE_SECONDS", 1.0)
        for number in range(40):
            client.store.put(f"{prefix}in/{number:02d}.txt", b"x")
        layout = RunLayout.at(prefix + "out/")
        begun = write_plan(client, layout, plan(source=prefix + "in/", shard_size=7))
        spec = TASKS["text-classification"]
        source = open_source(prefix + "in/", spec, client.store, client.preparer(spec), output=layout.uri)
        planner = Planner(client, layout, begun, source)
        assert [planner.step() for _ in range(3)] == [True] * 3
        client.redis.flushall()

        run = client.run(layout.uri)
        assert run.progress().state == "stopped"
        assert run.resume() == 3  # what Redis forgot
        run.join_planner()
        every = shards_of(client, layout)
        assert [item.id for shard in every for _, item in shard] == [
            f"{split_uri(prefix)[1]}in/{number:02d}.txt" for number in range(40)
        ]
        assert [position for shard in every for position, _ in shard] == list(range(40))
        assert sorted(queued(QUEUE)) == [shard_id(run.id, index) for index in range(6)]
        assert (run.plan.shards, run.plan.items) == (6, 40)

    def test_a_client_that_came_second_and_gives_up_leaves_the_first_ones_sign_of_life(
        self, client: Client, prefix: str
    ) -> None:
        layout = RunLayout.at(prefix)
        looked, ended = threading.Event(), threading.Event()

        def first() -> Iterator[str]:
            yield "a"
            assert looked.wait(20)
            yield "b"
            assert ended.wait(20)
            yield "c"

        def second() -> Iterator[str]:
            yield "a"
            looked.set()
            assert eventually(lambda: client.store.head(layout.shard(1)) is not None)
            yield "b"

        run = client.map("text-classification", first(), output=prefix, shard_size=1)
        try:
            with Client() as other, pytest.raises(RunError, match="another client plans"):
                other.map("text-classification", second(), output=prefix, shard_size=1)
            assert client.run(prefix).progress().state == "planning"
        finally:
            ended.set()
        run.join_planner()
        assert run.plan.shards == 3
        assert planner_alive(client, run.plan) is None

    def test_a_gap_among_the_shards_is_not_planned_over(self) -> None:
        client = Published(MemoryStore())
        client.store.put_new(LAYOUT.shard(1), (encode_shard_line(16, JobItem("16", "x")) + "\n").encode())
        with pytest.raises(RunError, match="shards are missing before"):
            Planner(cast(Client, client), LAYOUT, plan(), cast(Source, Numbers(40))).run()

    def test_two_planners_of_one_run_do_not_mix(self) -> None:
        client = Published(MemoryStore())
        one, two = (Planner(cast(Client, client), LAYOUT, plan(), cast(Source, Numbers(40))) for _ in range(2))
        assert one.step()
        assert two.step()  # takes up behind the first shard
        with pytest.raises(RunError, match="another client plans the run at s3://out/run/"):
            one.step()


class TestPlanFile:
    def test_a_second_run_at_the_same_output_is_refused(self, client: Client, prefix: str) -> None:
        client.map("text-classification", ["a"], output=prefix).join_planner()
        with pytest.raises(RunError, match=f"there is a run at {prefix} already.*pipefleet resume {prefix}"):
            client.map("text-classification", ["a"], output=prefix, parameters={"top_k": 1})
        with pytest.raises(RunError, match="already"):
            client.map("image-classification", [b"a"], output=prefix)

    def test_only_the_same_plan_is_gone_on_with(self, client: Client, prefix: str) -> None:
        layout = RunLayout.at(prefix)
        first = write_plan(client, layout, plan(id="first"))
        assert write_plan(client, layout, plan(id="second", created=9.0)) == first
        with pytest.raises(RunError, match="already"):
            write_plan(client, layout, plan(id="third", shard_size=3))
        assert read_plan(client.store, layout) == first

    def test_totals_win_over_the_first_plan(self, client: Client, prefix: str) -> None:
        layout = RunLayout.at(prefix)
        with pytest.raises(RunError, match=f"there is no run at {prefix}"):
            read_plan(client.store, layout)
        write_plan(client, layout, plan())
        client.store.put(layout.run, encode_json(plan(shards=1, items=2).to_json()).encode())
        assert read_plan(client.store, layout).items == 2

    def test_a_refused_source_leaves_nothing_behind(self, client: Client, prefix: str) -> None:
        for source in (prefix + "in/", [3]):
            with pytest.raises(PipefleetError):
                client.map("text-classification", source, output=prefix + "out/", strict=True)
        assert list(client.store.list(prefix + "out/")) == []


def test_a_live_planner_is_seen_by_others(client: Client) -> None:
    assert planner_alive(client, plan()) is None
    client.redis.set(run_key("run1", "planner"), "48 3")
    assert planner_alive(client, plan()) == SignOfLife(48, 3)


def test_a_planner_waits_for_the_fleet_and_goes_on_when_it_has_caught_up(
    environment: dict[str, str], client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPEFLEET_OUTSTANDING_SHARDS", "3")
    monkeypatch.setattr("pipefleet.runs.planner.HELD_BACK_SECONDS", 0.05)
    with Client() as bounded:
        run = bounded.map("text-classification", (str(i) for i in range(10)), output=prefix, shard_size=1)
        queue = run.plan.queue
        assert eventually(lambda: len(list(queued_ids(client.redis, queue))) == 3)
        assert eventually(lambda: run.progress().shards == 3)
        for index in range(10):
            assert eventually(lambda index=index: len(list(queued_ids(client.redis, queue))) >= min(10, index + 3))
            client.redis.setbit(run_key(run.id, "parts"), index, 1)
        run.join_planner()
        assert run.plan.shards == 10
