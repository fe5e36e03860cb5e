"""Hostile texts, garbage and wrong types under every key and object that clients read: named or passed over, never obeyed."""

from __future__ import annotations

import itertools
import json
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from pipefleet import cli
from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout, RunPlan
from pipefleet.contract.messages import JobState
from pipefleet.contract.records import JobFailure, JobRecord, read_record
from pipefleet.contract.references import StorageRef
from pipefleet.errors import ContractError, JobFailedError, PipefleetError, RunError
from pipefleet.fleet.announcements import announce_worker, announced_workers, read_pool, read_worker
from pipefleet.foreign import read_json
from pipefleet.jobs.job import raise_for
from pipefleet.printable import printable, printable_json
from pipefleet.queues.keys import (
    PARKED_KEY,
    POOLS_KEY,
    REVISIONS_KEY,
    WORKERS_KEY,
    ledger_keys,
    run_key,
    scaler_key,
    waiting_lists,
    work_key,
)
from pipefleet.runs.moving import Moved
from pipefleet.runs.progress import RunProgress, show_progress
from pipefleet.runs.refusals import Refusal
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.scaling.decide import State
from pipefleet_workers.fleet.scaling.signal import Memory

QUEUE = "pipefleet.text-classification"
OLD_QUEUE = f"{QUEUE}@0123abcd"
KEYS = ledger_keys(QUEUE)
RUN = "f" * 32
NASTY = (
    "\x1b[2J\x1b]0;owned\x07[bold red]x[/] [link=file:///etc/passwd]y[/link]\r\n2026-01-01 00:00:00 INFO all is well\n"
    "\u2028\u0085\u202eevil\x9b31m\ud800\x00"
)
HUGE = "1" + "0" * 400
TEXTS = (
    b"\xff\xfe", b"", b"null", b"5", b'"x"', b"[]", b"[null]", b"{}", b"NaN", b"-Infinity", HUGE.encode(), b"[" * 100_000,
    b'{"pool":NaN,"until":Infinity,"at":NaN}', json.dumps(NASTY).encode(), b'"' + b"x" * 2_000_000 + b'"',
)  # fmt: skip
"""What may lie where an object of JSON should."""


def objects(**fields: Any) -> Iterator[bytes]:
    """A right object, and that with each of its fields wrong in some way."""
    wrong = (NASTY, None, [], {}, -1, 1e308, [NASTY], {NASTY: NASTY}, True)
    for name in fields:
        for value in wrong:
            yield json.dumps({**fields, name: value}).encode()
        for word in ("NaN", "Infinity", HUGE):
            yield json.dumps({**fields, name: "%"}).replace('"%"', word).encode()


POOL = {
    "task": "text-classification",
    "model": "/m",
    "revision": None,
    "default": True,
    "queue": QUEUE,
    "revision_queue": OLD_QUEUE,
}
FACTS = {
    "pool": "texts", "queue": OLD_QUEUE, "at": 1.0, "until": 4e9, "items_per_second": 1.0, "busy": 0.5, "items": 1, "failed": 0,
    "max_cost": 64, "pads": True, "base": 0.1, "per_cost": 0.1, "batching": "measured",
}  # fmt: skip
ITEM = {"id": "i", "inputs": "text"}
MESSAGE = {"version": 1, "id": "j", "task": "text-classification", "items": [ITEM], "cost": 1.0}
SHARD = {"run_id": RUN, "run_uri": "s3://pipefleet/x/", "uri": "s3://pipefleet/x/0", "index": 0, "first": 0, "count": 1}
PLAN = {
    "id": RUN, "task": "text-classification", "model": "/models/texts", "revision": None, "parameters": {}, "source": None,
    "queue": QUEUE, "format": "jsonl", "shard_size": None, "created": 1.0, "contract_version": 1, "shards": 1, "items": 1,
}  # fmt: skip
TOTALS = {
    "state": "succeeded", "items": 1, "succeeded": 1, "failed": 0, "shards": 1, "parts": 1, "seconds": 1.0, "refused": 0,
    "reason": "r", "refused_reason": "r", "waiting": "w",
}  # fmt: skip


