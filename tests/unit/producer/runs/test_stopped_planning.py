"""Items that cannot be prepared, and planning that ends before its source: what every client says of the run."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import JobItem
from pipefleet.contract.records import JobFailure
from pipefleet.contract.shards import decode_shard_line
from pipefleet.errors import InputError, ManifestError, RunError, ServiceUnavailableError
from pipefleet.queues.keys import run_key
from pipefleet.runs.run import Run
from pipefleet.storage.store import ObjectStore
from tests.unit.conftest import eventually

TEXTS = "text-classification"


def lines(client: Client, run: Run) -> list[tuple[int, JobItem, JobFailure | None]]:
    layout = RunLayout.at(run.uri)
    return [
        decode_shard_line(line)
        for index, _ in enumerate(client.store.list(layout.shards))
        for line in client.store.lines(layout.shard(index))
    ]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sees no planner in a Redis that was emptied waits for less."""
    monkeypatch.setattr("pipefleet.runs.planner.ALIVE_SECONDS", 1.0)


class TestItems:
    def test_one_that_cannot_be_prepared_fails_alone_and_in_its_place(self, client: Client, prefix: str) -> None:
        values = ["a", None, {"inputs": 3, "id": "three"}, {"inputs": "b", "parameters": {"topk": 1}}, "c"]
        run = client.map(TEXTS, iter(values), output=prefix, shard_size=2)
        run.join_planner()
        assert (run.plan.items, run.plan.shards, run.progress().state) == (5, 3, "running")
        found = lines(client, run)
        assert [item.inputs for _, item, _ in found] == ["a", None, 3, "b", "c"]
        assert [item.id for _, item, _ in found] == ["0", "1", "three", "3", "4"]
        failures = [failure for _, _, failure in found]
        assert [one and (one.code, one.stage) for one in failures] == [
            None, ("bad_input", "plan"), ("bad_input", "plan"), ("bad_input", "plan"), None,
        ]  # fmt: skip
        messages = [one.message for one in failures if one]
        assert messages[0].startswith("row 2: text-classification takes texts")
        assert messages[1].startswith("row 3 (id 'three'): ")
        assert messages[2].startswith("row 4: ")
        assert "did you mean 'top_k'" in messages[2]

    def test_a_folder_whose_file_cannot_be_read_goes_on(
        self, client: Client, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            (folder / name).write_bytes(name.encode())
        whole = Path.read_bytes

        def read(path: Path) -> bytes:
            if path.name == "b.jpg":
                raise PermissionError(13, "Permission denied")
            return whole(path)

        monkeypatch.setattr(Path, "read_bytes", read)
        run = client.map("image-classification", str(folder), output=prefix)
        run.join_planner()
        assert [(item.id, failure is None) for _, item, failure in lines(client, run)] == [
            ("a.jpg", True), ("b.jpg", False), ("c.jpg", True),
        ]  # fmt: skip

    def test_it_goes_on_behind_one_that_failed(self, client: Client, prefix: str) -> None:
        values = ["a", None, "b", None, "c", "d"]
        broken = itertools.chain(values[:4], (int(one) for one in "x"))
        first = client.map(TEXTS, broken, output=prefix, shard_size=2)
        first.join_planner()
        second = client.map(TEXTS, values, output=prefix, shard_size=2)
        second.join_planner()
        found = lines(client, second)
        assert [item.inputs for _, item, _ in found] == values
        assert [failure is None for _, _, failure in found] == [True, False, True, False, True, True]
        assert second.progress().state == "running"


class TestStrict:
    def test_it_ends_in_the_first_shard_and_leaves_nothing_behind(self, client: Client, prefix: str) -> None:
        with pytest.raises(InputError, match="row 2: text-classification takes texts"):
            client.map(TEXTS, ["a", None], output=prefix, strict=True)
        assert list(client.store.list(prefix)) == []
        assert client.redis.keys("*run*") == []

    def test_in_a_later_one_every_client_says_why_planning_ended(
        self, client: Client, prefix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = client.map(
            TEXTS, ["a", "b", "c", {"inputs": None, "id": "x"}, "e"], output=prefix, shard_size=2, strict=True
        )
        run.join_planner()
        reason = r"row 4 \(id 'x'\): text-classification takes"
        with pytest.raises(InputError, match=reason):
            run.wait(timeout=20)
        with Client() as other:
            seen = other.run(prefix)
            assert seen.progress().state == "stopped"
            assert not seen.progress().ended
            with pytest.raises(RunError, match=rf"has stopped: {reason}.*pipefleet resume"):
                seen.wait(timeout=20)
            with pytest.raises(RunError, match="iterable that ended with its client"):
                seen.resume()
        assert main(["status", prefix, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["state"] == "stopped"
        assert document["reason"].startswith("row 4 (id 'x')")
        assert main(["status", prefix]) == 0
        assert "row 4 (id 'x'): text-classification takes" in capsys.readouterr().out

    def test_a_manifest_is_refused_before_anything_is_written(self, client: Client, prefix: str) -> None:
        client.store.put(prefix + "m.jsonl", b'{"inputs": "a"}\n{"inputs": null}\n')
        with pytest.raises(ManifestError, match=r"line 2, column 1: .*NoneType"):
            client.map(TEXTS, prefix + "m.jsonl", output=prefix + "out/", strict=True)
        assert list(client.store.list(prefix + "out/")) == []
        run = client.map(TEXTS, prefix + "m.jsonl", output=prefix + "out/")
        run.join_planner()
        assert [failure is None for _, _, failure in lines(client, run)] == [True, False]

    def test_a_run_stays_strict_for_whoever_goes_on_with_it(self, client: Client, prefix: str) -> None:
        run = client.map(TEXTS, ["a"], output=prefix, strict=True)
        run.join_planner()
        assert client.run(prefix).plan.strict
        assert "strict" not in json.loads(client.store.get(client_plan(client, prefix + "other/")))


def client_plan(client: Client, uri: str) -> str:
    client.map(TEXTS, ["a"], output=uri).join_planner()
    return RunLayout.at(uri).plan


class TestStopped:
    def test_what_the_source_raised_is_kept_until_somebody_goes_on(self, client: Client, prefix: str) -> None:
        def broken() -> Iterator[str]:
            yield from "abc"
            raise ValueError("no more")

        client.map(TEXTS, broken(), output=prefix, shard_size=2).join_planner()
        with Client() as other:
            assert other.run(prefix).progress().reason == "the source raised ValueError: no more"
        again = client.map(TEXTS, list("abcd"), output=prefix, shard_size=2)
        again.join_planner()
        assert client.store.head(RunLayout.at(prefix).stopped) is None
        with Client() as other:
            assert other.run(prefix).progress().state == "running"

    def test_resume_goes_on_after_an_outage_that_ended_the_planning(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(6):
            client.store.put(f"{prefix}in/{number}.txt", b"x")
        monkeypatch.setattr("pipefleet.runs.planner.PATIENCE_SECONDS", 0.0)
        page = ObjectStore._page

        def away(self: ObjectStore, request: dict[str, object]) -> object:
            if "ContinuationToken" in request:
                raise ServiceUnavailableError("S3 is away")
            return page(self, {**request, "MaxKeys": 2})

        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "_page", away)
            run = client.map(TEXTS, prefix + "in/", output=prefix + "out/", shard_size=2)
            run.join_planner()
            with pytest.raises(ServiceUnavailableError, match="S3 is away"):
                run.wait(timeout=20)
        with Client() as other:
            seen = other.run(run.uri)
            assert (seen.progress().state, seen.progress().reason) == ("stopped", "S3 is away")
            assert seen.resume() == 0
            seen.join_planner()
            assert (seen.progress().state, seen.plan.items) == ("running", 6)
        assert client.store.head(RunLayout.at(run.uri).stopped) is None

    @pytest.mark.usefixtures("soon")
    def test_a_planner_is_not_taken_for_dead_because_redis_was_emptied(self, client: Client, prefix: str) -> None:
        hold = threading.Event()

        def source() -> Iterator[str]:
            yield from "ab"
            hold.wait(60)

        run = client.map(TEXTS, source(), output=prefix, shard_size=2)
        with Client() as other:
            client.redis.flushall()
            assert other.run(prefix).progress().state == "planning"
        hold.set()
        run.join_planner()

    def test_a_cancelled_run_stops_a_planner_elsewhere(self, client: Client, prefix: str) -> None:
        run = client.map(TEXTS, (f"text {number}" for number in itertools.count()), output=prefix, shard_size=2)
        with Client() as other:
            other.run(prefix).cancel()
        assert eventually(lambda: not run.planning)
        assert run.progress().state == "cancelled"
        assert client.redis.exists(run_key(run.id, "planner")) == 0
