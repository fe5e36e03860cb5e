"""What the tests of attacks share: a text that must never be echoed, and inputs decoded as a worker decodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pipefleet.contract.messages import JobItem
from pipefleet.tasks import TASKS, Media, TaskSpec
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.items import Blob, Fetched, ItemError, JobContext, Work
from pipefleet_workers.settings import WorkerSettings
from tests.checkpoints.media import image, image_bytes, wav_bytes

BOUNDS = {
    "max_pixels": 1_000_000,
    "max_audio_seconds": 5.0,
    "max_video_frames": 50,
    "max_text_bytes": 10_000,
}
MARKER = "S3CRET-"
LONG = MARKER * 1000
EVERY_TASK = pytest.mark.parametrize("spec", TASKS.values(), ids=list(TASKS))
SOUNDS, FILMS = (Media.AUDIO, Media.AUDIOS), (Media.VIDEO, Media.VIDEOS)
LISTED = {Media.IMAGES: Media.IMAGE, Media.AUDIOS: Media.AUDIO, Media.VIDEOS: Media.VIDEO}
MEDIA = (Media.IMAGE, Media.IMAGES, Media.IMAGE_PAIR, *SOUNDS, *FILMS, Media.TABLE)
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
            return _BYTES[LISTED.get(media, media)]
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
    if media in LISTED:
        yield [value]
        yield [sample(LISTED[media]), value]


def positions(spec: TaskSpec, kinds: tuple[Media, ...] = MEDIA) -> Iterator[tuple[Media, Callable[[Any], Any]]]:
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


def used(value: Any) -> None:
    """Clips are opened when frames are asked for."""
    for one in value.values() if isinstance(value, dict) else (value,):
        if hasattr(one, "frames"):
            one.frames([0])