def envelopes() -> Iterator[bytes]:
    """Messages as they lie in Redis, each wrong in some way."""
    for body in [*objects(**MESSAGE), *objects(**{**MESSAGE, "items": None, "shard": SHARD})]:
        headers = {"id": "j", "pipefleet-cost": 1.0, "pipefleet-at": 1.0}
        yield envelope(body, headers)
    body = json.dumps(MESSAGE).encode()
    for text in objects(**{"id": "j", "pipefleet-cost": 1.0, "pipefleet-at": 1.0, "pipefleet-shard": True}):
        yield envelope(body, json.loads(text))
    for text in objects(body="[[{}],{},{}]", headers={}, properties={}):
        yield text


def envelope(body: bytes, headers: Any, properties: Any = None) -> bytes:
    content = {
        "body": f"[[{body.decode()}],{{}},{{}}]",
        "headers": headers,
        "properties": properties or {"priority": 0},
    }
    return json.dumps(content).encode()


def plant_hash(redis: Redis, key: str, values: Iterator[bytes]) -> None:
    pipe = redis.pipeline()
    for number, value in enumerate([*TEXTS, *values]):
        pipe.hset(key, f"g{number}", value)
    pipe.hset(key, NASTY.encode(errors="surrogatepass"), next(iter(objects(a=1))))
    pipe.hset(key, b"\xff\x1b[2J", b"{}")
    pipe.execute()


def plant(redis: Redis) -> None:
    """Something of every kind of garbage under each key that clients read of the fleet."""
    for fields in objects(**POOL):
        redis.hset(POOLS_KEY, f"p{redis.hlen(POOLS_KEY)}", b'{"until":4000000000,"since":1,"pool":%b}' % fields)
    plant_hash(redis, POOLS_KEY, objects(pool=POOL, until=4e9, since=1.0))
    plant_hash(redis, WORKERS_KEY, objects(**FACTS))
    plant_hash(redis, REVISIONS_KEY, objects(model="/m", revision="r", at=1.0))
    redis.hset(REVISIONS_KEY, OLD_QUEUE, json.dumps({"model": NASTY, "revision": NASTY, "at": 1.0}))
    redis.hset(REVISIONS_KEY, f"{QUEUE}@{NASTY}".encode(errors="replace"), '{"model":"m","revision":null}')
    plant_hash(redis, PARKED_KEY, objects(down=1, of=2, reason="r"))
    redis.hset(PARKED_KEY, "texts", json.dumps({"down": 1, "of": 2, "reason": NASTY}))
    plant_hash(redis, work_key("texts"), objects(a=1))
    redis.hset(work_key("texts"), mapping={"cost": "nan", "seconds": "x", "items": "-", "failed": HUGE})
    redis.set(scaler_key("texts"), json.dumps({"memory": {"done": HUGE}, "state": {}}))
    messages = [*TEXTS, *envelopes()]
    for name in (*waiting_lists(QUEUE), *waiting_lists(OLD_QUEUE)):
        redis.rpush(name, *messages)
    for number, message in enumerate(messages):
        redis.hset(KEYS["unacked_key"], f"t{number}", b'[%b, "", "%b"]' % (message, QUEUE.encode()))
        redis.hset(KEYS["unacked_key"], f"u{number}", message)
        redis.hset(KEYS["owners_key"], f"t{number}", message[:100])
        redis.hset(KEYS["deliveries_key"], f"t{number}", message[:100])
    redis.zadd(
        KEYS["delayed_key"], {"t1": 4e9, "t2": float("inf"), "t3": float("-inf"), NASTY.encode(errors="replace"): 1.0}
    )
    letters = [
        *TEXTS, *objects(reason="delivered 4 times", at=1.0, queue=QUEUE, deliveries=1, message=messages[20].decode()),
        *(json.dumps({"reason": NASTY, "at": 1, "queue": NASTY, "deliveries": 1, "message": one.decode(errors="replace")}).encode()
          for one in envelopes()),
    ]  # fmt: skip
    redis.rpush(KEYS["dead_key"], *letters)
    redis.rpush(KEYS["unreported_key"], *letters[:50])


def shown_is_harmless(output: str) -> None:
    """No character of it is obeyed by a terminal, and nothing of it is a traceback."""
    obeyed = {one for one in output if one != "\n" and unicodedata.category(one) in ("Cc", "Cf", "Zl", "Zp", "Cs")}
    assert not obeyed, f"{obeyed} in {output[:2000]!r}"
    assert "Traceback" not in output
    assert not any(line.startswith("2026-01-01") for line in output.splitlines())


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs one command in this process and checks all that it shows; its exit code and output."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        shown_is_harmless(out.replace("\t", " "))
        shown_is_harmless(err)
        if "--json" in arguments and out:
            json.loads(out)
            assert "NaN" not in out
            assert "Infinity" not in out
        assert code in (0, 1, 2, 3, 4)
        return code, out, err

    return run


