"""`pipefleet top`: numbers as they lie in Redis, tables that fit, one sentence without Redis, stale numbers when it goes away."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rich.console import Console

from pipefleet import cli
from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, Priority, encode_json
from pipefleet.fleet.revisions import read_backlogs
from pipefleet.fleet.routing import revision_queue
from pipefleet.queues.celery import push_job
from pipefleet.queues.keys import ledger_keys
from pipefleet.queues.revision_notes import note_revision
from pipefleet_workers.facts import WORKERS_KEY
from pipefleet_workers.fleet.local.parked import Parked, tell_parked
from pipefleet_workers.fleet.scaling.service import Scaler
from pipefleet_workers.fleet.top.read import PoolRow, Snapshot, WorkerRow, read_fleet
from pipefleet_workers.fleet.top.view import duration, plain, screen, shortened
from pipefleet_workers.observe.totals import record_done, record_items
from tests.servers import Server, programs, until

QUEUE = "pipefleet.text-classification"
WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "prometheus_client", "numpy"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from pipefleet.cli import main
sys.exit(main(["top", "--once"]))
"""


def put(redis: Redis, count: int) -> None:
    pipe = redis.pipeline()
    for index in range(count):
        job = JobMessage(f"j{index}", "text-classification", items=(JobItem("0", "text"),), cost=5.0)
        push_job(pipe, job, QUEUE, Priority.NORMAL)
    pipe.execute()


def announce(redis: Redis, name: str, **facts: Any) -> None:
    now = time.time()
    content = {"pool": "texts", "max_cost": 4096, "pads": True, "at": now, "until": now + 600, **facts}
    redis.hset(WORKERS_KEY, name, encode_json(content))


@pytest.fixture
def busy(client: Client, redis: Redis) -> Client:
    """A pool with two workers and seven jobs of five units, each unit of 2 seconds."""
    put(redis, 7)
    announce(redis, "texts@host-1", items_per_second=30.0, busy=0.9, items=300, failed=2, base=0.002, per_cost=3e-6)
    announce(redis, "texts@host-2", items_per_second=10.0, busy=0.5, items=100, failed=0)
    record_done(redis, "texts", cost=10.0, seconds=20.0)
    record_items(redis, "texts", items=1400, failed=12)
    letter = encode_json({"reason": "delivered 3 times", "at": 1.0, "queue": QUEUE, "deliveries": 3, "message": "{}"})
    redis.lpush(ledger_keys(QUEUE)["dead_key"], letter)
    return client


def row(client: Client) -> PoolRow:
    return next(one for one in read_fleet(client).pools if one.pool == "texts")


def test_a_pool_is_what_lies_in_redis(busy: Client) -> None:
    pool = row(busy)
    assert pool.messages == {"queued": 7, "leased": 0, "delayed": 0}
    assert pool.backlog_seconds == pytest.approx(7 * 5 * 2.0)
    assert (pool.alive, pool.wanted) == (2, None)
    assert (pool.items_per_second, pool.busy) == (40.0, pytest.approx(0.7))
    assert (pool.items, pool.failed, pool.dead_letters) == (1400, 12, 1)


def test_a_parked_pool_has_a_note_under_the_table(busy: Client) -> None:
    assert row(busy).note == ""
    tell_parked(busy.redis, {"texts": Parked(1, 3, "worker-texts-2 exited with status 1: no such model")})
    note = "1 of 3 workers stay down after ending again and again (worker-texts-2 exited with status 1: no such model)"
    assert row(busy).note == note
    assert f"texts: {note}" in plain(read_fleet(busy)).splitlines()
    console = Console(width=120, record=True, force_terminal=True)
    console.print(screen(read_fleet(busy), width=120))
    assert "texts: 1 of 3 workers stay down" in console.export_text()


def test_what_waits_for_a_revision_that_the_fleet_does_not_name_is_shown_and_who_serves_it_by_whatever_name(
    busy: Client,
) -> None:
    queue = revision_queue(QUEUE, "/models/before", None)
    note_revision(busy.redis, queue, "/models/before", None)
    key = f"texts@{queue.partition('@')[2]}"
    assert key not in plain(read_fleet(busy))
    push_job(busy.redis, JobMessage("j", "text-classification", model="/models/before"), queue, Priority.LOW)
    waits = next(one for one in read_fleet(busy).pools if one.pool == key)
    assert (waits.messages["queued"], waits.alive) == (1, 0)
    assert "start one with `pipefleet worker --pool texts --model /models/before`" in waits.note
    announce(busy.redis, "by-hand@host-3", pool="by-hand", queue=queue)
    served = next(one for one in read_fleet(busy).pools if one.pool == key)
    assert (served.alive, served.note) == (1, "")
    backlog = next(one for one in read_backlogs(busy.redis, busy.fleet) if one.part.key == key)
    assert (backlog.workers, backlog.note) == (1, None)


