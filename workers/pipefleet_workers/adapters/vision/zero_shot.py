"""The adapter of zero-shot-image-classification: pictures of a batch in one call, labels of all its requests in another.

Each picture is compared with the embeddings of its own labels, so requests with different labels share a batch. Embeddings of texts
are kept, since the items of a run share their labels. If a model's two towers alone do not give its scores, the whole model runs,
and only requests with the same labels share a batch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.adapters.base import TOLERANCE, Adapter, brief, shape_key
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.encoder import position_limit
from pipefleet_workers.adapters.text.whole_texts import require_labels
from pipefleet_workers.adapters.writing.generate import learnt_positions
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

log = logging.getLogger(__name__)
TEMPLATE = "This is a photo of {}."
"""transformers' own template, for a request without one."""
KEPT_TEXTS = 8192
"""Most embeddings of texts that are kept."""
TEXTS_AT_ONCE = 128
SIGLIP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Features:
    """One picture as the image processor makes it, and its labels inside their template."""

    picture: dict[str, torch.Tensor]
    texts: tuple[str, ...]


class ImageLabeller(Adapter):
    """Scores of the labels of the request, from CLIP, SigLIP and their kin."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.parallel = False  # a forward changes what is known
        tables = (position_limit(pipe.model), learnt_positions(pipe.model, pipe.model))
        self._positions = min((table for table in tables if table is not None), default=None)
        self._apart = self._towers_suffice()

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """The stacked pictures; `run` tokenises the texts when it needs them."""
        names = units[0].features.picture
        return {name: torch.cat([unit.features.picture[name] for unit in units]) for name in names}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """For each unit the logits of its labels, `[labels]`, on the host."""
        pictures = {name: one.to(self.pipe.device) for name, one in inputs.items()}
        with torch.inference_mode():
            if not self._apart:
                return list(self._whole(pictures, units[0].features.texts))
            return self._compared(pictures, [unit.features.texts for unit in units])

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The outputs themselves: `run` has split them already."""
        return list(outputs)

    def finish(self, assembly: Assembly) -> Any:
        """`[{"score": …, "label": …}]`, the best first."""
        outputs = {"candidate_labels": list(assembly.context), "logits": assembly.outputs[0][None]}
        return self.copies.get().postprocess(outputs)

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        asked = self.parse(decoded.work.parameters).preprocess
        names = labels(asked.get("candidate_labels"))
        template = asked.get("hypothesis_template") or TEMPLATE
        # Not str.format: it would read attributes that a template names.
        texts = tuple(template.replace("{}", str(name)) for name in names)
        self._require_room([text for text in texts if text not in self._known])
        picture = self._seen(decoded.value)
        assembly = Assembly(decoded.work, expected=1, context=names)
        key = (shape_key(picture), None if self._apart else texts)
        return [Unit(assembly, 0, key, picture["pixel_values"].numel(), Features(picture, texts))]

    def _seen(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        pipe = self.copies.get()
        return dict(pipe.image_processor(images=[picture], return_tensors="pt").to(pipe.dtype))

    def _require_room(self, texts: Sequence[str]) -> None:
        """Raise ItemError (too_long) for long labels: on a GPU an index beyond a table of positions breaks the device."""
        require_labels(texts, self.max_whole_characters)
        if not texts or self._positions is None:
            return
        longest = SIGLIP_TOKENS if self._siglip else self._counted(texts, self._positions)
        if longest > self._positions:
            text = f"a label has {longest} tokens with its template, the model takes {self._positions}"
            raise ItemError("too_long", text, STAGE)

    def _counted(self, texts: Sequence[str], positions: int) -> int:
        """Tokens of the longest text.

        Counted without padding: one long label beside many short labels would take too much memory.
        """
        tokenizer, looked = self.copies.get().tokenizer, self.long_texts()
        for text in texts:
            looked.require(text, positions)
        return max(len(ids) for ids in tokenizer(list(texts))["input_ids"])

    @property
    def _siglip(self) -> bool:
        """Whether the model was trained with texts of one length, so that transformers runs it with this length."""
        return "siglip" in self.pipe.model.config.model_type

    def _tokens(self, texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        pipe = self.copies.get()
        one_length = {"padding": "max_length", "max_length": SIGLIP_TOKENS, "truncation": True}
        padding = one_length if self._siglip else {"padding": True}
        found: Mapping[str, torch.Tensor] = pipe.tokenizer(list(texts), return_tensors="pt", **padding)
        return found

    def _whole(self, pictures: Mapping[str, torch.Tensor], texts: Sequence[str]) -> torch.Tensor:
        tokens = {name: one.to(self.pipe.device) for name, one in self._tokens(texts).items()}
        logits: torch.Tensor = self.pipe.model(**tokens, **pictures).logits_per_image
        return logits.cpu()

    def _compared(self, pictures: Mapping[str, torch.Tensor], texts: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        model = self.pipe.model
        seen = _direction(model.get_image_features(**pictures))
        known = self._embedded({text for own in texts for text in own})
        scale, bias = model.logit_scale.exp(), getattr(model, "logit_bias", 0.0)
        rows = [torch.stack([known[text] for text in own]) for own in texts]
        return [(own @ one * scale + bias).cpu() for own, one in zip(rows, seen, strict=True)]

    def _embedded(self, texts: set[str]) -> dict[str, torch.Tensor]:
        """The embedding of every text; unknown embeddings are computed."""
        missing = sorted(texts - self._known.keys(), key=len)
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            piece = missing[start : start + TEXTS_AT_ONCE]
            tokens = {name: one.to(self.pipe.device) for name, one in self._tokens(piece).items()}
            self._known.update(zip(piece, _direction(self.pipe.model.get_text_features(**tokens)), strict=True))
        for text in texts:
            self._known.move_to_end(text)
        found = {text: self._known[text] for text in texts}
        while len(self._known) > KEPT_TEXTS:
            self._known.popitem(last=False)
        return found

    def _towers_suffice(self) -> bool:
        """Whether the towers' embeddings give the scores of the whole model, tested with a made-up picture."""
        noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        texts = ("a cat", "the wide old sea")
        try:
            picture = self._seen(Image.fromarray(noise))
            pictures = {name: one.to(self.pipe.device) for name, one in picture.items()}
            with torch.inference_mode():
                whole, apart = self._whole(pictures, texts), self._compared(pictures, [texts])[0]
        except Exception as error:  # noqa: BLE001 - a model without such towers may raise any error
            log.info("the model is run whole for every set of labels (%s)", brief(error))
            return False
        limit = TOLERANCE.get(self.pipe.dtype, 1e-4) * max(1.0, float(whole.abs().max()))
        return bool((whole[0] - apart).abs().max() <= limit)


def labels(given: Any) -> list[Any]:
    """Labels as a list; one text holds them with commas between. Raises ItemError (bad_parameter) for none."""
    found = [one.strip() for one in given.split(",") if one.strip()] if isinstance(given, str) else list(given or ())
    if not found:
        text = "candidate_labels is missing or empty; pass a list of texts, or one text with commas"
        raise ItemError("bad_parameter", text, STAGE)
    return found


def _direction(features: Any) -> torch.Tensor:
    """Embeddings of length one; a tower returns them directly or as the pooled part of its output."""
    pooled: torch.Tensor = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(pooled, dim=-1)