COMMANDS = (
    "queues", "queues --json", "top --once", "top --json", "dead-letters", "dead-letters --json", "dead-letters --requeue",
    "dead-letters --remove", "scaler --json-once", "submit text-classification words --timeout 0.5",
    "submit text-classification words --timeout 0.5 --json", "tasks",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_what_anybody_wrote_to_redis_is_shown_and_not_obeyed(
    command: str, client: Client, redis: Redis, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    plant(redis)
    run_command(*command.split())


@pytest.mark.parametrize(
    "command", ["queues", "top --once", "submit text-classification words --timeout 0.1", "doctor --json"]
)
def test_what_anybody_announced_is_not_obeyed_by_a_client_without_a_fleet_file(
    command: str, client: Client, redis: Redis, monkeypatch: pytest.MonkeyPatch,
    run_command: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    monkeypatch.delenv("PIPEFLEET_FLEET")
    monkeypatch.setattr("pipefleet_workers.fleet.doctor.store.RACERS", 1)
    monkeypatch.setattr("pipefleet_workers.fleet.doctor.machine.is_installed", lambda module: False)
    plant(redis)
    run_command(*command.split())


FLEET_READERS = (
    "queues",
    "top --once",
    "dead-letters",
    "scaler --json-once",
    "submit text-classification words --timeout 0.1",
)
RUN_READERS = ("status {run}", "resume {run} --detach", "cancel {run}")
FLEET_KEYS = (
    POOLS_KEY, WORKERS_KEY, REVISIONS_KEY, PARKED_KEY, QUEUE, KEYS["unacked_key"], KEYS["delayed_key"], KEYS["dead_key"],
    work_key("texts"), scaler_key("texts"),
)  # fmt: skip
RUN_KEYS = (run_key(RUN), *(run_key(RUN, part) for part in ("items", "parts", "refused", "planner")))


def put_run(store: ObjectStore, prefix: str, **files: bytes) -> None:
    layout = RunLayout.at(prefix)
    store.put(layout.plan, json.dumps(PLAN).encode())
    store.put(layout.run, json.dumps(PLAN).encode())
    for name, body in files.items():
        store.put(getattr(layout, name), body)


@pytest.mark.parametrize("key", [*FLEET_KEYS, *RUN_KEYS])
def test_a_key_of_another_type_is_named_in_one_sentence(
    key: str, client: Client, redis: Redis, store: ObjectStore, prefix: str, monkeypatch: pytest.MonkeyPatch,
    run_command: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    monkeypatch.setattr("pipefleet.runs.planner.ALIVE_SECONDS", 1.0)
    if key == POOLS_KEY:
        monkeypatch.delenv("PIPEFLEET_FLEET")
    put_run(store, prefix)
    named = 0
    for command in RUN_READERS if key in RUN_KEYS else FLEET_READERS:
        redis.flushall()
        if key == KEYS["delayed_key"]:
            redis.set(key, "x")
        else:
            redis.zadd(key, {"x": 1})
        code, out, err = run_command(*command.format(run=prefix).split())
        assert "see its log" not in out + err
        assert code != 3 or key in err
        if "another type" in out + err:
            named += 1
            assert f"{key} holds another type" in out + err or f" or {key}" in out + err or f"{key} or " in out + err
            assert "redis-cli DEL" in out + err
    assert named, "else nobody reads this key"


MOVED = {"model": "/m", "revision": None, "queue": QUEUE, "pools": [QUEUE]}
FILES = {
    "plan": PLAN,
    "run": PLAN,
    "success": TOTALS,
    "moved": {},
    "stopped": {"message": "m"},
    "resumed": {"word": "w"},
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_run_that_are_none_are_named(
    name: str, client: Client, redis: Redis, store: ObjectStore, prefix: str,
    run_command: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    put_run(store, prefix)
    if name in ("plan", "stopped"):
        store.delete(RunLayout.at(prefix).run)
    redis.hset(run_key(RUN), "since", 1)
    for body in [b"", b"[" * 100_000]:
        store.put(getattr(RunLayout.at(prefix), name), body)
        code, _, err = run_command("status", prefix)
        assert code != 2 or getattr(RunLayout.at(prefix), name) in err
    shown = {**FILES[name], "message": NASTY, "state": NASTY, "refused": 1, "refused_reason": NASTY, "source": NASTY}
    known = {field: shown[field] for field in shown if field in FILES[name] or name in ("success", "stopped")}
    store.put(getattr(RunLayout.at(prefix), name), json.dumps(known).encode())
    run_command("status", prefix)
    if name == "success":
        run_command("status", prefix, "--json")


def test_failed_items_are_shown_escaped_and_lines_that_are_none_are_passed_over(
    client: Client, store: ObjectStore, prefix: str, caplog: pytest.LogCaptureFixture,
    run_command: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    put_run(store, prefix)
    row = {"id": NASTY, "inputs": NASTY, "error": {"code": NASTY, "message": NASTY, "stage": "decode"}}
    lines = [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"id": "x"}',
        b'{"id": "x", "error": 5}',
        b"\xff",
        json.dumps(row).encode(),
    ]
    store.put(RunLayout.at(prefix).failed_shard(0), b"\n".join(lines))
    _, out, _ = run_command("failures", prefix)
    assert out.count("\n") == 1
    assert "\\x1b[2J" in out
    assert len(caplog.messages) == 6
    assert "is no failed item of a run and is passed over" in caplog.text
    assert json.loads(run_command("failures", prefix, "--json")[1]) == [row]


def parsed(parse: Callable[[Any], object], value: Any) -> None:
    with suppress(PipefleetError):
        parse(value)


@pytest.mark.parametrize(
    ("right", "parse"),
    [
        (PLAN, lambda text: RunPlan.from_json(json.loads(text), "here")),
        (TOTALS, lambda text: quietly(lambda: RunProgress.from_json("s3://b/o/", json.loads(text)))),
        (MOVED, lambda text: Moved.from_json(json.loads(text), "here")),
        ({"code": "c", "message": "m", "stage": "s", "first": 0, "count": 1}, lambda text: Refusal.from_json(0, text)),
        (POOL, lambda text: read_pool(b"texts", b'{"until":4000000000,"pool":%b}' % text)),
        (FACTS, lambda text: read_worker(b"texts@host", text)),
        ({"code": "c", "message": "m", "stage": "s"}, lambda text: read_record({b"state": b"failed", b"error": text})),
        ({"decode": 1.0}, lambda text: read_record({b"state": b"failed", b"timings": text})),
        (StorageRef("s3://bucket/k", size=1).to_json(), lambda text: read_record({b"state": b"succeeded", b"output_ref": text})),
        (State(1.0, 1.0, 1, 1.0, ((1.0, 1.0),)).to_json(), lambda text: quietly(lambda: State.from_json(read_json(text)))),
        (Memory(1.0).to_json(), lambda text: quietly(lambda: Memory.from_json(read_json(text)))),
    ],
)  # fmt: skip
def test_what_is_wrong_in_any_field_is_refused_by_its_reader(
    right: dict[str, Any], parse: Callable[[Any], object]
) -> None:
    parse(json.dumps(right).encode())
    for value in objects(**right):
        parsed(parse, value)


def quietly(read: Callable[[], object]) -> None:
    """As those who call these readers do."""
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        read()


def test_times_and_states_of_a_record_that_are_none_make_it_unreadable() -> None:
    for field in (b"state", b"submitted", b"started", b"finished", b"worker", b"queue", b"output"):
        for value in (b"\xff", b"nan", b"inf", b"1e400", HUGE.encode()):
            with suppress(ContractError):
                record = read_record({b"state": b"queued", field: value})
                assert record is not None
                assert field in (b"worker", b"queue", b"output")


def test_a_result_is_the_same_json_and_holds_nothing_that_a_terminal_obeys() -> None:
    value = [NASTY, {"\x7f\x9b": "é漢🎉 ok", "n": 1.5}]
    shown_is_harmless(printable_json(value))
    assert json.loads(printable_json(value)) == value
    assert "é漢🎉 ok" in printable_json(value)
    assert json.loads(printable_json({"a": [float("nan"), float("inf"), 1.0]})) == {"a": [None, None, 1.0]}


class Terminal(StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_takes_no_text_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    stream = Terminal()
    with show_progress(enabled=True, stream=stream) as show:
        show(
            RunProgress(
                "s3://b/o/", "running", 2, 1, 0, 1, 0, 1.0, refused=1, refused_reason=NASTY, waiting="[/] " + NASTY
            )
        )
    assert "[bold red]x[/]" in stream.getvalue()
    assert "\x1b]0;owned" not in stream.getvalue()
    assert "\u202e" not in stream.getvalue()


ORDINARY = (
    "grün 日本 👩\u200d💻",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "東京\u3000大阪",
    "Bonjour\u00a0!",
    "10\u202f000",
)


@pytest.mark.parametrize("text", ORDINARY)
def test_names_in_any_script_are_shown_as_they_are(text: str) -> None:
    assert printable(text) == text
    assert printable_json(text) == f'"{text}"'


def test_joiners_do_not_hide_in_ascii() -> None:
    assert printable("a\u200db") == "a\\u200db"
    assert printable_json("a\u200db") == '"a\\u200db"'


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_terminal_without_unicode_is_shown_escapes(
    encoding: str, options: tuple[str, ...], client: Client, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis.hset(REVISIONS_KEY, OLD_QUEUE, json.dumps({"model": ORDINARY[0], "revision": None, "at": 1.0}))
    redis.lpush(OLD_QUEUE, "{}")
    raw = BytesIO()
    monkeypatch.setattr("sys.stdout", TextIOWrapper(raw, encoding=encoding, write_through=True))
    assert cli.main(("queues", *options)) == 0
    shown = raw.getvalue().decode(encoding)
    if options:
        assert ORDINARY[0] in {row["model"] for row in json.loads(shown)}
    else:
        assert "gr" in shown


@pytest.mark.parametrize("arguments", [("queues", f"--{NASTY}"), (NASTY,), ("queues", NASTY)])
def test_wrong_arguments_are_repeated_and_not_obeyed(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    shown_is_harmless(capsys.readouterr().err)


def test_the_error_of_a_job_is_not_obeyed_in_a_traceback() -> None:
    failure = JobFailure("code", NASTY, "decode")
    with pytest.raises(JobFailedError) as caught:
        raise_for("j", JobRecord(JobState.FAILED, failure=failure))
    shown_is_harmless("".join(traceback.format_exception_only(caught.value)))


def test_of_a_huge_file_of_a_run_no_more_is_read_than_can_be_used(store: ObjectStore, prefix: str) -> None:
    store.put(f"{prefix}huge", b"x" * 100_000)
    with pytest.raises(RunError, match="100000"):
        store.get(f"{prefix}huge", max_bytes=1000)
    assert len(store.get(f"{prefix}huge", max_bytes=100_000)) == 100_000


@pytest.mark.parametrize(
    ("command", "key", "revised"),
    [
        *itertools.product(
            ("queues", "queues --json", "top --once", "top --json"),
            (QUEUE, KEYS["unacked_key"], KEYS["dead_key"]),
            (False, True),
        ),
        ("top --once", work_key("texts"), False),
        ("doctor --json", QUEUE, False),
    ],
)
def test_a_pool_that_cannot_be_read_does_not_hide_the_others(
    command: str, key: str, revised: bool, client: Client, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    run_command: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    """Also where messages of another revision lie with those of the pool, and a script looks at them."""
    fleet = tmp_path / "fleet.toml"
    tables = (f'[pools.{name}]\ntask = "{task}"\nmodel = "/m"\n' for name, task in OTHERS.items())
    fleet.write_text("\n".join(tables))
    monkeypatch.setenv("PIPEFLEET_FLEET", str(fleet))
    monkeypatch.setattr("pipefleet_workers.fleet.doctor.store.RACERS", 1)
    monkeypatch.setattr("pipefleet_workers.fleet.doctor.machine.is_installed", lambda module: False)
    if revised:
        redis.hset(REVISIONS_KEY, OLD_QUEUE, json.dumps({"model": "/old", "revision": None, "at": 1.0}))
        redis.lpush(OLD_QUEUE, "{}")
    redis.zadd(key, {"x": 1})
    code, out, err = run_command(*command.split())
    assert code == (1 if command.startswith("doctor") else 3)
    assert f"{key} holds another type" in out + err or f"{key} or " in out + err
    assert "tokens" in out


OTHERS = {"texts": "text-classification", "tokens": "token-classification"}


def test_a_fit_that_rounding_put_below_zero_hides_no_worker(redis: Redis) -> None:
    announce_worker(redis, "one", {"pool": "texts", "base": -1e-18, "per_cost": 0.1}, seconds=60)
    assert announced_workers(redis)["one"]["base"] == 0.0
