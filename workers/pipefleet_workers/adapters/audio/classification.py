"""The adapter of audio-classification: recordings of equal shape, or padded if a mask tells the model where the padding is.

Spectrogram models bring every recording to one shape. Only some waveform models take a mask, and models with group normalisation
change their result with padding in spite of a mask: the warm-up proves each model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import ASTFeatureExtractor, WhisperFeatureExtractor
from transformers.modeling_outputs import SequenceClassifierOutput

from pipefleet_workers.adapters.audio.waveforms import frames, hears_padding, require_frames, require_piece
from pipefleet_workers.adapters.base import Adapter, shape_key
from pipefleet_workers.adapters.padding import pad_features
from pipefleet_workers.items import Assembly, Decoded, Unit

AST_HOP, AST_FRAME = 160, 400
"""Samples between two frames of AST's extractor, and samples in one frame, at 16 kHz; it has no settings for either."""


class AudioClassifier(Adapter):
    """Scores of the model's own labels."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        masks = bool(getattr(pipe.feature_extractor, "return_attention_mask", False))
        self.pads = masks and not hears_padding(pipe.model)

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Stacked features; where lengths differ, they come with a mask."""
        value = getattr(self.pipe.feature_extractor, "padding_value", 0.0)
        return pad_features([unit.features for unit in units], value)

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The logits of each unit, `[1, labels]`."""
        logits = outputs["logits"]
        return [SequenceClassifierOutput(logits=logits[index : index + 1]) for index in range(len(units))]

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        arguments = self.parse(decoded.work.parameters)
        features = dict(self.copies.get().preprocess(self._heard(decoded.value), **arguments.fresh().preprocess))
        require_frames(self.pipe.model, features)
        masked = self.pads and "attention_mask" in features
        key = (arguments.forward_key, tuple(features) if masked else shape_key(features))
        assembly = Assembly(decoded.work, expected=1, context=arguments)
        return [Unit(assembly, 0, key, frames(next(iter(features.values()))), features)]

    def _heard(self, samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The samples that the model hears. Raises ItemError (too_long) if it hears all samples and they are too many."""
        extractor = self.pipe.feature_extractor
        if isinstance(extractor, ASTFeatureExtractor):  # AST's frames are independent; it keeps the first
            return samples[: (extractor.max_length + 1) * AST_HOP + AST_FRAME]
        if not isinstance(extractor, WhisperFeatureExtractor):  # Whisper's extractor cuts before it computes
            rate = extractor.sampling_rate
            require_piece(self.pipe.model, len(samples) / rate, rate, self.max_whole_seconds, "send a part of it")
        return samples
