"""The adapter of fill-mask: a text with masks goes in, the most probable tokens for each mask come out.

A text is one unit. The scores of a whole vocabulary are large, so `split` ranks them on the device; only the best tokens of each
mask leave it. A text without a mask raises ItemError (bad_input), a `top_k` above the vocabulary ItemError (bad_parameter).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.adapters.text.encoder import TextEncoder
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

_PREDICTIONS = 5
"""How many predictions transformers gives for a mask without `top_k`."""


@dataclass(frozen=True, slots=True)
class Masked:
    """One text: its tokens, the positions of its masks, the number of predictions, and the tokens to choose from (None: all)."""

    ids: list[int]
    positions: list[int]
    count: int
    targets: tuple[int, ...] | None


class MaskFiller(TextEncoder):
    """fill-mask: the most probable tokens for each mask of a text."""

    cut_hint = 'pass tokenizer_kwargs={"truncation": true} to cut it'

    def example(self, size: int) -> str:
        """Words with a mask among them."""
        words = ["the", "sea", "was", "wide"] * size
        return " ".join([*words[: size // 2], self.pipe.tokenizer.mask_token, *words[size // 2 : size]])

    def keywords(self, arguments: Arguments) -> dict[str, Any]:
        """The arguments that the pipeline passes to the tokenizer."""
        own = arguments.fresh().preprocess.get("tokenizer_kwargs") or {}
        return {name: value for name, value in own.items() if name != "padding"}

    def units(self, decoded: Decoded, arguments: Arguments, encoded: Any) -> list[Unit]:
        """One unit. Raises ItemError for a text without a mask, and for more predictions than there are tokens."""
        ids, mask = encoded["input_ids"], self.pipe.tokenizer.mask_token_id
        positions = [index for index, token in enumerate(ids) if token == mask]
        if not positions:
            text = f"no mask stands in the text, or it was cut off; this model's is {self.pipe.tokenizer.mask_token}"
            raise ItemError("bad_input", text, STAGE)
        masked = Masked(ids, positions, *self._wanted(arguments))
        return [self.unit(Assembly(decoded.work, expected=1, context=masked), 0, encoded, arguments)]

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """For each unit the probabilities and the tokens of its predictions, a row for each of its masks."""
        texts = [_masked(unit) for unit in units]
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, text in enumerate(texts):
            alike[text.count, text.targets].append(index)
        found: list[Any] = [None] * len(units)
        with torch.inference_mode():
            rows = torch.split(self._rows(outputs, units).softmax(-1), [len(text.positions) for text in texts])
            for (count, targets), indices in alike.items():
                predicted = _best(torch.cat([rows[index] for index in indices]), count, targets)
                for index in indices:
                    masks = len(texts[index].positions)
                    found[index] = tuple(part[:masks] for part in predicted)
                    predicted = tuple(part[masks:] for part in predicted)
        return found

    def numbers(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """The logits of each unit's masks."""
        rows = self._rows(self.run(self.collate(units), units, UNOBSERVED), units)
        return [
            own.float().cpu().numpy() for own in torch.split(rows, [len(_masked(unit).positions) for unit in units])
        ]

    def finish(self, assembly: Assembly) -> Any:
        """`[{score, token, token_str, sequence}]`, or a list of such lists if the text has several masks."""
        text, tokenizer = assembly.context, self.copies.get().tokenizer
        single = len(text.positions) == 1
        rows = [
            [
                {
                    "score": score,
                    "token": token,
                    "token_str": tokenizer.decode([token]),
                    "sequence": tokenizer.decode(self._filled(text.ids, position, token), skip_special_tokens=single),
                }
                for score, token in zip(scores, tokens, strict=True)
            ]
            for position, scores, tokens in zip(text.positions, *assembly.outputs[0], strict=True)
        ]
        return rows[0] if single else rows

    def _wanted(self, arguments: Arguments) -> tuple[int, tuple[int, ...] | None]:
        post, vocabulary = arguments.postprocess, self.pipe.model.config.get_text_config().vocab_size
        count, targets = post.get("top_k", _PREDICTIONS), post.get("target_ids")
        if targets is not None:
            return min(count, len(targets)), tuple(int(token) for token in targets)
        if count > vocabulary:
            raise ItemError("bad_parameter", f"top_k is {count}, the model knows {vocabulary} tokens", STAGE)
        return count, None

    def _rows(self, outputs: Any, units: Sequence[Unit]) -> torch.Tensor:
        """The logits at all masks of all units, on the device."""
        logits = outputs["logits"]
        texts, longest = [_masked(unit) for unit in units], logits.shape[1]
        starts = [self.span(unit, longest).start or 0 for unit in units]
        rows = [row for row, text in enumerate(texts) for _ in text.positions]
        places = [start + place for start, text in zip(starts, texts, strict=True) for place in text.positions]
        with torch.inference_mode():
            gathered: torch.Tensor = logits[rows, places]
        return gathered

    def _filled(self, ids: list[int], position: int, token: int) -> list[int]:
        padding = self.pipe.tokenizer.pad_token_id
        filled = [*ids[:position], token, *ids[position + 1 :]]
        return [one for one in filled if one != padding]


def _masked(unit: Unit) -> Masked:
    found = unit.assembly.context
    assert isinstance(found, Masked)
    return found


def _best(rows: torch.Tensor, count: int, targets: tuple[int, ...] | None) -> tuple[Any, ...]:
    """The `count` highest probabilities of each row with their tokens, as lists."""
    if targets is None:
        scores, tokens = rows.topk(count)
    else:
        allowed = torch.tensor(targets, device=rows.device)
        scores, places = rows[:, allowed].topk(count)
        tokens = allowed[places]
    return scores.tolist(), tokens.tolist()
