"""Tasks whose input is text alone."""

from __future__ import annotations

from pipefleet_workers.adapters.generate import TextGenerator
from pipefleet_workers.adapters.text import FeatureExtractor, TextClassifier
from pipefleet_workers.runtime.row import TEXT, WRITING, TaskRuntime

ROWS = {
    "feature-extraction": TaskRuntime(FeatureExtractor, TEXT),
    "text-classification": TaskRuntime(TextClassifier, TEXT),
    "text-generation": TaskRuntime(TextGenerator, WRITING),
}