def test_with_a_scaler_it_shows_what_that_wants(busy: Client) -> None:
    (wanted,) = {Scaler(busy.fleet, busy.settings, cold_start=60.0).tick()["texts"].decision.desired}
    assert row(busy).wanted == wanted >= 1


def test_what_a_scaler_wanted_long_ago_is_not_shown(busy: Client) -> None:
    Scaler(busy.fleet, busy.settings, cold_start=60.0, clock=lambda: time.time() - 1000).tick()
    assert row(busy).wanted is None


def test_nothing_was_measured_yet(client: Client, redis: Redis) -> None:
    put(redis, 1)
    assert row(client).backlog_seconds is None
    assert "no worker is alive" in plain(read_fleet(client))


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = cli.main(["top", *options])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_once_and_piped_print_the_same_plain_table(busy: Client, capsys: pytest.CaptureFixture[str]) -> None:
    code, once, _ = run(capsys, "--once")
    assert code == 0
    head, *rows = once.splitlines()
    assert head.split()[:3] == ["pool", "waits", "held"]
    texts = next(line for line in rows if line.startswith("texts "))
    assert [word for word in texts.split() if word != "s"][:4] == ["texts", "7", "0", "70"]
    worker = next(line for line in rows if line.startswith("texts@host-1"))
    assert worker.split()[1:] == ["30", "90%", "300", "2", "4096", "padded", "2", "ms+3", "µs/unit"]
    assert run(capsys)[1].splitlines()[0] == head


def test_json_is_one_document(busy: Client, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--json")
    document = json.loads(out)
    assert code == 0
    assert {"pools", "workers", "read_at"} == set(document)
    assert next(one for one in document["pools"] if one["pool"] == "texts")["failed"] == 12


def test_without_redis_it_is_one_sentence_and_exit_code_3(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", "redis://127.0.0.1:1/0")
    for option in ("--once", "--json"):
        code, out, err = run(capsys, option)
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert "cannot reach Redis at redis://127.0.0.1:1/0" in err


def test_it_needs_neither_torch_nor_the_workers_libraries(busy: Client) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "texts@host-2" in done.stdout


def wide(count: int) -> Snapshot:
    messages = {"queued": 1_234_567, "leased": 4096, "delayed": 12}
    much = (messages, 1e6, 90_000.0, 120, 1000, 12_345.0, 1.0, 9, 99_999, 3)
    pools = tuple(PoolRow(f"a-pool-with-quite-a-long-name-{index}", "task", "model", *much) for index in range(count))
    rates = (1234.0, 1.0, 10**7, 10**4, 10**6, False, 0.0123, 4.56e-5, 1.0)
    workers = tuple(
        WorkerRow(f"{one.pool}@ip-10-0-12-34.eu-central-1-{index}", one.pool, *rates) for index, one in enumerate(pools)
    )
    return Snapshot(time.time(), pools, workers)


@pytest.mark.parametrize("width", [80, 120])
def test_every_number_is_shown_at_the_usual_widths(width: int) -> None:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(screen(wide(3), width=width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert all(line.endswith(" 3") for line in lines[3:6])
    assert all(line.endswith("12.3 ms+45.6 µs/unit") for line in lines[8:11])
    assert [line.split()[0][-2:] for line in lines[8:11]] == ["-0", "-1", "-2"]


def test_a_name_is_shortened_in_its_middle() -> None:
    assert shortened("texts@host-12345", 12) == "text…t-12345"
    assert len(shortened("x" * 100, 12)) == 12


def test_times_are_for_people() -> None:
    assert [duration(value) for value in (0.4, 61.0, 600.0, 9000.0, 200_000.0)] == [
        "0 s",
        "61 s",
        "10 min",
        "2.5 h",
        "2.3 d",
    ]


def test_when_redis_goes_away_the_last_numbers_stay_marked_as_stale(tmp_path: Path) -> None:
    server = Server(programs()[0], tmp_path)
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('[pools.texts]\ntask = "text-classification"\nmodel = "/m"\n')
    environment = {**os.environ, "PIPEFLEET_REDIS_URL": server.url, "PIPEFLEET_FLEET": str(fleet), "TERM": "xterm"}
    controller, terminal = pty.openpty()
    os.set_blocking(controller, False)
    top = subprocess.Popen(
        [sys.executable, "-m", "pipefleet", "top"],
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        # Where the tests run in the background of a shell, Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = bytearray()

    def shows(text: bytes) -> bool:
        with contextlib.suppress(BlockingIOError):
            seen.extend(os.read(controller, 1 << 16))
        return text in seen

    try:
        until(lambda: shows(b"texts"), 60)
        assert b"STALE" not in seen
        server.kill()
        seen.clear()
        until(lambda: shows(b"STALE") and shows(b"texts"), 60)
        top.send_signal(signal.SIGINT)
        until(lambda: shows(b"") and top.poll() is not None, 60)  # read on: it may be writing to a full terminal
        assert top.returncode == 0
    finally:
        top.kill()
        top.wait()
        os.close(controller)
        os.close(terminal)
        server.kill()
