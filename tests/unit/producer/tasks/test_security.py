"""Attacks on a worker through its jobs: strings in the place of media, references, what errors tell, objects in messages.

The tests loop over TASKS, so a new row is covered as soon as it exists.
"""

from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Mapping
from typing import Any

import pytest

from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.contract.references import StorageRef
from pipefleet.errors import InputError, ParameterError, PipefleetError, ServiceUnavailableError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.queues.celery import celery_app
from pipefleet.settings import Settings
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS, Media, TaskSpec
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import Blob, ItemError
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from tests.checkpoints.media import image, image_bytes
from tests.parity.harness import load
from tests.unit.attacks import EVERY_TASK, LISTED, LONG, MARKER, MEDIA, around, decode, positions, refusal, used, work

STRINGS = [
    "http://169.254.169.254/latest/meta-data/",
    "https://example.org/cat.jpg",
    "file:///etc/passwd",
    "/etc/passwd",
    "cat.jpg",
    "concat:/etc/passwd|/etc/hosts",
    "https://www.youtube.com/watch?v=dQw4w9WgXcQ",
    "data:image/png;base64," + base64.b64encode(image_bytes(image(4, 4))).decode(),
    base64.b64encode(image_bytes(image(4, 4))).decode(),
    "s3://other/bucket.png",
]


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the network nor a file may be opened."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the decoder opened what a job named")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr("builtins.open", forbidden)
    monkeypatch.setattr(io, "open", forbidden)


def test_every_kind_of_medium_is_attacked_below() -> None:
    found = {media for spec in TASKS.values() for media, _ in positions(spec)}
    assert {Media.IMAGE, Media.AUDIO} <= found
    assert {one for spec in TASKS.values() for one in (spec.media, *spec.fields.values())} <= {
        *MEDIA, Media.TEXT, Media.TEXTS, Media.PROMPT, Media.LABELS, Media.DATA, None
    }, "a new kind of medium: say here how it is attacked"  # fmt: skip


@EVERY_TASK
def test_a_string_in_the_place_of_a_medium_is_never_opened(spec: TaskSpec, sealed: None) -> None:
    for media, put in positions(spec):
        for text in STRINGS:
            for value in (*around(media, text), *around(media, {"url": text}), *around(media, {"path": text})):
                assert refusal(spec, put(value))[0] == "bad_input", (media, value)


@EVERY_TASK
def test_a_string_for_a_medium_inside_a_chat_is_never_opened(spec: TaskSpec, sealed: None) -> None:
    if Media.PROMPT not in (spec.media, *spec.fields.values()):
        return
    field = next((name for name, media in spec.fields.items() if media is Media.PROMPT), None)
    for text in STRINGS:
        for kind in ("image", "audio", "video", "file", "image_url"):
            parts = [{"type": kind, key: text} for key in (kind, "url", "path", "base64", "content")]
            for part in (*parts, {"type": kind, kind: {"url": text}}, {"type": "text", "text": "a", kind: text}):
                chat = [{"role": "user", "content": [{"type": "text", "text": "look:"}, part]}]
                for inputs in (chat, {field: chat}) if field else (chat,):
                    assert refusal(spec, inputs)[0] == "bad_input", part


@pytest.mark.parametrize("extra", ["tools", "documents", "chat_template", "image", "url"])
def test_messages_of_a_chat_hold_nothing_beside_role_and_content(extra: str) -> None:
    for spec in TASKS.values():
        if spec.media is Media.PROMPT:
            assert refusal(spec, [{"role": "user", "content": "hello", extra: "x"}])[0] == "bad_input"


@EVERY_TASK
def test_the_producer_sends_no_web_address_as_a_medium(spec: TaskSpec, sealed: None) -> None:
    preparer = InputPreparer(spec, ObjectStore(), "s3://pipefleet/uploads", inline_bytes=1000).dry()
    for media, put in positions(spec):
        if media is not Media.TABLE:
            for text in STRINGS[:2]:
                for value in (
                    [text, [text]] if media in LISTED else [[text, text] if media is Media.IMAGE_PAIR else text]
                ):
                    with pytest.raises(InputError, match="workers fetch nothing from the web"):
                        preparer.prepare(put(value))


def test_words_in_a_chat_are_never_rendered() -> None:
    pipe = load("text-generation")
    attack = "{{ 7 * 7 }}{% for i in range(3) %}x{% endfor %}"
    chat = [{"role": "user", "content": attack}]
    rendered = pipe.tokenizer.apply_chat_template(decode(TASKS["text-generation"], chat), tokenize=False)
    assert attack in rendered


