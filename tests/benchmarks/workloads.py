"""What the contenders work on: a task, a model and inputs, the same for all of them, made from fixed seeds."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipefleet_workers.demo import assets, weights
from pipefleet_workers.items import Blob
from pipefleet_workers.media.audio import decode_audio

SEED = 20_240_817
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

    @property
    def is_text(self) -> bool:
        """True when the items are texts."""
        return isinstance(next(iter(self.items.values())), str)


def texts(count: int) -> Workload:
    """Ragged texts: seven of ten of 6 to 18 words, the others of 60 to 230, embedded by MiniLM."""
    source = random.Random(SEED)
    words = assets.texts().read_text().split()
    lengths = [source.randint(6, 18) if source.random() < 0.7 else source.randint(60, 230) for _ in range(count)]
    items = {f"{index:05d}": " ".join(source.choices(words, k=length)) for index, length in enumerate(lengths)}
    return Workload(
        "texts", "feature-extraction", str(weights.minilm()), items,
        parameters={"truncation": True}, pool_parameters={"pooling": "mean"},
    )  # fmt: skip


def speech(count: int) -> Workload:
    """Recordings of 1.5 to 25 s, transcribed by Whisper tiny.en with greedy search."""
    folder = weights.whisper_tiny_en(MODELS)
    files = {path.name: path.read_bytes() for path in assets.recordings()}
    short = {name: content for name, content in files.items() if 1.5 <= _seconds(name, content) <= 25}
    return Workload(
        "speech", "automatic-speech-recognition", str(folder), dict(list(short.items())[:count]),
        parameters={"generate_kwargs": {"num_beams": 1}},
    )  # fmt: skip


def _seconds(name: str, content: bytes) -> float:
    return len(decode_audio(Blob(name, content, None), rate=16_000, max_seconds=3600)) / 16_000


def decoded(workload: Workload) -> list[Any]:
    """The items as a pipeline takes them: texts, samples or pictures."""
    return [decode_item(workload, name) for name in workload.items]


def decode_item(workload: Workload, name: str) -> Any:
    """One item as a pipeline takes it."""
    content = workload.items[name]
    if isinstance(content, str):
        return content
    if workload.task == "automatic-speech-recognition":
        return decode_audio(Blob(name, content, None), rate=16_000, max_seconds=3600)
    from PIL import Image

    return Image.open(io.BytesIO(content)).convert("RGB")


WORKLOADS: dict[str, Callable[[int], Workload]] = {"texts": texts, "speech": speech}
DEFAULT_COUNTS = {"texts": 400, "speech": 16}
