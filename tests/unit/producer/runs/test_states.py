"""The states of runs and the exit codes that follow: failed, cancelled, timed out; and what is named is there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import encode_json
from pipefleet.contract.parts import FORMATS, writable_formats
from pipefleet.errors import ContractError, ResultTimeoutError, RunError, UsageError
from pipefleet.fleet.announcements import announce_worker
from pipefleet.fleet.routing import revision_queue
from pipefleet.queues.keys import WORKERS_KEY, run_key
from pipefleet.runs.run import Run
from pipefleet_workers.build import Undertaker
from pipefleet_workers.consume import shards as shards_module
from pipefleet_workers.consume.shards import ElsewhereError
from tests.unit.conftest import eventually
from tests.unit.shard_worker import ShardWorker, read

TEXTS = "text-classification"
QUEUE = f"pipefleet.{TEXTS}"


@pytest.fixture
def worker(client: Client) -> ShardWorker:
    return ShardWorker(client, QUEUE)


def planned(client: Client, prefix: str, **options: Any) -> Run:
    run = client.map(TEXTS, ["a", "b", "c", "d"], output=prefix, shard_size=2, **options)
    run.join_planner()
    return run


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("bad", "state", "code"), [([], "succeeded", 0), ([1], "partial", 1), ([0, 1, 2, 3], "failed", 1)]
)
def test_a_run_is_called_what_its_items_became(
    client: Client,
    prefix: str,
    worker: ShardWorker,
    capsys: pytest.CaptureFixture[str],
    bad: list[int],
    state: str,
    code: int,
) -> None:
    run = planned(client, prefix)
    for text in worker.take().values():
        worker.do(text, bad)
    ended = run.wait(timeout=20)
    assert (ended.state, ended.failed, ended.ended) == (state, len(bad), True)
    found, out, _ = printed(capsys, "status", prefix, "--json")
    document = json.loads(out)
    assert (found, document["state"], document["refused"]) == (code, state, 0)
    assert document.get("failures") == (RunLayout.at(prefix).failures if bad else None)
    if bad:
        assert len(list(client.store.lines(document["failures"]))) == len(bad)


def test_a_cancelled_run_names_no_file_that_is_not_there(
    client: Client, prefix: str, worker: ShardWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planned(client, prefix)
    worker.do(worker.take(0)[0], bad=[1])
    run.cancel()
    code, out, _ = printed(capsys, "status", prefix, "--json")
    document = json.loads(out)
    assert (document["state"], document["failed"]) == ("cancelled", 1)
    assert "failures" not in document
    code, out, _ = printed(capsys, "status", prefix)
    assert code == 1
    assert "failures.jsonl" not in out
    assert f"failed items so far: `pipefleet failures {prefix}`" in out
    assert printed(capsys, "failures", prefix)[:2] == (0, "1\tbad_input\tdecode\tit is bad\n")
    with pytest.raises(RunError, match="was cancelled; go on with `pipefleet resume"):
        list(run.results())


def test_waiting_for_a_run_that_somebody_cancels_is_not_done(
    client: Client, prefix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(client, prefix)
    whole = Run.wait

    def cancelled(self: Run, **options: Any) -> Any:
        client.run(prefix).cancel()
        return whole(self, **options)

    monkeypatch.setattr(Run, "wait", cancelled)
    assert printed(capsys, "resume", prefix)[0] == 1


class TestTimeout:
    def test_it_has_an_exit_code_and_names_the_command_to_go_on_with(
        self, client: Client, prefix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        client.store.put(f"{prefix}in.jsonl", b'{"inputs":"a"}\n')
        began = time.monotonic()
        code, out, err = printed(
            capsys, "map", TEXTS, f"{prefix}in.jsonl", "--output", f"{prefix}out/", "--timeout", "0.3", "--json"
        )
        assert (code, out) == (4, "")
        assert err.splitlines()[-1] == (
            f"pipefleet: the run at {prefix}out/ has not ended within 0.3 s; the run goes on without this command; "
            f"see `pipefleet status {prefix}out/`"
        )
        assert time.monotonic() - began < 60
        code, _, err = printed(capsys, "resume", f"{prefix}out/", "--timeout", "0.3")
        assert code == 4
        assert "has not ended within 0.3 s" in err

    def test_a_run_that_this_command_was_planning_has_to_be_resumed(
        self, client: Client, prefix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client.store.put(f"{prefix}in.jsonl", b'{"inputs":"a"}\n' * 3)
        monkeypatch.setenv("PIPEFLEET_OUTSTANDING_SHARDS", "1")
        map_ = ["map", TEXTS, f"{prefix}in.jsonl", "--output", f"{prefix}out/", "--shard-size", "1", "--timeout", "0.3"]
        code, _, err = printed(capsys, *map_)
        assert code == 4
        assert f"planning stops; go on with `pipefleet resume {prefix}out/`" in err

    @pytest.mark.parametrize("wrong", [["--timeout", "-1"], ["--timeout", "nan"], ["--timeout", "1", "--detach"]])
    def test_what_is_no_time_or_no_waiting_is_usage(
        self, prefix: str, capsys: pytest.CaptureFixture[str], wrong: list[str]
    ) -> None:
        with pytest.raises(SystemExit) as left:
            main(["resume", prefix, *wrong])
        assert left.value.code == 2

    def test_in_python_it_says_how_long_and_what_next(self, client: Client, prefix: str) -> None:
        with pytest.raises(ResultTimeoutError, match=r"has not ended within 0\.1 s; it goes on, see `pipefleet status"):
            planned(client, prefix).wait(timeout=0.1)


def test_a_run_whose_revision_nobody_serves_says_so(
    client: Client, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planned(client, prefix)
    other = revision_queue(QUEUE, "/models/another", None)
    announce_worker(client.redis, "other", {"pool": "texts", "queue": other}, seconds=60)  # of another revision
    why = run.progress().waiting
    assert (why or "").startswith(f"no worker serves {run.plan.queue}")
    assert f"running; {why}\n" in printed(capsys, "status", prefix)[1]
    assert json.loads(printed(capsys, "status", prefix, "--json")[1])["waiting"] == why
    began = time.monotonic()
    with pytest.raises(ResultTimeoutError):
        run.wait(progress=True, timeout=0.1)
    assert time.monotonic() - began < 3
    assert why in capsys.readouterr().err
    announce_worker(client.redis, "own", {"pool": "texts", "queue": run.plan.queue}, seconds=60)
    assert eventually(lambda: run.progress().waiting is None)
    run.cancel()
    assert run.progress().waiting is None


class TestParquet:
    """Workers that cannot write a Parquet part, beside others that can."""

    @pytest.fixture
    def without_pyarrow(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def missing(_: Any) -> None:
            raise RunError("parts in the format parquet need pyarrow")

        with monkeypatch.context() as patch:
            patch.setattr(type(FORMATS["parquet"]), "require", missing)
            yield

    def announce(self, client: Client, name: str, *formats: str, until: float = 4e9) -> None:
        facts = {"pool": "texts", "until": until} | ({"formats": formats} if formats else {})
        client.redis.hset(WORKERS_KEY, name, encode_json(facts))

    def shard(self, client: Client, prefix: str, worker: ShardWorker) -> Any:
        client.map(TEXTS, ["a"], output=prefix, format="parquet").join_planner()
        return read(worker.take()[0])

    @pytest.mark.parametrize("others", [("jsonl", "parquet"), ()])
    def test_the_shard_goes_back_while_another_worker_may_write_it(
        self, client: Client, prefix: str, worker: ShardWorker, monkeypatch: pytest.MonkeyPatch, others: tuple[str, ...],
        request: pytest.FixtureRequest,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(shards_module, "HAND_OVER_PAUSE", 0.0)
        message = self.shard(client, prefix, worker)
        request.getfixturevalue("without_pyarrow")
        worker.shards._elsewhere = Undertaker(client.settings, QUEUE, "texts", "me").written_elsewhere
        self.announce(client, "me", "jsonl", "parquet")  # what a worker says of itself is of no use here
        self.announce(client, "gone", "jsonl", "parquet", until=1.0)
        with pytest.raises(ContractError, match="need pyarrow"):
            worker.shards.open(message, message.shard)
        self.announce(client, "other", *others)
        with pytest.raises(ElsewhereError):
            worker.shards.open(message, message.shard)
        monkeypatch.setattr(shards_module, "HAND_OVER_SECONDS", 0.0)  # the others are there, but never get to it
        with pytest.raises(ContractError, match="need pyarrow"):
            worker.shards.open(message, message.shard)

    def test_map_says_that_no_worker_of_the_pool_can_write_it(self, client: Client, prefix: str) -> None:
        self.announce(client, "one", "jsonl")
        self.announce(client, "two", "jsonl")
        with pytest.raises(
            RunError, match="none of the 2 workers of the pool texts can write parts in the format parquet"
        ):
            client.map(TEXTS, ["a"], output=prefix, format="parquet")
        assert list(client.store.list(prefix)) == []
        client.map(TEXTS, ["a"], output=prefix).join_planner()
        self.announce(client, "three", *writable_formats())
        client.map(TEXTS, ["a"], output=f"{prefix}out/", format="parquet").join_planner()

    def test_a_client_without_pyarrow_is_told_what_it_needs_to_end_such_a_run(
        self, client: Client, prefix: str, worker: ShardWorker, request: pytest.FixtureRequest,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        run = client.map(TEXTS, ["a"], output=prefix, format="parquet")
        run.join_planner()
        text = worker.take()[0]
        request.getfixturevalue("without_pyarrow")
        worker.refuse(text, "no pyarrow here")
        with pytest.raises(
            RunError, match=r"no pyarrow here; to end the run at .* without this shard: parts in the format"
        ):
            run.wait(timeout=20)
        code, _, err = printed(capsys, "status", prefix)
        assert (code, err.count("\n")) == (2, 1)

    def test_its_items_are_rows_of_a_parquet_part(self, client: Client, prefix: str, worker: ShardWorker) -> None:
        run = client.map(TEXTS, ["a", {"text": "b", "text_pair": "c"}], output=prefix, format="parquet")
        run.join_planner()
        worker.refuse(worker.take()[0], "no pyarrow there")
        assert run.wait(timeout=20).state == "failed"
        rows = list(run.results())
        assert [row["input"] for row in rows] == ["a", {"text": "b", "text_pair": "c"}]
        assert [row["error"]["message"] for row in rows] == ["no pyarrow there"] * 2
        again = client.map(TEXTS, run.failures_uri, output=f"{prefix}again/")
        again.join_planner()
        assert again.plan.items == 2


def test_a_run_has_never_more_results_than_items_though_its_planner_told_of_fewer(
    client: Client, prefix: str, worker: ShardWorker
) -> None:
    run = planned(client, prefix)
    for text in worker.take().values():
        worker.do(text, [])
    for name in (RunLayout.at(prefix).run, RunLayout.at(prefix).success):
        client.store.delete(name)
    client.redis.hdel(run_key(run.id), "shards", "items")
    client.redis.set(run_key(run.id, "planner"), "2 1", ex=60)
    now = client.run(prefix).progress()
    assert (now.state, now.items, now.succeeded, now.shards, now.parts) == ("planning", 4, 4, 2, 2)
    client.run(prefix).cancel()
    now = client.run(prefix).progress()
    assert (now.state, now.items, now.shards, now.parts) == ("cancelled", 4, 2, 2)


def test_an_output_too_long_for_what_lies_below_it_is_refused_and_leaves_nothing(client: Client, prefix: str) -> None:
    output = f"{prefix}{'k' * (1010 - len(prefix))}/"
    with pytest.raises(UsageError, match="is too long: its key may have 900 bytes"):
        planned(client, output)
    assert not list(client.store.list(prefix))
