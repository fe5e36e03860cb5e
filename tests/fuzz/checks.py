"""What must hold after every batch of messages, whatever they were. Each check returns sentences: what is wrong."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unicodedata import category

from pipefleet.cli import main as command
from pipefleet.contract.messages import JobState
from pipefleet.errors import PipefleetError
from pipefleet.queues import dead_letters, keys
from pipefleet.queues.keys import KEY, PRIORITY_SEPARATOR, job_key, ledger_keys, waiting_lists
from pipefleet.queues.revision_notes import queues_of
from tests.fuzz.messages import BASE, HOST_URI, OUTPUTS, QUEUE, TASK, VICTIM_URI
from tests.fuzz.oracle import Fate, fate, has_eta
from tests.fuzz.world import World, soon

KEYS = ledger_keys(QUEUE)
LEDGER = ("unacked", "unacked_index", "deliveries", "retries", "owners", "delayed")
SETTLE_SECONDS = 60.0
JOB_SECONDS = 60.0
MOST_OF_A_KEY = 400_000
"""Bytes of one key in Redis, dead letters aside."""
MOST_OF_A_LINE = 4000
"""Characters of one line of the worker's log."""
MOST_GROWTH = 96 << 20
"""Bytes that the worker may grow by between its first batch and a later one."""
MOST_PEAK = 224 << 20
"""Bytes that the worker may hold, at any moment of a batch, above what it held before the first one."""
MOST_DATA = 4 << 20
"""Bytes that Redis may hold for each 1,000 messages, dead letters aside: the records of jobs."""

Pushed = Sequence[bytes]


def check_alive(world: World) -> list[str]:
    """The worker's process lives, and Celery's tools reach it."""
    if world.exit_code is not None:
        return [f"the worker ended with {world.exit_code}: {world.log.read_text(errors='replace')[-600:]!r}"]
    return [] if any(world.ping() for _ in range(3)) else ["`celery inspect ping` is not answered"]


def check_good_job(world: World) -> list[str]:
    """One good job of each priority succeeds."""
    jobs = [world.client.submit(TASK, "a good text", priority=name) for name in ("high", "low")]
    soon(lambda: world.exit_code is not None or all(job.status().final for job in jobs), JOB_SECONDS)
    try:
        results = [job.result(timeout=0.1) for job in jobs]
    except PipefleetError as error:
        return [f"a good job is not answered: {type(error).__name__}: {str(error)[:200]}"]
    return [] if all(result[0]["label"] for result in results) else [f"a good job has no labels: {results}"]


def check_settled(world: World) -> list[str]:
    """No message waits, and the ledger holds only those that asked to run later."""
    left: list[str] = []

    def nothing() -> bool:
        left[:] = _unsettled(world)
        return not left or world.exit_code is not None

    soon(nothing, SETTLE_SECONDS)
    return left


def _unsettled(world: World) -> list[str]:
    redis: Any = world.redis
    lists = [name for queue in queues_of(redis, QUEUE) for name in waiting_lists(queue)]
    left = [f"{redis.llen(name)} messages wait in {name!r}" for name in lists if redis.llen(name)]
    if redis.llen(KEYS["unreported_key"]):
        left.append("dead letters wait to be told of")
    records = redis.hgetall(KEYS["unacked_key"])
    later = {tag for tag, record in records.items() if has_eta(record)}
    for name in LEDGER:
        key = KEYS[f"{name}_key"]
        tags = set(redis.zrange(key, 0, -1) if name in ("unacked_index", "delayed") else redis.hkeys(key))
        if extra := tags - later:
            left.append(f"{name} holds {len(extra)} messages that are nowhere else: {sorted(extra)[:2]}")
    return left


def check_keys(world: World) -> list[str]:
    """Every key is one that `pipefleet.queues.keys` documents, of the type it says, of a bounded size, and not kept for ever."""
    redis: Any = world.redis
    known = documented()
    found: list[str] = []
    for key in redis.scan_iter(count=1000):
        name, kind = key.decode(errors="backslashreplace"), redis.type(key).decode()
        if kind == "none":
            continue  # it was deleted since the scan listed it
        if not any(pattern.fullmatch(name) and kind in kinds for pattern, kinds in known):
            found.append(f"an undocumented key {name[:120]!r} of type {kind}")
        if not re.match("pipefleet:dead", name) and (size := redis.memory_usage(key, samples=0) or 0) > MOST_OF_A_KEY:
            found.append(f"{size} bytes in the key {name[:120]!r}")
        if re.match("pipefleet:(job|run|idempotency):", name) and redis.ttl(key) == -1:
            found.append(f"the key {name[:120]!r} is kept for ever")
    return found[:10]


