"""The adapter of automatic-speech-recognition: recordings and their chunks, for Whisper, CTC and other models.

Units are chunks where `chunk_length_s` asks for them, else whole recordings. Only equal shapes share a batch: Whisper pads
every recording up to 30 s to one shape itself, and padding a CTC model that normalises over time would change its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pipefleet_workers.adapters.base import Adapter, shape_key
from pipefleet_workers.arguments import Arguments
from pipefleet_workers.items import Assembly, Decoded, Unit

WHISPER = "seq2seq_whisper"
SAMPLES_PER_FRAME = 160
"""Samples counted as one frame, a hundredth of a second at 16 kHz: the cost unit of all speech models."""


class SpeechRecogniser(Adapter):
    """Transcribes. Outputs of a recording's units are joined by the pipeline's own postprocess."""

    typical_size = 0  # made-up sound says nothing of how long decoding takes: the row's own budget holds

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Stacked features; strides as a list, as the CTC forward takes them."""
        inputs = super().collate([replace(unit, features=unit.features["tensors"]) for unit in units])
        strides = [unit.features["stride"] for unit in units]
        if self.pipe.type.startswith("ctc") and strides[0] is not None:
            inputs["stride"] = strides
        return {**inputs, "is_last": True}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit]) -> Any:
        """Tokens or logits, on the host."""
        forward = dict(self.arguments(units[0]).fresh().forward)
        if units[0].features["long"]:
            # Beyond 30 s Whisper finds its way by timestamps; postprocess still drops them unless they were asked for.
            forward["return_timestamps"] = forward.get("return_timestamps") or True
        return self.pipe.forward(inputs, **forward)

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The outputs of each unit in the form that postprocess expects, with its own stride."""
        return [self._row(outputs, unit, index) for index, unit in enumerate(units)]

    def finish(self, assembly: Assembly) -> Any:
        """`{"text": …}`, with `chunks` where timestamps were asked for."""
        arguments: Arguments = assembly.context.fresh()
        rows = [dict(assembly.outputs[index]) for index in range(assembly.expected)]
        rows[-1]["is_last"] = True
        return self.copies.get().postprocess(rows, **arguments.postprocess)

    def _row(self, outputs: Any, unit: Unit, index: int) -> dict[str, Any]:
        row = {
            name: value[index : index + 1]
            for name, value in outputs.items()
            if name in ("tokens", "logits", "token_timestamps")
        }
        if "lang_id" in outputs:
            row["lang_id"] = outputs["lang_id"]
        stride = outputs["stride"][index] if "stride" in outputs else unit.features["stride"]
        return {**row, "is_last": False, **({} if stride is None else {"stride": stride})}

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        arguments = self.parse(decoded.work.parameters)
        chunks = list(self.copies.get().preprocess(decoded.value, **arguments.fresh().preprocess))
        assembly = Assembly(decoded.work, expected=len(chunks), context=arguments)
        return [self._unit(assembly, index, dict(chunk), arguments) for index, chunk in enumerate(chunks)]

    def _unit(self, assembly: Assembly, index: int, chunk: dict[str, Any], arguments: Arguments) -> Unit:
        chunk.pop("is_last")
        stride = chunk.pop("stride", None)
        main = next(iter(chunk.values()))
        long = self.pipe.type == WHISPER and main.shape[-1] > self.pipe.feature_extractor.nb_max_frames
        alone = id(assembly) if arguments.forward.get("return_language") else None  # only row 0 of a batch is read
        key = (arguments.forward_key, shape_key(chunk), stride is None, alone)
        features = {"tensors": chunk, "stride": stride, "long": long}
        if self.pipe.type == WHISPER:
            # The encoder runs over all frames, padding included; decoding grows with those that hold sound.
            return Unit(assembly, index, key, _sounding(chunk, main), features, fixed=int(main.shape[-1]))
        return Unit(assembly, index, key, max(1, int(main.shape[-1]) // SAMPLES_PER_FRAME), features)


def _sounding(chunk: dict[str, Any], main: torch.Tensor) -> int:
    mask = chunk.get("attention_mask")
    return max(1, int(mask.sum())) if mask is not None else int(main.shape[-1])
