"""Hostile and clumsy inputs of every task: each ends with a code and one sentence, and the worker goes on serving.

Jobs are put into the queue as they are, past the producer's own checks: any program that reaches Redis can do so.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, Priority, encode_json
from pipefleet.contract.references import StorageRef, is_ref, map_refs, refs_in
from pipefleet.errors import JobError, JobFailedError, UsageError
from pipefleet.fleet.pools import Pool
from pipefleet.fleet.routing import queue_name
from pipefleet.inputs.uploads import RAW_AUDIO
from pipefleet.jobs.job import Job
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS, Media, TaskSpec, task_spec
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.stack import Stack
from tests.checkpoints import cached
from tests.checkpoints.media import audio, frames, image, image_bytes, jpeg_bytes, mp4_bytes, sound_bytes
from tests.parity.cases import CASES, Case
from tests.parity.in_process_worker import working

WAIT = 120
OTHER_KINDS = ("automatic-speech-recognition", "document-question-answering:donut", "visual-question-answering:blip")
"""Checkpoints whose adapters are not those of the first checkpoint of their task."""
FIRST_CASES = {
    case.checkpoint: case
    for case in reversed(CASES)
    if case.checkpoint in (next(one.checkpoint for one in CASES if one.task == case.task), *OTHER_KINDS)
}
SECRET = "PAYLOAD-7f3a"
"""Stands in what is sent, and must not stand in what is said about it."""
LONGEST = 600
"""Characters of a sentence."""
NOBODY = {"internal_error", "model_error", "failed", ""}
"""Codes that tell nobody what to do: a bad input has a better one."""
DANGEROUS: tuple[dict[str, Any], ...] = (
    {"trust_remote_code": True}, {"custom_generate": "/tmp/x"}, {"chat_template": "{{ 7 }}"}, {"timeout": 3},
    {"generate_kwargs": {"custom_generate": "/tmp/x", "trust_remote_code": True}}, {"tesseract_config": "--psm 1"},
    {"hypothesis_template": "{:>3000000}"}, {"tokenizer_encode_kwargs": {"chat_template": "{{ 7 }}"}},
)  # fmt: skip
LIMITS = {"MAX_PIXELS": "400000", "MAX_AUDIO_SECONDS": "60", "MAX_TEXT_BYTES": "100000", "MAX_OBJECT_BYTES": "2000000"}


@dataclass(frozen=True)
class Bad:
    """One job that should fail, or may succeed where `harmless`."""

    name: str
    inputs: Any
    parameters: dict[str, Any] = field(default_factory=dict)
    harmless: bool = False
    codes: frozenset[str] = frozenset()
    """What it must end with, where that is known."""


CODES = {
    "": {
        "empty": "empty_object", "not there": "not_found", "of another bucket": "not_found",
        "of another version": "changed", "too many bytes": "too_large",
    },
    "image": {
        "noise": "bad_media", "a recording": "bad_media", "a video": "bad_media", "an svg": "bad_media",
        "a playlist": "bad_media", "no text": "bad_media", "a picture cut short": "truncated_media",
        "a png cut short": "truncated_media", "too many pixels": "too_large",
    },
    "audio": {
        "noise": "bad_media", "a picture": "bad_media", "a video": "bad_media", "a playlist": "bad_media",
        "no text": "bad_media", "a wav cut short": "truncated_media", "a recording cut short": "truncated_media bad_media",
        "too many seconds": "too_large", "half a sample": "bad_media", "sound that is no number": "bad_media",
        "endless sound": "bad_media", "a wav without samples": "bad_media",
    },
    "video": {
        "noise": "bad_media", "a picture": "bad_media", "a recording": "bad_media", "a playlist": "bad_media",
        "a video cut short": "truncated_media",
    },
    "text": {"noise": "bad_media", "no text": "bad_media", "a picture": "bad_media", "too long a text": "too_large"},
}  # fmt: skip
"""By what is wanted (nothing: always) and what is there instead: the codes that say so."""


def pool_name(checkpoint: str) -> str:
    return checkpoint.replace(":", "-").replace("_", "-")


def nested(depth: int) -> Any:
    value: Any = SECRET
    for _ in range(depth):
        value = {"a": value}
    return value


STRANGE: dict[str, Any] = {
    "a number": 42, "nothing": None, "a boolean": True, "an empty list": [], "an empty dict": {}, "lists": [[[]]],
    "an unknown field": {"unknown": SECRET}, "a deep dict": nested(200), "a deeper dict": nested(900),
    "a list of numbers": [1, 2.5],
    "a path": "/etc/passwd", "an address": "http://169.254.169.254/" + SECRET, "a reference to a number": {"$ref": 5},
    "a reference to the web": {"$ref": "https://example.org/a.png"}, "a file": {"$ref": "file:///etc/passwd"},
    "a reference with more": {"$ref": "s3://pipefleet/x", "open": SECRET}, "base64": "data:image/png;base64," + SECRET,
}  # fmt: skip
"""In the place of a whole input, or of one of its fields."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis, S3 and a pool for every task; no workers."""
    folder, served = tmp_path_factory.mktemp("bad-inputs"), set[str]()
    fleet = folder / "fleet.toml"
    tables = []
    for checkpoint, case in FIRST_CASES.items():
        default = "" if case.task in served else "default = true\n"
        served.add(case.task)
        table = f'task = "{case.task}"\nmodel = "{cached(checkpoint)}"\n{default}'
        tables.append(f"[pools.{pool_name(checkpoint)}]\n{table}")
    fleet.write_text("\n".join(tables))
    limits = {f"PIPEFLEET_WORKER_{name}": value for name, value in LIMITS.items()}
    with Stack(folder / "data", fleet=fleet, pools=(), flower=False) as one:
        with in_environment({**one.environment(), **limits}):
            yield one