def documented() -> list[tuple[re.Pattern[str], set[str]]]:
    """The keys that the docstring of `pipefleet.queues.keys` lists, with their types, and those that are Celery's own."""
    types = {"bitmap": {"string"}, "string": {"string"}, "hash": {"hash"}, "zset": {"zset"}, "list": {"list"}}
    lines = re.findall(r"^    (\S+) +(hash|string|bitmap|zset|list) ", keys.__doc__ or "", re.MULTILINE)
    known = [(re.compile(KEY + _pattern(name), re.DOTALL), types[kind]) for name, kind in lines]
    queues = rf"pipefleet\.{TASK}(@[0-9a-f]{{8}})?({PRIORITY_SEPARATOR}[369])?(:arriving)?"
    bindings = rf"_kombu\.binding(_permanent)?\.({queues}|celeryev|celery\.pidbox|reply\.celery\.pidbox)"
    replies = r"[0-9a-f-]{36}\.reply\.celery\.pidbox"
    celery = [(bindings, "set"), (r"_kombu\.binding_deadlines", "zset"), (replies, "list"), (queues, "list")]
    return [*known, *((re.compile(pattern), {kind}) for pattern, kind in celery)]


def _pattern(name: str) -> str:
    return "".join(".+" if part.startswith("<") else re.escape(part) for part in re.split(r"(<[a-z]+>)", name))


def check_fates(world: World, pushed: Pushed) -> list[str]:
    """Each message of a batch has become a dead letter or a job that has ended, or waits for its time; none of them both."""
    letters = [letter.message for letter in dead_letters.every_dead_letter(world.redis, QUEUE)]
    told = set(letters)
    waiting = {record for record in _records(world)}
    cut = sum("large" in letter.reason for letter in dead_letters.every_dead_letter(world.redis, QUEUE))
    lost: list[str] = []
    for raw in dict.fromkeys(pushed):
        text = raw.decode(errors="replace")
        if text in told or any(text in record for record in waiting):
            continue
        verdict, job_id = fate(raw)
        if verdict is Fate.LETTER and cut and len(raw) > 64 << 10:
            cut -= 1
        elif verdict is Fate.LETTER:
            lost.append(f"a message that must be refused is no dead letter: {raw[:300]!r}")
        elif verdict is Fate.JOB and not _final(world, str(job_id)):
            lost.append(f"a job has no final state and is no dead letter: {raw[:300]!r}")
    if len(letters) > len(pushed):
        lost.append(f"{len(letters)} dead letters of {len(pushed)} messages")
    return lost[:10]


def _records(world: World) -> Iterable[str]:
    records: Any = world.redis.hvals(KEYS["unacked_key"])
    return [record.decode(errors="replace") for record in records]


def _final(world: World, job_id: str) -> bool:
    state: Any = world.redis.hget(job_key(job_id), "state")
    return state is not None and JobState(state.decode()).final


def check_channels(world: World) -> list[str]:
    """The worker publishes events and replies, and nothing on the control channel or anywhere else."""
    found = []
    heard = dict(world.ear.heard)
    if heard.pop("/0.celery.pidbox", 0) > world.ear.expected:
        found.append("somebody else's message is on the control channel")
    fine = re.compile(r"/0\.celeryev/.*|pipefleet:done:[0-9a-f]{32}|pipefleet:cancelled")
    odd = [
        f"{count} messages on the channel {name[:120]!r}" for name, count in heard.items() if not fine.fullmatch(name)
    ]
    return [*found, *odd[:5]]


LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR|CRITICAL) [\w.]+: .*")


