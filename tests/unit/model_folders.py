"""What the tests of loading models share: the pool of a model, and the sentence with which its loading is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipefleet.fleet.pools import Pool
from pipefleet_workers.models.cache import ModelError
from pipefleet_workers.models.load import load_pipeline

TASK = "text-classification"
SPEECH = "automatic-speech-recognition"
TEXT = "The food was very good."


def pool(model: Path | str, task: str = TASK, **fields: Any) -> Pool:
    return Pool("texts", task, str(model), **fields)


def refusal(wanted: Pool) -> str:
    with pytest.raises(ModelError) as caught:
        load_pipeline(wanted)
    sentence = str(caught.value)
    assert "texts" in sentence
    assert "\n" not in sentence
    assert len(sentence) < 700
    return sentence