@pytest.fixture(scope="module")
def objects(stack: Stack) -> dict[str, StorageRef]:
    """Objects that are wrong in one way or another, by what is wrong with them."""
    store, wave, picture = ObjectStore(), audio(1.0, "speech"), image(64, 48)
    nan = wave.copy()
    nan[100:200] = np.nan
    noise = np.random.default_rng(1).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    contents: dict[str, tuple[bytes, str | None]] = {
        "empty": (b"", None),
        "noise": (np.random.default_rng(0).bytes(5000), None),
        "noise that says it is a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "image/png"),
        "a picture cut short": (jpeg_bytes(picture)[:-400], "image/jpeg"),
        "a png cut short": (image_bytes(picture)[:-900], "image/png"),
        "a recording cut short": (sound_bytes(wave, "FLAC")[:-9000], "audio/flac"),
        "a wav cut short": (sound_bytes(wave, "WAV")[:-9000], "audio/wav"),
        "a wav without samples": (sound_bytes(wave[:0], "WAV"), "audio/wav"),
        "a video cut short": (mp4_bytes(frames(12))[:-3000], "video/mp4"),
        "a picture": (image_bytes(picture), "image/png"),
        "a recording": (sound_bytes(wave, "WAV"), "audio/wav"),
        "a video": (mp4_bytes(frames(12)), "video/mp4"),
        "no text": (b"\xff\xfe\x00" + SECRET.encode(), "text/plain"),
        "a playlist": (b"#EXTM3U\nfile:///etc/passwd\n", "audio/x-mpegurl"),
        "an svg": (
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
            "image/svg+xml",
        ),
        "too many pixels": (image_bytes(image(900, 600)), "image/png"),
        "too many seconds": (sound_bytes(audio(61.0, "sine", 8000), "FLAC", 8000), "audio/flac"),
        "too long a text": (b"word " * 30_000, "text/plain"),
        "too many bytes": (noise.tobytes() * 2, None),
        "one pixel": (image_bytes(image(1, 1)), "image/png"),
        "a hundredth of a second": (sound_bytes(audio(0.01), "WAV"), "audio/wav"),
        "one sample": (b"\0\0\0\0", RAW_AUDIO),
        "half a sample": (b"\0\0\0\0\0", RAW_AUDIO),
        "sound that is no number": (nan.astype("<f4").tobytes(), RAW_AUDIO),
        "endless sound": (np.full(16_000, np.inf, "<f4").tobytes(), RAW_AUDIO),
        "silence": (np.zeros(16_000, "<f4").tobytes(), RAW_AUDIO),
        "a line of json": (b'{"a": [1, 2', "application/json"),
    }
    found = {}
    for name, (content, media) in contents.items():
        uri = f"s3://pipefleet/bad/{name.replace(' ', '-')}"
        store.put(uri, content)
        found[name] = StorageRef(uri, type=media)
    found["not there"] = StorageRef("s3://pipefleet/bad/none")
    found["of another bucket"] = StorageRef("s3://no-such-bucket/none")
    found["of another version"] = StorageRef(found["a picture"].uri, etag='"0123456789abcdef0123456789abcdef"')
    return found


