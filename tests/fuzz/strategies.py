"""Families of messages as Hypothesis strategies. Each draws a burst: one message or a few that belong together.

A family can be run by itself: `python -m tests.fuzz --family replies`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from pipefleet.queues.celery import COST_HEADER, SHARD_HEADER, TIME_HEADER
from tests.fuzz.messages import (
    BASE,
    FORBIDDEN,
    GARBAGE,
    HOST,
    HOST_SHARDS,
    HOST_URI,
    ID,
    OTHER_TASKS,
    OUTPUTS,
    QUEUE,
    SHARD_FILES,
    VICTIM,
    VICTIM_URI,
    body_of,
    envelope,
    in_seconds,
    payload,
    shard_payload,
    spoiled,
    without,
    written,
)
from tests.fuzz.values import FORGED, anything, bomb, numbers, texts

Burst = tuple["Entry", ...]
Strategy = st.SearchStrategy[Any]
PIDBOX = "/0.celery.pidbox"


@dataclass(frozen=True, slots=True)
class Entry:
    """One element of a queue's Redis list. `step` is the place of the list among those of the queue's priorities."""

    raw: bytes
    step: int = 1


def raw_bytes() -> Strategy:
    """What is no message: any bytes, JSON of the wrong kind, a good message that is cut, flipped or repeated."""
    good = written(envelope())
    cut = st.integers(0, len(good)).map(lambda end: good[:end])
    flipped = st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)).map(
        lambda at: good[: at[0]] + bytes([at[1]]) + good[at[0] + 1 :]
    )
    deep = st.sampled_from([b"[" * 5000, b'{"a":' * 2000 + b"1" + b"}" * 2000, b"[" * 900 + b"]" * 900])
    odd = st.sampled_from([
        b"", b" ", b"\x00" * 50, b"\xff\xfe" + good, b"\xef\xbb\xbf" + good, good + good, good + b"\n", b"9" * 6000, b"NaN",
        b"1e999", b'"' + b"\\ud800" * 9 + b'"', good.replace(b'"body"', b'"body":"x","body"'), good.decode().encode("utf-16"),
    ])  # fmt: skip
    scalar = anything().map(written)
    any_bytes = st.binary(max_size=200)
    return single(weighted((1, any_bytes), (1, cut), (1, flipped), (1, deep), (2, odd), (1, scalar)))


def envelopes() -> Strategy:
    """A good job in an envelope with one part missing or wrong."""
    paths = [
        ("body",), ("content-type",), ("content-encoding",), ("headers",), ("properties",),
        *(("properties", name) for name in (
            "correlation_id", "reply_to", "delivery_mode", "delivery_tag", "delivery_info", "priority", "body_encoding",
            "type", "user_id", "expiration", "timestamp", "message_id", "content_type", "headers",
        )),
        *(("properties", "delivery_info", name) for name in ("exchange", "routing_key", "redelivered", "priority")),
    ]  # fmt: skip
    return single(changes(envelope(), paths).map(written) | changes(envelope(), paths).map(bare))


HEADERS = (
    *(
        "lang",
        "task",
        "id",
        "shadow",
        "group",
        "group_index",
        "retries",
        "timelimit",
        "root_id",
        "parent_id",
        "argsrepr",
    ),
    *(
        "kwargsrepr",
        "origin",
        "ignore_result",
        "replaced_task_nesting",
        "stamped_headers",
        "stamps",
        "compression",
        "chord",
    ),
    *("x-delivery-count", "x-retry-count", "redelivered", "traceparent", "tracestate", "callbacks", "errbacks", "utc"),
    *(COST_HEADER, TIME_HEADER, SHARD_HEADER),
)


def headers() -> Strategy:
    """A good job with a header that is missing, of another type, or beyond its bounds."""
    paths = [("headers", name) for name in HEADERS]
    odd: list[dict[str, Any]] = [
        {"stamped_headers": ["x"], "stamps": {"x": ["y"]}}, {"stamped_headers": ["x"]}, {"stamped_headers": "ab"},
        {"stamped_headers": [[]], "stamps": {}}, {"stamped_headers": ["x"], "stamps": []},
    ]  # fmt: skip
    stamps = st.sampled_from(odd).map(
        lambda one: written(spoiled(envelope(), ("headers",), {**envelope()["headers"], **one}))
    )
    return single(changes(envelope(), paths).map(written) | changes(envelope(), paths).map(bare) | stamps)


def times() -> Strategy:
    """`eta` and `expires`: in a moment, past, in years, with odd zones, and no times at all."""
    near = [in_seconds(seconds) for seconds in (-86_400, -1, 0.5, 2)]
    far = [in_seconds(days * 86_400) for days in (1, 400, 40_000)]
    ends = ["0001-01-01T00:00:00", "9999-12-31T23:59:59.999999", "9999-12-31T23:59:59-23:59", "1970-01-01T00:00:00Z"]
    odd = ["2026-02-30T00:00:00", "2026-01-01T25:00:00", "T", "+99999-01-01", "2026-01-01", "now", "inf", "2026-W01-1"]
    one = weighted((3, st.sampled_from([*near, *near, *far, *far, *ends])), (1, st.sampled_from(odd)), (1, anything()))

    def timed(pair: tuple[Any, Any, int]) -> bytes:
        message = spoiled(envelope(), ("headers", "eta"), pair[0])
        return written(spoiled(spoiled(message, ("headers", "expires"), pair[1]), ("properties", "priority"), pair[2]))

    return single(st.tuples(one, weighted((3, st.none()), (1, one)), st.sampled_from([0, 3, 9])).map(timed))


def codecs() -> Strategy:
    """Bodies that are compressed, encoded or of other types, small ones that become large among them."""
    compressions = [
        "application/x-bz2",
        "application/x-gzip",
        "application/x-lzma",
        "application/zstd",
        "bz2",
        "zlib",
        "gzip",
        "no.such",
    ]
    types = [
        *(
            "application/x-python-serialize",
            "application/x-yaml",
            "application/x-msgpack",
            "application/data",
            "text/plain",
        ),
        *("application/octet-stream", "", "application/JSON", "yaml", "pickle"),
    ]
    charsets = [
        "utf-8",
        "utf-16",
        "utf-7",
        "latin-1",
        "binary",
        "ascii",
        "rot13",
        "idna",
        "punycode",
        "zlib",
        "hex",
        "unicode_escape",
        "",
    ]
    bombs = st.sampled_from(
        [("bz2", "application/x-bz2"), ("gzip", "application/x-gzip"), ("lzma", "application/x-lzma")]
    )
    bodies = st.sampled_from(
        [body_of(payload()).encode(), b"", b"\x80\x04.", b"cos\nsystem\n(S'true'\ntR.", b"!!python/name:os.system"]
    )

    def packed(compression: str, body: bytes, base: bool = True) -> bytes:
        message = spoiled(envelope(), ("headers", "compression"), compression)
        message["body"] = base64.b64encode(body).decode() if base else body.decode("latin-1")
        message["properties"]["body_encoding"] = "base64" if base else "utf-8"
        return written(message)

    def typed(kind: str, charset: str, body: bytes, base: bool) -> bytes:
        message = spoiled(spoiled(envelope(), ("content-type",), kind), ("content-encoding",), charset)
        message["body"] = base64.b64encode(body).decode() if base else body.decode("latin-1")
        return written(spoiled(message, ("properties", "body_encoding"), "base64" if base else "utf-8"))

    exploding = bombs.map(lambda names: packed(names[1], bomb(names[0])))
    compressed = st.builds(packed, st.sampled_from(compressions), bodies, st.booleans())
    types_too = st.builds(
        typed, st.sampled_from([*types, "application/json"]), st.sampled_from(charsets), bodies, st.booleans()
    )
    # A bomb costs the worker of a fault hundreds of megabytes: one in a dozen shows that as well.
    return single(
        st.integers(0, 11).flatmap(lambda pick: exploding if pick == 0 else compressed if pick < 6 else types_too)
    )


def bodies() -> Strategy:
    """A good envelope whose body is no call of our task: other shapes, further arguments, callbacks and chains."""
    wants = {"task": "celery.ping", "args": [], "kwargs": {}, "options": {"queue": QUEUE}}
    embeds = [
        {"callbacks": [wants], "errbacks": [wants], "chain": [wants], "chord": wants},
        {"callbacks": "x"}, {"chain": {}}, {"chord": 1}, [], None, {"errbacks": [[]]},
    ]  # fmt: skip
    shapes = [
        [], {}, [[]], [[], {}], [[], {}, {}], [{}, {}, {}], [[payload(), payload()], {}, {}], [[], payload(), {}],
        [[payload()], {"x": 1}, {}], [[[payload()]], {}, {}], [[json.dumps(payload())], {}, {}], payload(), [payload()],
        "x", 1, None,
    ]  # fmt: skip
    odd = st.sampled_from([*shapes, *([[payload()], {}, embed] for embed in embeds)])
    free = st.sampled_from(["", "[", "nul", "[[1]", "NaN", '"\\ud800"', "\x00", "[" * 3000, '{"__type__":"uuid"}'])
    inner = weighted((2, odd.map(json.dumps)), (1, anything().map(json.dumps)), (1, free))
    return single(inner.map(lambda body: written({**envelope(), "body": body})))


def contracts() -> Strategy:
    """A good envelope around a job of which one field is missing, of another type, or beyond its bounds."""
    job = payload(model="x", revision="y", parameters={}, output=f"{OUTPUTS}{ID}", deadline=9e9, cost=1.0)
    paths: list[tuple[str, ...]] = [(name,) for name in job]
    fields = changes(job, [*paths, ("new-field",), ("shard",)])
    item: dict[str, Any] = {"id": "0", "inputs": "a text", "parameters": {}}
    items = changes(item, [("id",), ("inputs",), ("parameters",), ("more",)]).map(lambda one: payload(items=[one]))
    many = st.sampled_from([0, 2, 3000]).map(
        lambda count: payload(items=[{"id": str(place), "inputs": "x"} for place in range(count)])
    )
    of_task = st.tuples(
        st.sampled_from(["top_k", "function_to_apply", "truncation", "padding", "max_length", "evil"]), anything()
    )
    parameters = of_task.map(lambda pair: payload(parameters=dict([pair])))
    of_item = of_task.map(lambda pair: payload(items=[{**item, "parameters": dict([pair])}]))
    money = numbers().map(lambda cost: payload(cost=cost)) | numbers().map(lambda at: payload(deadline=at))
    job_ids = texts().map(lambda name: payload(id=name))
    jobs = weighted((3, fields), (2, items), (1, many), (1, parameters), (1, of_item), (2, money), (1, job_ids))
    return single(st.tuples(jobs, st.booleans()).map(lambda pair: written(envelope(pair[0]), escaped=pair[1])))


def inputs() -> Strategy:
    """A good job whose text is odd: empty, of control characters, of lone surrogates, long."""
    long = st.sampled_from(["word " * 9000, "x" * 50_000, "\x00" * 9000, "\U0001f600" * 9000, "a\n" * 9000])
    pair = st.tuples(texts(), texts()).map(lambda two: {"text": two[0], "text_pair": two[1]})
    one = weighted((2, texts()), (1, long), (1, pair), (1, anything()))
    return single(one.map(lambda value: written(envelope(payload(items=[{"id": "0", "inputs": value}])))))


CONTROL = [
    {"method": "shutdown", "arguments": {}, "destination": None, "pattern": None, "matcher": None},
    {"method": "revoke", "arguments": {"task_id": [ID], "terminate": True}, "destination": None},
    {"method": "cancel_consumer", "arguments": {"queue": QUEUE}, "destination": None},
    {"method": "add_consumer", "arguments": {"queue": "victim"}, "destination": None},
    {"method": "rate_limit", "arguments": {"task_name": "pipefleet.infer", "rate_limit": "1/h"}, "destination": None},
    {
        "method": "dump_conf",
        "arguments": {},
        "destination": None,
        "reply_to": {"exchange": "reply", "routing_key": "x"},
    },
]


def replies() -> Strategy:
    """Jobs that ask the worker to publish what is no reply: on the control channel, on others' channels."""
    known = st.sampled_from([
        PIDBOX, "/1.celery.pidbox", "/0.celeryev/task.failed", "/0.reply.celery.pidbox", "pipefleet:cancelled",
        "__keyspace@0__:x", "pipefleet:done:", "pipefleet:done:x", f"pipefleet:done:{'0' * 31}", f"pipefleet:done:{'0' * 33}",
        f"pipefleet:done:{'g' * 32}", f"pipefleet:done:{'0' * 32}\n", f" pipefleet:done:{'0' * 32}",
        f"pipefleet:done:{'A' * 32}",
    ])  # fmt: skip
    channels = weighted((2, st.just(PIDBOX)), (2, known), (1, texts()))
    message = st.sampled_from(CONTROL).map(lambda control: json.dumps({
        "body": base64.b64encode(json.dumps(control).encode()).decode(), "content-type": "application/json",
        "content-encoding": "utf-8", "headers": {}, "properties": {"body_encoding": "base64", "delivery_tag": "x",
        "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""}, "priority": 0},
    }))  # fmt: skip
    short = st.sampled_from(["shutdown", "pool_restart", "cancel_consumer", "ping"]).map(lambda method: json.dumps({
        "body": json.dumps({"method": method}, separators=(",", ":")), "content-type": "application/json",
        "content-encoding": "utf-8", "properties": {"delivery_tag": ""},
    }, separators=(",", ":")))  # fmt: skip
    names = weighted((1, st.sampled_from([ID, VICTIM])), (1, message), (3, short), (1, texts()))
    wrongs = st.sampled_from(
        [{}, {"deadline": 1.0}, {"parameters": {"evil": 1}}, {"task": "translation"}, {"model": "other"}]
    )

    def asks(channel: str, name: str, wrong: Mapping[str, Any], header: str) -> bytes:
        message = envelope(payload(id=name, reply=channel, **wrong))
        message["properties"]["reply_to"] = channel
        return written(spoiled(message, ("headers", "id"), name if header == "same" else ID))

    return single(st.builds(asks, channels, names, wrongs, st.sampled_from(["same", "other"])))


def uris() -> Strategy:
    """Jobs that read and write where they must not: another's run, forbidden prefixes, other schemes, no keys."""
    outside = [
        f"{VICTIM_URI}part-00000.jsonl", f"{VICTIM_URI}_SUCCESS", f"{VICTIM_URI}_run/run.json", f"{VICTIM_URI}_run/plan.json",
        f"{VICTIM_URI}_run/cancelled", f"{VICTIM_URI}part-00099.jsonl", f"{VICTIM_URI}_run/shards/00000.jsonl", VICTIM_URI,
        f"{VICTIM_URI}artifacts/00000003/x.json",
        f"{OUTPUTS}../victim/_SUCCESS", f"{OUTPUTS}../../forbidden/x", f"{VICTIM_URI}./_SUCCESS",
        f"{VICTIM_URI}_run//run.json", f"{VICTIM_URI}_run/stopped.json", f"{VICTIM_URI}_run/resumed.json",
        FORBIDDEN, f"{FORBIDDEN}x", f"{BASE}../forbidden/x", "s3://", "s3:///x", "s3://pipefleet", "s3://pipefleet/", "s3://no-such-bucket/x",
        "S3://pipefleet/fuzz/x", "s3://PIPEFLEET/x", "file:///etc/passwd", "http://127.0.0.1:1/x", "s3://pipefleet:80/fuzz/x",
        "s3://user@pipefleet/fuzz/x", f"{OUTPUTS}{'k' * 1500}", f"{OUTPUTS}a\x00b", f"{OUTPUTS}\x1b[2J", f"{OUTPUTS}\n{FORGED}",
        f"{OUTPUTS}\ud800",        f"{OUTPUTS}?versionId=x", f"{OUTPUTS}%2e%2e/x", f"{BASE}", "",
    ]  # fmt: skip
    uri = weighted((3, st.sampled_from(outside)), (1, texts().map(lambda text: OUTPUTS + text)))
    output = uri.map(lambda one: payload(output=one))

    def referring(one: str, etag: Any, size: Any, kind: Any) -> dict[str, Any]:
        fields = {"etag": etag, "size": size, "type": kind}
        reference = {"$ref": one, **{name: value for name, value in fields.items() if value is not None}}
        return payload(items=[{"id": "0", "inputs": reference}])

    odd = weighted((3, st.none()), (1, anything()))
    return single((output | st.builds(referring, uri, odd, odd, odd)).map(lambda job: written(envelope(job))))


def shards() -> Strategy:
    """Shards: positions beyond their run, lists that are garbage or another's, the runs of others, spoofed headers."""
    far = st.sampled_from([HOST_SHARDS, HOST_SHARDS + 1, 99_999, 2**31, 2**32 - 1, 2**32, 2**53, 2**63])
    files = st.sampled_from([f"{SHARD_FILES}{kind}.jsonl" for kind in GARBAGE])
    elsewhere = st.sampled_from(
        [
            f"{FORBIDDEN}secret",
            f"{VICTIM_URI}_run/plan.json",
            f"{HOST_URI}_run/plan.json",
            "file:///etc/passwd",
            "",
            f"{BASE}none",
        ]
    )
    index = st.integers(1, HOST_SHARDS - 1)
    good = index.map(lambda place: shard_payload(place))
    placed = st.tuples(st.sampled_from(["index", "first", "count"]), far | numbers()).map(
        lambda pair: shard_payload(1, **{f"shard__{pair[0]}": pair[1]})
    )
    lists = st.tuples(index, files | elsewhere).map(lambda pair: shard_payload(pair[0], shard__uri=pair[1]))
    owned = st.sampled_from(
        [f"{VICTIM_URI}", FORBIDDEN, BASE, "s3://no-such-bucket/x/", OUTPUTS, "", HOST_URI.rstrip("/")]
    )
    runs = st.sampled_from([VICTIM, HOST, ID, "", "x" * 300, f"a\n{FORGED}", "\ud800", "a:items"])
    of_others = st.builds(
        lambda run, uri, place, file: shard_payload(0, shard__run_id=run, shard__run_uri=uri, shard__index=place, shard__uri=file),
        runs, owned, st.sampled_from([0, 1, 7, 99]), files | st.just(f"{VICTIM_URI}_run/shards/00000.jsonl"),
    )  # fmt: skip
    formats = st.sampled_from(["parquet", "csv", "", "\x1b[2J", 7]).map(lambda one: shard_payload(2, shard__format=one))
    fields = changes(
        shard_payload(3), [("shard", name) for name in shard_payload()["shard"]] + [("shard", "more"), ("shard",)]
    )
    jobs = weighted((2, good), (3, placed), (3, lists), (3, of_others), (1, formats), (2, fields))
    spoofed = st.sampled_from([True, False, 1, "true", None, [], {}]).map(
        lambda mark: spoiled(envelope(), ("headers", SHARD_HEADER), mark)
    )
    unmarked = good.map(lambda job: without(envelope(job), ("headers", SHARD_HEADER)))
    named = st.tuples(good, texts()).map(lambda pair: envelope({**pair[0], "id": pair[1]}))
    whole = weighted((6, jobs.map(envelope)), (1, spoofed), (1, unmarked), (1, named))
    return single(whole.map(written))


def large() -> Strategy:
    """Messages of 60 kB to 2 MB: in the text, in an id, in a header, in a field that nobody knows, in many items."""
    sizes = st.sampled_from([60_000, 66_000, 100_000, 300_000, 2_000_000])
    fillers = st.sampled_from(["x", "word ", "\x00", "\u20ac", "\x1b[2J"])

    def filled_up(size: int, filler: str, where: str) -> bytes:
        text = filler * (size // len(filler))
        match where:
            case "text":
                return written(envelope(payload(items=[{"id": "0", "inputs": text}])))
            case "id":
                return written(envelope(payload(id=text)))
            case "header":
                return written(spoiled(envelope(), ("headers", "argsrepr"), text))
            case "unknown":
                return written(spoiled(envelope(), ("headers", "x-unknown"), [text]))
            case "items":
                return written(envelope(payload(items=[{"id": "0", "inputs": [[]] * (size // 8)}])))
            case "tag":
                return written(spoiled(envelope(), ("properties", "delivery_tag"), text))
        return text.encode()

    return single(
        st.builds(
            filled_up, sizes, fillers, st.sampled_from(["text", "id", "header", "unknown", "items", "tag", "raw"])
        )
    )


def tags() -> Strategy:
    """Delivery tags that several messages share, and tags that are odd."""
    one = (
        st.sampled_from(["", "x" * 512, "x" * 513, "\x00", "\ud800", f"\n{FORGED}", "\x1b[2J", "-inf", "+", "0", "a.b"])
        | anything()
    )
    odd = single(one.map(lambda tag: written(spoiled(envelope(), ("properties", "delivery_tag"), tag))))

    def shared(count: int, same: bool, steps: Sequence[int]) -> Burst:
        jobs = [
            payload() if same else payload(items=[{"id": "0", "inputs": f"text {place}"}]) for place in range(count)
        ]
        return tuple(Entry(written(envelope(job)), step) for job, step in zip(jobs, steps, strict=False))

    steps = st.lists(st.integers(0, 3), min_size=4, max_size=4)
    return odd | st.builds(shared, st.integers(2, 4), st.booleans(), steps)


def other_tasks() -> Strategy:
    """Well-formed messages of tasks that are none of ours, those that Celery itself registers among them."""
    arguments = st.sampled_from([
        [], [payload()], [{"task": "celery.ping", "args": [], "kwargs": {}}, [[]] * 3], ["x", [1, 2]],
        [[["celery.ping", []]], 1, 2],        ["group-id", None, 1, None, []],
    ])  # fmt: skip

    def call(task: str, args: list[Any], step: int) -> Burst:
        message = spoiled(envelope(), ("headers", "task"), task)
        message["body"] = json.dumps([args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
        return (Entry(written(message), step),)

    return st.builds(call, st.sampled_from(OTHER_TASKS), arguments, st.integers(0, 3))


def good() -> Strategy:
    """Jobs that succeed, in the midst of all the others."""
    words = st.integers(0, 40).map(lambda count: "word " * count + "end")
    return single(words.map(lambda text: written(envelope(payload(items=[{"id": "0", "inputs": text}])))))


def single(raw: st.SearchStrategy[bytes]) -> Strategy:
    """Bursts of one message, in the list of any priority."""
    return st.builds(lambda one, step: (Entry(one, step),), raw, st.integers(0, 3))


def bare(message: Any) -> bytes:
    """A message as UTF-8 rather than as escapes."""
    return written(message, escaped=False)


def weighted(*choices: tuple[int, Strategy]) -> Strategy:
    """One of several strategies, each with its weight; `|` would give every branch inside of them the same one."""
    return st.sampled_from([place for place, (weight, _) in enumerate(choices) for _ in range(weight)]).flatmap(
        lambda place: choices[place][1]
    )


def changes(good: Mapping[str, Any], paths: Sequence[tuple[str, ...]]) -> Strategy:
    """`good` with anything, or nothing, at one of the paths."""
    replaced = st.builds(lambda path, value: spoiled(good, path, value), st.sampled_from(list(paths)), anything())
    there = [path for path in paths if path[-1] in _at(good, path[:-1])]
    removed = st.sampled_from(there).map(lambda path: without(good, path))
    return replaced | replaced | replaced | removed


def _at(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = value[name]
    return value


FAMILIES: dict[str, Callable[[], Strategy]] = {
    "raw": raw_bytes, "envelopes": envelopes, "headers": headers, "times": times, "codecs": codecs, "bodies": bodies,
    "contracts": contracts, "inputs": inputs, "replies": replies, "uris": uris, "shards": shards, "large": large, "tags": tags,
    "tasks": other_tasks, "good": good,
}  # fmt: skip
SELDOM = {"large", "codecs"}
"""Families of which a few in a hundred suffice: each of their messages costs as much as hundreds of others."""


def bursts(families: Sequence[str] = ()) -> Strategy:
    """Bursts of these families, or of all."""
    names = list(families) or [name for name in FAMILIES for _ in range(1 if name in SELDOM else 4)]
    built = {name: FAMILIES[name]() for name in set(names)}
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), built[name]))
