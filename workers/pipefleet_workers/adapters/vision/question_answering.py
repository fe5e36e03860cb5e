"""The adapters of visual-question-answering: a picture and a question go in, scored or written answers come out.

ViLT scores the answers that it knows; pictures and questions of a batch are padded behind masks. BLIP and its kin write an answer;
only requests with equal shapes share a batch. A question with too many tokens raises ItemError (too_long).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.padding import pad
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.encoder import position_limit
from pipefleet_workers.adapters.writing.equal_shapes import EqualWriter
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

_WORDS = ("input_ids", "attention_mask", "token_type_ids")
_PICTURES = ("pixel_values", "pixel_mask")


class AnswerClassifier(Adapter):
    """Scores of answers. A `pixel_mask` hides padding from the model; without this mask only the questions are padded."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.pads = True
        self._positions = position_limit(pipe.model)

    def example(self, size: int) -> Any:
        """A picture of `size` times eight pixels, wider than high, and a question of up to ten words."""
        noise = np.random.default_rng(size).integers(0, 255, (size * 8, size * 10, 3), dtype=np.uint8)
        return {"image": Image.fromarray(noise), "question": " ".join(["what"] * min(size, 10))}

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Words padded after the longest question, pictures padded at their right and bottom."""
        inputs = {}
        for name in units[0].features:
            rows = [unit.features[name] for unit in units]
            value = (self.pipe.tokenizer.pad_token_id or 0) if name == "input_ids" else 0
            inputs[name] = pad(rows, value)
        return inputs

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """`logits` `[units, answers]`, on the host."""
        device = self.pipe.device
        with torch.inference_mode():
            found = self.pipe.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            return {"logits": found.logits.float().cpu()}

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        arguments = self.parse(decoded.work.parameters)
        value, before = decoded.value, arguments.fresh().preprocess
        longest, hint = self.longest(self._positions), "pass truncation=true to cut it"
        question = self.long_texts().bounded(value["question"], before, longest, hint)
        features = dict(self.copies.get().preprocess({**value, "question": question}, **before))
        tokens = features["input_ids"].shape[1]
        if self._positions is not None and tokens > self._positions:
            # It must be refused here: on a GPU an index beyond the table breaks the device for every later input.
            text = (
                f"the question has {tokens} tokens, the model takes {self._positions}; pass truncation=true to cut it"
            )
            raise ItemError("too_long", text, STAGE)
        hidden = (*_WORDS, *_PICTURES) if "pixel_mask" in features else _WORDS
        ragged = hidden if self.pads else ()
        shapes = tuple((name, None if name in ragged else tuple(one.shape[1:])) for name, one in features.items())
        assembly = Assembly(decoded.work, expected=1, context=arguments)
        return [Unit(assembly, 0, shapes, features["pixel_values"].numel(), features)]


class AnswerWriter(EqualWriter):
    """Writes answers. Its cost counts numbers of the picture, as for models that classify."""

    def cost(self, features: Mapping[str, torch.Tensor], tokens: int) -> int:
        """How many numbers the picture's tensor has."""
        return features["pixel_values"].numel()


def visual_answerer(pipe: Any) -> Adapter:
    """The adapter of visual-question-answering: BLIP and its kin write an answer; ViLT scores its known answers."""
    return AnswerWriter(pipe) if pipe.model.can_generate() else AnswerClassifier(pipe)