def bad_objects(prepared: Any, objects: dict[str, StorageRef]) -> Iterator[Bad]:
    """The good input with a bad object wherever one lies, or where a text stands."""
    types = [one.type or "" for one in refs_in(prepared)]
    wanted = types[0].partition("/")[0] if types else "text"
    for name, reference in objects.items():
        codes = {**CODES[""], **CODES[wanted]}.get(name, "")
        inputs = replaced(prepared, reference.to_json())
        yield Bad(f"{name} (object)", inputs, harmless=not codes, codes=frozenset(codes.split()))


def replaced(value: Any, other: Any) -> Any:
    """`value` with `other` for every reference; where it has none, for every text of a dict, or for itself."""
    if map_refs(value, lambda _: None) != value:
        return map_refs(value, lambda _: other)
    if isinstance(value, dict) and not is_ref(value):
        return {name: other if isinstance(one, str) else one for name, one in value.items()}
    return other


def bad_fields(spec: TaskSpec, prepared: Any) -> Iterator[Bad]:
    """Fields that are missing, unknown or of another kind."""
    if not isinstance(prepared, dict) or is_ref(prepared):
        return
    for name in prepared:
        yield Bad(f"without {name}", {key: one for key, one in prepared.items() if key != name}, harmless=True)
        for what, value in STRANGE.items():
            yield Bad(f"{what} as {name}", {**prepared, name: value}, harmless=True)
    yield Bad("a field too many", {**prepared, "unknown": SECRET})


def bad_texts(prepared: Any) -> Iterator[Bad]:
    for what, text in {
        "empty text": "",
        "blanks": "   ",
        "control characters": "\x00\x07\x1b[31m",
        "emoji": "🙂" * 50,
    }.items():
        yield Bad(what, texts_replaced(prepared, text), harmless=True)
    yield Bad("a very long text", texts_replaced(prepared, f"{SECRET} " * 3000), harmless=True)


def texts_replaced(value: Any, text: str) -> Any:
    if isinstance(value, str):
        return text
    if isinstance(value, dict) and not is_ref(value):
        kept = ("role", "type")
        return {name: one if name in kept else texts_replaced(one, text) for name, one in value.items()}
    return [texts_replaced(one, text) for one in value] if isinstance(value, list) else value


def bad_parameters(spec: TaskSpec, prepared: Any, good: dict[str, Any]) -> Iterator[Bad]:
    yield Bad("an unknown parameter", prepared, {**good, "no_such_parameter": SECRET})
    for index, parameters in enumerate(DANGEROUS):
        yield Bad(f"dangerous parameter {index}", prepared, {**good, **parameters})
    for name in spec.parameters:
        yield Bad(f"{name} that is a deep dict", prepared, {**good, name: nested(50)})
    if "candidate_labels" in spec.parameters:
        for labels in ([], "", [""], ",", " , ", [1], None, ["a"] * 2000):
            yield Bad(f"labels {str(labels)[:20]}", prepared, {**good, "candidate_labels": labels}, harmless=True)


def bad_tables(prepared: Any) -> Iterator[Bad]:
    tables: tuple[Any, ...] = (
        {},
        {"a": []},
        {"a": ["1"], "b": []},
        {"a": "text"},
        {"a": [None, {}]},
        [],
        [{"a": 1}, 5],
    )
    for table in tables:
        yield Bad(f"table {table}", {**prepared, "table": table}, harmless=table == {"a": [None, {}]})


def every_bad(spec: TaskSpec, prepared: Any, good: dict[str, Any], objects: dict[str, StorageRef]) -> Iterator[Bad]:
    takes_text = spec.media in (Media.TEXT, Media.TEXTS, Media.PROMPT)
    for name, value in STRANGE.items():
        harmless = (takes_text and isinstance(value, str)) or spec.media is Media.DATA
        yield Bad(name, value, dict(good), harmless=harmless)
    for bad in (*bad_objects(prepared, objects), *bad_fields(spec, prepared), *bad_texts(prepared)):
        yield replace(bad, parameters=dict(good))
    yield from bad_parameters(spec, prepared, good)
    if "table" in spec.fields:
        yield from bad_tables(prepared)