@EVERY_TASK
def test_references_outside_of_the_allowed_prefixes_are_not_read(spec: TaskSpec, sealed: None) -> None:
    settings = WorkerSettings(allowed_uris="s3://media/public/, s3://inputs")
    fetcher = Fetcher(WorkerStore(), settings)
    outside = ("s3://media/private/x", "s3://media/publicly/x", "s3://inputs-of-others/x", "s3://other/media/public/x")
    for uri in outside:
        reference = StorageRef(uri).to_json()
        chat = [{"role": "user", "content": [{"type": "image", "image": reference}]}]
        for inputs in (reference, [reference], {name: reference for name in spec.fields} or reference, chat):
            with pytest.raises(ItemError) as caught:
                fetcher.fetch(work(inputs))
            assert caught.value.failure.code == "forbidden"
    for uri in ("s3://media/public/../private/x", "s3://media/public/./../../x"):
        with pytest.raises(ItemError) as caught:
            fetcher.fetch(work(StorageRef(uri).to_json()))
        assert caught.value.failure.code in ("bad_input", "forbidden")


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1/x", "file:///etc/passwd", "/etc/passwd", "s3:/x", "s3://", "gs://b/k"]
)
def test_a_reference_is_an_s3_uri(uri: str, sealed: None) -> None:
    with pytest.raises(PipefleetError):
        Fetcher(WorkerStore(), WorkerSettings()).fetch(work({"$ref": uri}))


@EVERY_TASK
def test_errors_never_echo_what_was_sent(spec: TaskSpec) -> None:
    """The names and values of parameters, bytes of media, texts and JSON, all of them long."""
    messages = []
    for parameters in (
        {LONG: 1},
        *({name: value} for name in spec.parameters for value in (LONG, {LONG: 1}, [LONG * 20], {"x": {LONG: LONG}})),
    ):
        try:
            spec.check(parameters)
        except ParameterError as error:
            messages.append(str(error))
    assert messages
    garbage = Blob("s3://bucket/key", LONG.encode() + b"\xff", None)
    kinds = tuple(Media)
    for media, put in positions(spec, kinds):
        for value in (
            *around(media, garbage),
            *around(media, 3),
            *around(media, {LONG: LONG}),
            *around(media, [LONG, 3]),
        ):
            try:
                used(decode(spec, put(value)))
            except ItemError as error:
                messages.append(error.failure.message)
    for message in messages:
        assert message.count(MARKER) <= 40 // len(MARKER) + 1, message[:200]
        assert len(message) < 2000


PASSWORD = "hunter2-password"


def test_errors_never_show_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        socket.socket() as taken
    ):  # bound and not listening: connections are refused, and nobody else can have the port
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        url = f"redis://worker:{PASSWORD}@127.0.0.1:{port}/0"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:{PASSWORD}@127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
        with pytest.raises(ServiceUnavailableError) as redis, redis_errors(url):
            connect(Settings(redis_url=url)).ping()  # type: ignore[call-arg]
        with pytest.raises(PipefleetError) as store:
            WorkerStore(retries=0, retry_seconds=0.1).get(StorageRef("s3://bucket/key"))
        with pytest.raises(PipefleetError) as listing:
            ObjectStore().head("s3://bucket/key")
    for caught in (redis, store, listing):
        assert PASSWORD not in str(caught.value)
        assert str(port) in str(caught.value) or "S3" in str(caught.value)


def test_only_json_is_read_from_the_queue() -> None:
    app = celery_app(Settings())
    assert set(app.conf.accept_content) == {"json"}
    assert app.conf.task_serializer == "json"
    assert app.conf.result_serializer == "json"


def test_objects_smuggled_as_json_stay_json() -> None:
    """kombu's JSON can carry tagged objects (`__type__`); a worker must not build them out of a job's inputs."""
    content = json.dumps({"__type__": "datetime", "__value__": LONG})
    for spec in TASKS.values():
        for media, put in positions(spec, (Media.DATA,)):
            found = decode(spec, put(Blob("s3://bucket/data", content.encode(), None)))
            assert media
            assert any(isinstance(one, Mapping) and "__type__" in one for one in (found, *found.values()))


def test_the_loader_trusts_no_code_by_default() -> None:
    from pipefleet.fleet.pools import Pool

    assert Pool("p", "text-classification", "/m").trust_remote_code is False