def check_log(world: World, start: int) -> list[str]:
    """What the worker wrote after byte `start` is one printable line for each record, and no traceback."""
    with world.log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="backslashreplace")
    found = []
    for record in _records_of(text.split("\n")[:-1]):
        first, *rest = record
        if any(line.strip() == "Traceback (most recent call last):" for line in rest):
            found.append(f"a traceback after {first[:200]!r}, which ends with {rest[-1].strip()[:300]!r}")
        elif rest:
            found.append(f"{len(rest)} lines that are no records after {first[:200]!r}: {rest[0][:100]!r}")
        if "forged.logger" in first[:60]:
            found.append(f"a forged record: {first[:200]!r}")
        if not all(_printable(line) for line in record):
            found.append(f"control characters in the log: {first[:200]!r}")
        if (longest := max(map(len, record))) > MOST_OF_A_LINE:
            found.append(f"a line of {longest} characters: {first[:200]!r}")
    return list({kind_of(one): one for one in found}.values())


def _records_of(lines: Sequence[str]) -> list[list[str]]:
    """Lines as records: each that begins as a record does, with those after it that do not."""
    records: list[list[str]] = []
    for line in lines:
        if LINE.fullmatch(line) or not records:
            records.append([line])
        else:
            records[-1].append(line)
    return records


def _printable(text: str) -> bool:
    """Whether a terminal shows a text as it is: nothing that moves, hides or turns it."""
    return (text.isascii() and text.isprintable()) or not any(category(one) in _UNSHOWN for one in text)


_UNSHOWN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def check_store(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Nothing is written outside of the fuzzer's own prefixes, and no object that was there before has changed.

    A job may put a result of its own name beside the parts of another's run, where no reader of the run looks.
    """
    own = tuple(
        uri.removeprefix("s3://pipefleet/")
        for uri in (HOST_URI, OUTPUTS, f"{BASE}map-", f"{BASE}fuzz-", f"{VICTIM_URI}fuzz-")
    )
    changed = [key for key, etag in before.items() if now.get(key) != etag and not key.startswith(own)]
    new = [key for key in now.keys() - before.keys() if not key.startswith((*own, "store/"))]
    return [f"the object {key!r} was changed" for key in changed] + [f"the object {key!r} was written" for key in new]


def check_commands(world: World) -> list[str]:
    """What an operator looks at ends well, and shows no control characters."""
    found = []
    for line in ("queues", "queues --json", "dead-letters", "dead-letters --json", "top --once", "top --json"):
        said, trouble = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(trouble):
                code: Any = command(line.split())
                said.flush()
        except Exception as error:  # noqa: BLE001 - a traceback is what is looked for
            found.append(f"`pipefleet {line}` raises {type(error).__name__}: {str(error)[:200]}")
            continue
        if code != 0:
            found.append(f"`pipefleet {line}` ends with {code}: {_written(trouble)[-200:]}")
        odd = next((one for one in _written(said).split("\n") if not _printable(one)), None)
        if odd is not None:
            found.append(f"`pipefleet {line}` prints control characters: {odd[:200]!r}")
    return found


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


def check_run(world: World, number: int) -> list[str]:
    """A good small run succeeds."""
    rows = [f"item {place}" for place in range(40)]
    run = world.client.map(TASK, rows, output=f"{BASE}map-{number}/", shard_size=8)
    progress = run.wait(timeout=60)
    return [] if (progress.state, progress.succeeded) == ("succeeded", 40) else [f"a good run ended as {progress}"]


def purge_letters(world: World) -> None:
    """Take the dead letters away, as an operator does."""
    world.redis.delete(KEYS["dead_key"])


def redis_bytes(world: World) -> int:
    """Bytes of data in Redis."""
    info: Any = world.redis.info("memory")
    return int(info["used_memory_dataset"])


def guarded(check: Callable[[], list[str]]) -> list[str]:
    """What a check finds; an error of its own is a finding as well."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - the other checks still say what is wrong
        return [f"a check failed: {type(error).__name__}: {str(error)[:300]}"]


def count_letters(world: World) -> int:
    """How many dead letters there are."""
    return dead_letters.count_dead_letters(world.redis, QUEUE)


def kind_of(wrong: str) -> str:
    """What a finding is, without its particulars: findings of one kind are taken for the same."""
    plain = re.sub(r"""'.*?'|".*?"|b'.*""", "", wrong)
    error = re.search(r"(\w+Error|\w+Exception)\b", wrong) if wrong.startswith("a traceback") else None
    kind = " ".join(word for word in plain.split() if not any(character.isdigit() for character in word))[:60]
    return f"{kind} {error[1]}" if error else kind
