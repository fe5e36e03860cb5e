"""One test for each way to attack a worker through its jobs. They loop over TASKS, so a new row is covered as soon as it exists."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import tracemalloc
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.contract.messages import MAX_MESSAGE_BYTES, JobItem
from pipefleet.contract.references import StorageRef
from pipefleet.errors import InputError, ParameterError, PipefleetError, ServiceUnavailableError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.inputs.uploads import RAW_AUDIO
from pipefleet.queues.celery import celery_app
from pipefleet.settings import Settings
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS, Media, TaskSpec
from pipefleet.tasks.checks import Check
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import Blob, Fetched, ItemError, JobContext, Work
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from tests.checkpoints.media import frames, image, image_bytes, mp4_bytes, wav_bytes
from tests.parity.harness import load

BOUNDS = {
    "max_pixels": 1_000_000,
    "max_audio_seconds": 5.0,
    "max_video_frames": 50,
    "max_text_bytes": 10_000,
}
MARKER = "S3CRET-"
LONG = MARKER * 1000
EVERY_TASK = pytest.mark.parametrize("spec", TASKS.values(), ids=list(TASKS))

# --- the parameters of a call


DANGEROUS = (
    # run code
    "custom_generate", "trust_remote_code", "code_revision", "pipeline_class", "custom_pipelines", "auto_map",
    "model_kwargs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer",
    "assistant_model", "assistant_tokenizer", "compile_config", "collate_fn", "decoder", "decoder_kwargs", "tokenizer",
    # render templates
    "chat_template", "processor_kwargs", "tools", "documents",
    # reach files, addresses and command lines
    "tesseract_config", "lang", "timeout", "token", "use_auth_token", "revision", "model", "config", "cache_dir",
    "voice_preset", "history_prompt", "url", "path", "proxies", "framework", "device", "device_map", "torch_dtype",
    "image_processor", "feature_extractor", "processor", "vocoder", "num_workers",
)  # fmt: skip


def nested(check: Check) -> Iterator[tuple[str, Check]]:
    """Every name that a check allows at any depth, with its own check: `mapping_of` and its kin keep them in their closures."""
    held = [cell.cell_contents for cell in getattr(check, "__closure__", None) or ()]
    while held:
        one = held.pop()
        if isinstance(one, Mapping):
            for name, inner in one.items():
                yield name, inner
                held.append(inner)
        elif isinstance(one, list | tuple):
            held.extend(one)
        elif isinstance(one, types.FunctionType):
            held.extend(cell.cell_contents for cell in one.__closure__ or ())


def allowed_names(spec: TaskSpec) -> Iterator[tuple[str, Check]]:
    for name, check in spec.parameters.items():
        yield name, check
        yield from nested(check)


def test_names_are_found_at_any_depth() -> None:
    names = {name for name, _ in allowed_names(TASKS["automatic-speech-recognition"])}
    assert {"chunk_length_s", "generate_kwargs", "language", "num_beams"} <= names


@EVERY_TASK
def test_no_row_allows_a_name_that_runs_code_renders_templates_or_reaches_files(spec: TaskSpec) -> None:
    assert not {name for name, _ in allowed_names(spec)} & set(DANGEROUS)


ATTACKS = [
    {"custom_generate": "/tmp/evil", "trust_remote_code": True},
    {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    {"tokenizer_encode_kwargs": {"chat_template": "{{ 1 }}"}},
    {"tesseract_config": "--tessdata-dir /etc", "lang": "eng /etc/passwd"},
    {"__class__": 1},
    {"generate_kwargs": {"generate_kwargs": {"custom_generate": "/tmp/evil"}}},
]


@EVERY_TASK
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: next(iter(attack)))
def test_dangerous_arguments_are_refused_wherever_they_stand(spec: TaskSpec, attack: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        spec.check(attack)
    for name in spec.parameters:
        for inner in (attack, [attack], {"generate_kwargs": attack}):
            with pytest.raises(ParameterError):
                spec.check({name: inner})


@EVERY_TASK
def test_no_parameter_takes_a_value_of_any_length(spec: TaskSpec) -> None:
    for name, check in allowed_names(spec):
        for huge in (
            "x" * 1_000_000,
            ["x"] * 1_000_000,
            {str(i): i for i in range(100_000)},
            10**400,
            1e400,
            [[]] * 10**5,
        ):
            assert check(huge) is not None, f"{name} takes a value without a bound"


TEMPLATES = [
    "{:>3000000}", "{0}", "{0.__class__.__mro__}", "{.__class__}", "{!r}", "{[0]}", "{}{}", "{} {:>9}", "{{}}", "{}{{", "{",
    "nothing", "{}" + "x" * 100_000, "", 3, ["{}"],
]  # fmt: skip


def test_templates_of_hypotheses_hold_one_plain_place() -> None:
    rows = [spec for spec in TASKS.values() if "hypothesis_template" in spec.parameters]
    assert rows
    for spec in rows:
        spec.check({"hypothesis_template": "This is a photo of {}."})
        for attack in TEMPLATES:
            with pytest.raises(ParameterError):
                spec.check({"hypothesis_template": attack})


# --- strings where media should stand


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
_SOUNDS, _FILMS = (Media.AUDIO, Media.AUDIOS), (Media.VIDEO, Media.VIDEOS)
_LISTED = {Media.IMAGES: Media.IMAGE, Media.AUDIOS: Media.AUDIO, Media.VIDEOS: Media.VIDEO}
_MEDIA = (Media.IMAGE, Media.IMAGES, Media.IMAGE_PAIR, *_SOUNDS, *_FILMS, Media.TABLE)
_BYTES = {
    Media.IMAGE: Blob("s3://bucket/picture", image_bytes(image(8, 8)), None),
    Media.AUDIO: Blob("s3://bucket/sound", wav_bytes(np.zeros(1600, np.float32)), None),
    Media.VIDEO: Blob("s3://bucket/clip", b"\0\0\0\x18ftypmp42", None),
}


def sample(media: Media) -> Any:
    """A value that the decoder takes."""
    picture = _BYTES[Media.IMAGE]
    match media:
        case Media.IMAGES | Media.IMAGE | Media.IMAGE_PAIR:
            return [picture, picture] if media is Media.IMAGE_PAIR else picture
        case Media.AUDIO | Media.AUDIOS | Media.VIDEO | Media.VIDEOS:
            return _BYTES[_LISTED.get(media, media)]
        case Media.TABLE:
            return {"a": ["1"]}
        case Media.LABELS | Media.TEXTS:
            return ["a", "b"]
        case _:
            return "a text"


def around(media: Media, value: Any) -> Iterator[Any]:
    """`value` in every form in which this kind of medium may come."""
    if media is Media.IMAGE_PAIR:
        yield [value, value]
        yield [sample(Media.IMAGE), value]
    else:
        yield value
    if media in _LISTED:
        yield [value]
        yield [sample(_LISTED[media]), value]


def positions(spec: TaskSpec, kinds: tuple[Media, ...] = _MEDIA) -> Iterator[tuple[Media, Callable[[Any], Any]]]:
    """Every place for a medium in the inputs of a task, with a function that puts a value there."""
    if spec.media in kinds:
        yield spec.media, lambda value: value
    for name, media in spec.fields.items():
        if media in kinds:
            rest = {other: sample(spec.fields[other]) for other in spec.required if other != name}
            # First, so that it is this one that is refused.
            yield media, lambda value, name=name, rest=rest: {name: value, **rest}


def decode(spec: TaskSpec, inputs: Any, **settings: Any) -> Any:
    decoder = Decoder(spec, WorkerSettings(**{**BOUNDS, **settings}), sampling_rate=16_000)
    return decoder.decode(Fetched(work(inputs), inputs)).value


def work(inputs: Any) -> Work:
    return Work(JobContext("job", None, {}, 3, None, None), 0, JobItem("0", inputs), {}, 1)  # type: ignore[arg-type]


def refusal(spec: TaskSpec, inputs: Any, **settings: Any) -> tuple[str, str]:
    with pytest.raises(ItemError) as caught:
        decode(spec, inputs, **settings)
    return caught.value.failure.code, caught.value.failure.message


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
        *_MEDIA, Media.TEXT, Media.TEXTS, Media.PROMPT, Media.LABELS, Media.DATA, None
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
                    [text, [text]] if media in _LISTED else [[text, text] if media is Media.IMAGE_PAIR else text]
                ):
                    with pytest.raises(InputError, match="workers fetch nothing from the web"):
                        preparer.prepare(put(value))


def test_words_in_a_chat_are_never_rendered() -> None:
    pipe = load("text-generation")
    attack = "{{ 7 * 7 }}{% for i in range(3) %}x{% endfor %}"
    chat = [{"role": "user", "content": attack}]
    rendered = pipe.tokenizer.apply_chat_template(decode(TASKS["text-generation"], chat), tokenize=False)
    assert attack in rendered


# --- bombs


def png_bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black points: a thousandth of the memory that they take."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 20_000])
def test_a_picture_is_measured_before_it_is_decoded(side: int) -> None:
    bomb = Blob("s3://bucket/bomb.png", png_bomb(side), None)
    assert len(bomb.content) < 100_000
    attacked = 0
    tracemalloc.start()
    for spec in TASKS.values():
        for media, put in positions(spec, (Media.IMAGE, Media.IMAGES, Media.IMAGE_PAIR)):
            for value in around(media, bomb):
                assert refusal(spec, put(value))[0] == "too_large"
                attacked += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert attacked
    assert peak < 16 << 20


def test_sound_is_measured_while_it_is_decoded() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(3600 * 4_000, np.float32), 4_000, format="FLAC")
    long = Blob("s3://bucket/silence.flac", buffer.getvalue(), None)
    raw = Blob("s3://bucket/samples", bytes(4 * 16_000 * 6), RAW_AUDIO)
    header = b"RIFF\x24\0\0\0WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 1, 2, 2, 16) + b"data" + struct.pack("<I", 4)
    slow = Blob("s3://bucket/slow.wav", header + b"\0\0\0\0", None)
    assert len(long.content) < 200_000
    for spec in TASKS.values():
        for media, put in positions(spec, _SOUNDS):
            for value in (*around(media, long), *around(media, raw)):
                assert refusal(spec, put(value))[0] == "too_large"
            for value in around(media, slow):
                assert refusal(spec, put(value))[0] == "bad_media", "a rate of 1 Hz would make 16,000 samples of one"


@EVERY_TASK
def test_texts_and_json_have_bounds(spec: TaskSpec) -> None:
    long = Blob("s3://bucket/long", b"x" * (BOUNDS["max_text_bytes"] + 1), None)  # type: ignore[operator]
    deep = Blob("s3://bucket/deep", b"[" * 9_000, None)
    for media, put in positions(spec, (Media.TEXT, Media.TEXTS, Media.PROMPT, Media.TABLE, Media.LABELS, Media.DATA)):
        assert refusal(spec, put(long))[0] == "too_large", media
        if media in (Media.TABLE, Media.LABELS, Media.DATA):
            assert refusal(spec, put(deep))[0] == "bad_media", media


def test_a_message_has_a_bound() -> None:
    assert MAX_MESSAGE_BYTES <= 64 * 1024


# --- files that name other files


SECRETS = {Media.AUDIO: "secret.wav", Media.VIDEO: "secret.mp4"}


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that no job may read."""
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "secret.wav", np.sin(np.arange(8000) / 20).astype("<f4"), 16_000)
    (tmp_path / "secret.mp4").write_bytes(mp4_bytes(frames(4)))
    return tmp_path


