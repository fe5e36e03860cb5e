"""The worker's half of the task table: how each task is decoded, batched and finished. `RUNTIME` is the whole of it.

Rows have the names of `pipefleet.tasks.TASKS`. What is decoded follows from the media in the producer's row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.generate import TextGenerator
from pipefleet_workers.adapters.speech import SpeechRecogniser
from pipefleet_workers.adapters.text import FeatureExtractor, TextClassifier


@dataclass(frozen=True, slots=True)
class TaskRuntime:
    """One row: the adapter, items a stage handles at a time, and the padded cost of a batch on CPU and on a GPU.

    Costs count what the adapter pads: tokens of a text (read and written), frames of a recording, elements of a picture's tensor.
    """

    adapter: type[Adapter]
    slice_items: int
    cpu_cost: int
    gpu_cost: int


_TEXT = {"slice_items": 32, "cpu_cost": 2048, "gpu_cost": 65_536}
_IMAGE = {"slice_items": 2, "cpu_cost": 16 * 150_528, "gpu_cost": 256 * 150_528}
_WRITING = {"slice_items": 8, "cpu_cost": 4096, "gpu_cost": 32_768}
_SPEECH = {"slice_items": 1, "cpu_cost": 8 * 4500, "gpu_cost": 64 * 4500}

RUNTIME: Mapping[str, TaskRuntime] = MappingProxyType(
    {
        "feature-extraction": TaskRuntime(FeatureExtractor, **_TEXT),
        "text-classification": TaskRuntime(TextClassifier, **_TEXT),
        "text-generation": TaskRuntime(TextGenerator, **_WRITING),
        "automatic-speech-recognition": TaskRuntime(SpeechRecogniser, **_SPEECH),
        "image-classification": TaskRuntime(Adapter, **_IMAGE),
    }
)
