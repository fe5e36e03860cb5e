"""The adapter of zero-shot-object-detection: a picture is processed once, whatever the number of its labels.

OwlViT and OWLv2 compare one look at a picture with many labels. A unit is a picture with up to `LABELS_AT_ONCE` labels; pictures
with fewer labels are filled up with labels that the model ignores. For other models, each label is a unit. A label
with too many tokens raises ItemError (too_long).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.adapters.base import Adapter, shape_key
from pipefleet_workers.adapters.padding import pad
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.encoder import position_limit
from pipefleet_workers.adapters.text.whole_texts import require_labels
from pipefleet_workers.adapters.writing.generate import learnt_positions
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

LABELS_AT_ONCE = 16
_MANY_LABELS = ("owlvit", "owlv2")
Tokens = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Features:
    """One picture as the image processor makes it, and the tokens of its labels, each tensor `[1, tokens]`."""

    picture: dict[str, torch.Tensor]
    texts: list[Tokens]


class ObjectFinder(Adapter):
    """Boxes of the objects that the request names."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.pads = True
        self._at_once = LABELS_AT_ONCE if pipe.model.config.model_type in _MANY_LABELS else 1
        tables = (position_limit(pipe.model), learnt_positions(pipe.model, pipe.model))
        self._positions = min((table for table in tables if table is not None), default=None)

    def example(self, size: int) -> Any:
        """A picture of `size` times eight pixels; a larger picture has more labels, and longer ones."""
        noise = np.random.default_rng(size).integers(0, 255, (size * 8, size * 8, 3), dtype=np.uint8)
        named = ["cat", "a wide old sea", "trees by the sea"][: 1 + size // 20]
        return {"image": Image.fromarray(noise), "candidate_labels": named}

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Stacked pictures, and texts padded on the right: for each unit as many texts as the unit with most labels has."""
        names = units[0].features.picture
        inputs = {name: torch.cat([unit.features.picture[name] for unit in units]) for name in names}
        most = max(len(unit.features.texts) for unit in units)
        texts = [text for unit in units for text in _filled(unit.features.texts, most)]
        fill = self.pipe.tokenizer.pad_token_id or 0
        for name in texts[0]:
            inputs[name] = pad([text[name] for text in texts], fill if name == "input_ids" else 0)
        return inputs

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """Logits `[units, boxes, labels]` and boxes, on the host."""
        device = self.pipe.device
        with torch.inference_mode():
            found = self.pipe.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            return {name: found[name].float().cpu() for name in ("logits", "pred_boxes")}

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """Each unit's own boxes, with the logits of its own labels."""
        rows = []
        for index, unit in enumerate(units):
            logits = outputs["logits"][index : index + 1]
            own = logits[..., : len(unit.features.texts)] if self._at_once > 1 else logits
            rows.append({"logits": own, "pred_boxes": outputs["pred_boxes"][index : index + 1]})
        return rows

    def finish(self, assembly: Assembly) -> Any:
        """`[{"score": …, "label": …, "box": {"xmin": …}}]`, the best first."""
        arguments, names, size = assembly.context
        looked = [one for index in range(assembly.expected) for one in self._by_label(assembly.outputs[index])]
        outputs = [
            {**one, "candidate_label": name, "target_size": size} for one, name in zip(looked, names, strict=True)
        ]
        return self.copies.get().postprocess(outputs, **arguments.fresh().postprocess)

    def _by_label(self, output: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        logits, boxes = output["logits"], output["pred_boxes"]
        if self._at_once == 1:
            return [{"logits": logits, "pred_boxes": boxes}]
        return [{"logits": logits[..., index : index + 1], "pred_boxes": boxes} for index in range(logits.shape[-1])]

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        parameters, value = dict(decoded.work.parameters), decoded.value
        given = parameters.pop("candidate_labels", None)
        arguments = self.parse(parameters)
        fields = value if isinstance(value, Mapping) else {"image": value}
        names = _labels(fields.get("candidate_labels", given))
        require_labels(names, self.max_whole_characters)
        image, pipe = fields["image"], self.copies.get()
        picture = dict(pipe.image_processor(image, return_tensors="pt").to(pipe.dtype))
        texts = [self._tokens(name) for name in names]
        pieces = [texts[start : start + self._at_once] for start in range(0, len(texts), self._at_once)]
        size = torch.tensor([[image.height, image.width]], dtype=torch.int32)
        assembly = Assembly(decoded.work, expected=len(pieces), context=(arguments, names, size))
        return [self._unit(assembly, index, Features(picture, piece)) for index, piece in enumerate(pieces)]

    def _unit(self, assembly: Assembly, index: int, features: Features) -> Unit:
        lengths = None if self.pads else tuple(text["input_ids"].shape[1] for text in features.texts)
        # Without padding, the texts inside one unit must have one length as well.
        alone = id(assembly) if lengths is not None and len(set(lengths)) > 1 else None
        key = (shape_key(features.picture), lengths, alone)
        return Unit(assembly, index, key, features.picture["pixel_values"].numel(), features)

    def _tokens(self, name: str) -> Tokens:
        if self._positions is not None:
            self.long_texts().require(name, self._positions)
        found = dict(self.copies.get().tokenizer(name, return_tensors="pt"))
        tokens = found["input_ids"].shape[1]
        if self._positions is not None and tokens > self._positions:
            # It must be refused here: on a GPU an index beyond the table breaks the device for every later input.
            raise ItemError("too_long", f"a label has {tokens} tokens, the model takes {self._positions}", STAGE)
        return found


def _filled(texts: list[Tokens], most: int) -> list[Tokens]:
    """`texts` filled up to `most`: the model ignores a label that begins with token 0."""
    empty = {name: torch.zeros_like(one[:, :1]) for name, one in texts[0].items()}
    return [*texts, *[empty] * (most - len(texts))]


def _labels(given: Any) -> list[str]:
    """Labels as a list, as in transformers: a single text is cut at its commas, and nothing else changes."""
    found = given.split(",") if isinstance(given, str) else list(given or ())
    if not found:
        text = "candidate_labels is missing or empty; pass a list of texts, or one text with commas"
        raise ItemError("bad_parameter", text, STAGE)
    return found