def playlists(name: str, folder: Path) -> dict[str, bytes]:
    """Small files that make FFmpeg open the file `name`."""
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    dash = '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{}</BaseURL></MPD>'
    return {
        "concat": f"ffconcat version 1.0\nfile {name}\n".encode(),
        "concat, absolute": f"ffconcat version 1.0\nfile {folder / name}\n".encode(),
        "hls": hls.format(name).encode(),
        "hls, absolute": hls.format(folder / name).encode(),
        "dash": dash.format(name).encode(),
        "sdp": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=audio 5004 RTP/AVP 0\r\n",
    }


def test_the_attack_works_where_nothing_holds_it_back(secrets: Path) -> None:
    for name in SECRETS.values():
        with av.open(io.BytesIO(playlists(name, secrets)["concat"])) as container:
            assert len(list(container.decode(container.streams[0]))) > 1


def test_playlists_open_no_other_file(secrets: Path) -> None:
    attacked = set()
    for spec in TASKS.values():
        for media, put in positions(spec, (*_SOUNDS, *_FILMS)):
            for name, content in playlists(SECRETS[_LISTED.get(media, media)], secrets).items():
                attacked.add(_LISTED.get(media, media))
                with pytest.raises(ItemError) as caught:
                    _used(decode(spec, put(Blob(f"s3://bucket/{name}", content, "video/mp4"))))
                assert caught.value.failure.code == "bad_media", (spec.name, name)
    assert attacked == set(SECRETS)


def _used(value: Any) -> None:
    """Clips are opened when frames are asked for."""
    for one in value.values() if isinstance(value, dict) else (value,):
        if hasattr(one, "frames"):
            one.frames([0])


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"P7 332\n",
        b"#define x_width 9\n#define x_height 9\nstatic char x_bits[] = {0};\n",
    ],
    ids=["postscript", "svg", "thumbnail", "bitmap"],
)
def test_formats_that_run_programs_or_name_files_are_no_pictures(content: bytes) -> None:
    for spec in TASKS.values():
        for media, put in positions(spec, (Media.IMAGE, Media.IMAGES, Media.IMAGE_PAIR)):
            for value in around(media, Blob("s3://bucket/picture", content, "image/png")):
                assert refusal(spec, put(value))[0] == "bad_media"


# --- references


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


# --- what errors tell


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
                _used(decode(spec, put(value)))
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


# --- messages


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
