"""Tiny random-weight checkpoints for every pipeline task, built offline and the same on every run.

from tests.checkpoints import CHECKPOINTS, build

folder = build("feature-extraction", tmp_path / "model")
sample = CHECKPOINTS["feature-extraction"]
pipeline(sample.task, model=folder)(sample.inputs(tmp_path)[0], **sample.parameters)
"""

from tests.checkpoints import audio, multimodal, text, vision
from tests.checkpoints.cache import build, cached, write
from tests.checkpoints.registry import CHECKPOINTS, Checkpoint

__all__ = [
    "CHECKPOINTS",
    "Checkpoint",
    "audio",
    "build",
    "cached",
    "multimodal",
    "text",
    "vision",
    "write",
]
