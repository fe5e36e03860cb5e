"""The adapter of audio-classification: recordings of equal shape, or padded where the model is told by a mask what is padding.

Spectrogram models bring every recording to one shape. Of waveform models only some take a mask, and group normalisation hears
padding in spite of it: the warm-up proves each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.modeling_outputs import SequenceClassifierOutput

from pipefleet_workers.adapters.base import Adapter, shape_key
from pipefleet_workers.adapters.waveforms import frames, hears_padding, padded, require_frames, require_piece
from pipefleet_workers.items import Assembly, Decoded, Unit


class AudioClassifier(Adapter):
    """Scores of the model's own labels."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        masks = bool(getattr(pipe.feature_extractor, "return_attention_mask", False))
        self.pads = masks and not hears_padding(pipe.model)

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Stacked features; where lengths differ there is a mask."""
        value = getattr(self.pipe.feature_extractor, "padding_value", 0.0)
        return padded([unit.features for unit in units], value)

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The logits of each unit, `[1, labels]`."""
        logits = outputs["logits"]
        return [SequenceClassifierOutput(logits=logits[index : index + 1]) for index in range(len(units))]

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        arguments = self.parse(decoded.work.parameters)
        features = dict(self.copies.get().preprocess(decoded.value, **arguments.fresh().preprocess))
        require_frames(self.pipe.model, features)
        wave = features.get("input_values")
        if wave is not None and wave.ndim == 2:  # all others bring a recording to one length
            rate = self.pipe.feature_extractor.sampling_rate
            require_piece(self.pipe.model, wave.shape[1] / rate, rate, self.max_whole_seconds, "send a part of it")
        masked = self.pads and "attention_mask" in features
        key = (arguments.forward_key, tuple(features) if masked else shape_key(features))
        assembly = Assembly(decoded.work, expected=1, context=arguments)
        return [Unit(assembly, 0, key, frames(next(iter(features.values()))), features)]