def sent(client: Client, pool: Pool, bad: Bad) -> Job:
    """The job in its queue, past the checks of `Client.submit`."""
    spec = task_spec(pool.task)
    inputs = spilled(client, spec, bad.inputs)
    message = JobMessage(
        uuid.uuid4().hex,
        spec.name,
        pool.model,
        parameters=bad.parameters,
        items=(JobItem("0", inputs),),
        reply=client.watcher.channel,
    )
    return client._enqueue(message, queue_name(pool, client.fleet), Priority.NORMAL, None)


def spilled(client: Client, spec: TaskSpec, inputs: Any) -> Any:
    """`inputs` as a producer sends what is too long for a message."""
    return client.preparer(spec).spill(inputs) if len(json.dumps(inputs)) > client.settings.inline_bytes else inputs


def complaint(bad: Bad, job: Job) -> str | None:
    """What is wrong with how a job ended, or None."""
    try:
        job.result(WAIT)
        return None if bad.harmless else f"{bad.name}: it succeeded"
    except JobFailedError as error:
        text = str(error)
    except JobError as error:
        return f"{bad.name}: {type(error).__name__}: {error}"
    wrong = [
        what
        for what, found in {
            "tells nobody what to do": error_code(text) in NOBODY,
            f"should be {set(bad.codes)}": bool(bad.codes) and error_code(text) not in bad.codes,
            "repeats what was sent": SECRET in text,
            "is long": len(text) > LONGEST,
            "has several lines": "\n" in text,
            "is a traceback": "Traceback" in text or 'File "' in text,
        }.items()
        if found
    ]
    return f"{bad.name}: {', '.join(wrong)}: {text[:300]}" if wrong else None


def error_code(text: str) -> str:
    return text.rpartition("(code ")[2].partition(",")[0]


@pytest.mark.parametrize("case", FIRST_CASES.values(), ids=lambda case: case.checkpoint)
def test_whatever_is_sent_ends_with_a_code_and_the_worker_goes_on(
    case: Case, stack: Stack, objects: dict[str, StorageRef], tmp_path: Path
) -> None:
    spec, call = task_spec(case.task), case.calls(tmp_path)[0]
    with Client() as client:
        pool = client.fleet.pools[pool_name(case.checkpoint)]
        prepared, good = client.preparer(spec).prepare(call.inputs), dict(call.parameters)
        with working(client.fleet, pool, client.settings):
            before = client.submit(case.task, call.inputs, model=pool.model, parameters=good).result(WAIT)
            attempts = list(every_bad(spec, prepared, good, objects))
            jobs = [(bad, sent(client, pool, bad)) for bad in attempts]
            complaints = [found for bad, job in jobs if (found := complaint(bad, job))]
            after = client.submit(case.task, call.inputs, model=pool.model, parameters=good).result(WAIT)
    assert not complaints, "\n".join(complaints)
    assert type(before) is type(after)


class Foreign:
    """Nothing that any task takes."""

    def __repr__(self) -> str:
        return SECRET


CLUMSY: dict[str, Any] = {
    "an object": Foreign(), "a class": Foreign, "a set": {1}, "a matrix": np.zeros((2, 2, 2)), "a function": len, "none": None,
    "a number": 4.5, "a deep dict": nested(5000), "bytes": b"", "a file that is not there": Path("none") / SECRET[:3],
    "no files": [Path("none"), 3], "half a character": {"text": "\ud800"}, "a list that holds itself": [],
}  # fmt: skip
CLUMSY["a list that holds itself"].append(CLUMSY["a list that holds itself"])


def refusal(call: Callable[[], Any]) -> str:
    """What a call is refused with; nothing where it is not."""
    try:
        call()
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_producer_refuses_what_no_worker_could_read(task: str, stack: Stack) -> None:
    """With one sentence and before anything is queued; what it does not refuse is for the worker to judge."""
    spec = task_spec(task)
    given = {**CLUMSY, **{f"{what} as {name}": {name: one} for what, one in CLUMSY.items() for name in spec.fields}}
    with Client() as client:
        preparer = client.preparer(spec)
        for what, value in given.items():
            sentence = refusal(lambda one=value: encode_json(preparer.prepare(one)))
            assert SECRET not in sentence, what
            assert "\n" not in sentence, what
            assert len(sentence) < LONGEST, what


def test_every_task_is_attacked() -> None:
    assert {case.task for case in FIRST_CASES.values()} == set(TASKS)
