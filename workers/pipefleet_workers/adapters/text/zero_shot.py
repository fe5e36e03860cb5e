"""The adapter of zero-shot-classification: a text and labels go in, a score for each label comes out.

Each pair of the text and a label is a unit, so units of different requests share batches. `finish` computes the scores from the
logits of all units of a request. Raises ItemError for bad or too many labels, and for a text that is too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.adapters.text.encoder import TextEncoder
from pipefleet_workers.adapters.text.long_texts import LONG
from pipefleet_workers.adapters.text.whole_texts import require_labels
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

_TEMPLATE = "This example is {}."
_KEPT = 4
"""Bound of the tokens of all pairs of one input, as a multiple of the characters that may be tokenised at once."""
_TOO_SHORT = "too short"
"""Part of the tokenizer's error for a text that is shorter than the part to be cut off."""


@dataclass(frozen=True, slots=True)
class Question:
    """One text and its labels."""

    text: str
    labels: list[Any]
    arguments: Arguments


class ZeroShotTextClassifier(TextEncoder):
    """zero-shot-classification: how well each of the candidate labels fits a text."""

    cut_hint = "the labels and the template alone are too long"

    def keywords(self, arguments: Arguments) -> dict[str, Any]:
        """The arguments of every call of the tokenizer."""
        return {"truncation": "only_first"}

    def encode(self, values: Sequence[Any], arguments: Arguments) -> Sequence[Any]:
        """For each text its features with each label. Raises ItemError (bad_input, bad_parameter)."""
        labels = arguments.preprocess.get("candidate_labels")
        if not labels:
            raise ItemError("bad_parameter", "zero-shot-classification needs candidate_labels, at least one", STAGE)
        if not all(values):
            raise ItemError("bad_input", "the text is empty", STAGE)
        require_labels(labels, self.max_whole_characters)
        template = arguments.preprocess.get("hypothesis_template", _TEMPLATE)
        hypotheses = [template.format(label) for label in labels]
        kept = max(1, min(max(len(value) for value in values), self.longest(self._positions)))
        if len(values) == 1 and kept * len(labels) > _KEPT * self.max_whole_characters:
            text = f"{len(labels)} labels with a text of {kept} tokens or more are too much for one input; ask in several inputs"
            raise ItemError("too_long", text, STAGE)
        pairs = [(value, hypothesis) for value in values for hypothesis in hypotheses]
        size = max(1, LONG // max(len(value) for value in values))  # a call holds the tokens of all its texts in memory
        encoded = [one for start in range(0, len(pairs), size) for one in self._pairs(pairs[start : start + size])]
        return [encoded[start : start + len(labels)] for start in range(0, len(encoded), len(labels))]

    def units(self, decoded: Decoded, arguments: Arguments, encoded: Any) -> list[Unit]:
        """A unit for each label."""
        question = Question(decoded.value, list(arguments.preprocess["candidate_labels"]), arguments)
        assembly = Assembly(decoded.work, expected=len(encoded), context=question)
        return [self.unit(assembly, index, features, arguments) for index, features in enumerate(encoded)]

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The logits of each unit, `[1, labels]`."""
        logits = outputs["logits"].float().cpu()
        return [logits[row : row + 1] for row in range(len(units))]

    def numbers(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """The logits of each unit."""
        return list(self.run(self.collate(units), units, UNOBSERVED)["logits"].float().cpu().numpy())

    def finish(self, assembly: Assembly) -> Any:
        """`{sequence, labels, scores}`, the most fitting label first."""
        question: Question = assembly.context
        rows = [
            {"candidate_label": label, "sequence": question.text, "logits": assembly.outputs[index]}
            for index, label in enumerate(question.labels)
        ]
        return self.copies.get().postprocess(rows, **question.arguments.fresh().postprocess)

    def _pairs(self, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """Features of texts with hypotheses. As in transformers, the text is cut if the pair is too long."""
        tokenizer = self.copies.get().tokenizer
        try:
            encoded = tokenizer(pairs, truncation="only_first")
        except Exception as error:
            if len(pairs) > 1:
                return [features for pair in pairs for features in self._pairs([pair])]
            if _TOO_SHORT not in str(error):
                raise
            encoded = tokenizer(pairs, truncation=False)
        names = [name for name in tokenizer.model_input_names if name in encoded]
        return [{name: encoded[name][row] for name in names} for row in range(len(pairs))]
