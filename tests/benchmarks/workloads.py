"""What the contenders work on: a task, a model and inputs, the same for all of them, made from fixed seeds."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipefleet_workers.fleet.demo import assets, weights
from pipefleet_workers.inputs.sound.recordings import decode_audio
from pipefleet_workers.items import Blob
from tests.benchmarks.pictures import pictures, small_vit

SEED = 20_240_817
DISTINCT = 100
"""Pictures that are made; drawing one takes longer than classifying it."""
MODELS = Path.home() / ".cache" / "pipefleet" / "bench"


@dataclass(frozen=True)
class Workload:
    """One row group of the benchmark. `items` are texts, or the bytes of media files, by name."""

    name: str
    task: str
    model: str
    items: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    pool_parameters: dict[str, Any] = field(default_factory=dict)
    """What pipefleet is told in addition, where it returns something smaller than the pipeline does."""
    pipeline_parameters: dict[str, Any] = field(default_factory=dict)
    """What transformers' pipeline is told in addition, so that no time goes into what nobody reads."""
    slow_items: int | None = None
    """Contenders that take milliseconds for each item get the first so many only; None: all."""

    @property
    def is_text(self) -> bool:
        """True when the items are texts."""
        return isinstance(next(iter(self.items.values())), str)

    def first(self, count: int | None) -> Workload:
        """The same with its first `count` items; None: all."""
        return replace(self, items=dict(itertools.islice(self.items.items(), count)))


def texts(count: int) -> Workload:
    """Ragged texts: seven of ten of 6 to 18 words, the others of 60 to 230, embedded by MiniLM."""
    source = random.Random(SEED)
    words = assets.texts().read_text().split()
    lengths = [source.randint(6, 18) if source.random() < 0.7 else source.randint(60, 230) for _ in range(count)]
    items = {f"{index:05d}": " ".join(source.choices(words, k=length)) for index, length in enumerate(lengths)}
    return Workload(
        "texts", "feature-extraction", str(weights.minilm()), items,
        parameters={"truncation": True}, pool_parameters={"pooling": "mean"},
        pipeline_parameters={"return_tensors": True},
    )  # fmt: skip


def images(count: int) -> Workload:
    """JPEGs of 320x240 to 1920x1080, classified by a ViT of 5.5 M parameters."""
    return Workload(
        "images", "image-classification", str(small_vit(MODELS)), _again(pictures(min(count, DISTINCT), SEED), count)
    )


def speech(count: int) -> Workload:
    """Recordings of 1.5 to 25 s, transcribed by Whisper tiny.en with greedy search."""
    folder = weights.whisper_tiny_en(MODELS)
    files = {path.name: path.read_bytes() for path in assets.recordings()}
    short = {name: content for name, content in files.items() if 1.5 <= _seconds(name, content) <= 25}
    return Workload(
        "speech", "automatic-speech-recognition", str(folder), _again(dict(list(short.items())[:count]), count),
        parameters={"generate_kwargs": {"num_beams": 1}},
    )  # fmt: skip


def trivial(count: int) -> Workload:
    """Short texts and a classifier of two tiny layers: what is left is the cost of the system itself."""
    from tests.checkpoints import cached

    source = random.Random(SEED)
    words = assets.texts().read_text().split()
    items = {f"{index:06d}": " ".join(source.choices(words, k=source.randint(4, 8))) for index in range(count)}
    model = str(cached("text-classification"))
    return Workload("trivial", "text-classification", model, items, slow_items=2000)


def _again(items: dict[str, bytes], count: int) -> dict[str, bytes]:
    """`items`, and where they are fewer than `count` the same contents again under names of their own."""
    more = itertools.islice(itertools.cycle(items.items()), len(items), count)
    return items | {f"again-{index:05d}-{name}": content for index, (name, content) in enumerate(more)}


def _seconds(name: str, content: bytes) -> float:
    return len(decode_audio(Blob(name, content, None), rate=16_000, max_seconds=3600)) / 16_000


def decode_item(workload: Workload, name: str) -> Any:
    """One item as a pipeline takes it: a text, samples or a picture."""
    return decode(workload.task, workload.items[name])


def decode(task: str, content: str | bytes) -> Any:
    """The text, samples (16 kHz) or picture in `content`."""
    if isinstance(content, str):
        return content
    if task == "automatic-speech-recognition":
        return decode_audio(Blob("", content, None), rate=16_000, max_seconds=3600)
    from PIL import Image

    return Image.open(io.BytesIO(content)).convert("RGB")


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "texts": texts,
    "images": images,
    "speech": speech,
    "trivial": trivial,
}
COUNTS = {"texts": 400, "images": 100, "speech": 40, "trivial": 40_000}
QUICK_COUNTS = {"texts": 40, "images": 12, "speech": 3, "trivial": 600}
