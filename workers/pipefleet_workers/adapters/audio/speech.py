"""The adapter of automatic-speech-recognition: recordings and their chunks, for Whisper, CTC and other models.

A unit is a chunk if `chunk_length_s` asks for chunks, else a whole recording. How each kind of model is batched:

    Whisper   pads every recording up to 30 s to one shape itself; `WhisperRows` keeps the rows of a batch apart
    CTC       padded with a mask, if the warm-up proves this exact (layer normalisation)
    others    equal lengths only; the same for CTC models that normalise over time, since they would hear the padding
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipefleet_workers.adapters.arguments import STAGE, Arguments, generate_arguments
from pipefleet_workers.adapters.audio.carried import heard
from pipefleet_workers.adapters.audio.encoding import encode_one_by_one
from pipefleet_workers.adapters.audio.spectrograms import read_in_blocks
from pipefleet_workers.adapters.audio.waveforms import (
    SAMPLES_PER_FRAME,
    hears_padding,
    require_few_pieces,
    require_frames,
    require_piece,
)
from pipefleet_workers.adapters.audio.whisper_rows import WhisperRows, timed
from pipefleet_workers.adapters.base import Adapter, brief, shape_key
from pipefleet_workers.adapters.draws import drawing
from pipefleet_workers.adapters.padding import pad_features
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.writing.parameters import generation_of, vocabulary_of
from pipefleet_workers.adapters.writing.rows import default_seed, row_seed
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit, Work

WHISPER = "seq2seq_whisper"
CTC = "ctc"
_DRAWING = (WHISPER, "seq2seq")
"""Kinds of models that can draw tokens at random."""


class SpeechRecogniser(Adapter):
    """Transcribes recordings. The pipeline's own postprocess joins the outputs of a recording's units."""

    typical_size = 60
    typical_steps = 24

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._vocabulary = vocabulary_of(pipe.model)
        counts = hasattr(pipe.model, "_get_feat_extract_output_lengths")
        self._rows: WhisperRows | None = None
        if pipe.type == WHISPER:
            read_in_blocks(pipe.feature_extractor)
            encode_one_by_one(pipe.model)
            self._rows = WhisperRows(pipe.model)
            self.parallel = True  # but for batches that exclude others
            self.tells_moments = bool(getattr(pipe.model.generation_config, "alignment_heads", None))
        if pipe.type not in _DRAWING:
            self.typical_steps = 0
        self.pads = pipe.type == CTC and counts and not hears_padding(pipe.model)

    def excludes(self, units: Sequence[Unit]) -> bool:
        """As in `Adapter`: for Whisper, batches that time words or draw, see `WhisperRows`."""
        if self._rows is None:
            return False
        forward = generation_of(units[0].assembly.context.fresh().forward, None)
        given, asked = self._asked(forward)
        return forward.get("return_timestamps") == "word" or bool(given.get("temperature") or asked("do_sample"))

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Stacked or padded features; strides as a list, as the CTC forward takes them."""
        inputs = self._tensors(units)
        strides = [unit.features["stride"] for unit in units]
        if self.pipe.type.startswith("ctc") and strides[0] is not None:
            inputs["stride"] = strides
        return {**inputs, "is_last": True}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """Tokens or logits, on the host."""
        arguments: Arguments = units[0].assembly.context
        forward = generation_of(arguments.fresh().forward, None)
        if forward.get("prompt_ids") is not None:
            forward["prompt_ids"] = torch.tensor(forward["prompt_ids"], device=self.pipe.device)
        if isinstance(forward.get("temperature"), list):
            forward["temperature"] = tuple(forward["temperature"])
        if units[0].features["long"]:
            # Beyond 30 s Whisper needs timestamps to go on; postprocess drops them unless the request asked for them.
            forward["return_timestamps"] = forward.get("return_timestamps") or True
        with self._drawing(units), _parameters_judged():
            outputs = self.pipe.forward(inputs, **forward)
        if self._rows is not None and forward.get("return_language"):
            outputs["lang_id"] = self._rows.languages(len(units))
        return outputs

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The outputs of each unit in the form that postprocess expects, with its own stride."""
        longest = max(_samples(unit) for unit in units)
        return [self._row(outputs, unit, index, longest) for index, unit in enumerate(units)]

    def numbers(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """Logits of each unit's own frames. Tokens would hide near ties."""
        with torch.inference_mode():
            inputs = {name: tensor.to(self.pipe.device) for name, tensor in self._tensors(units).items()}
            logits = self.pipe.model(**inputs).logits.float().cpu()
        longest = max(_samples(unit) for unit in units)
        return [logits[index, : self._own(unit, longest)].numpy() for index, unit in enumerate(units)]

    def moments(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """As in `Adapter`. A longer unit writes more tokens, so the proof covers rows that are filled up."""
        frames = [unit.features["sounding"] for unit in units]
        with torch.inference_mode():
            return timed(self.pipe.model, frames, [4 + count // 50 for count in frames])

    def finish(self, assembly: Assembly) -> Any:
        """`{"text": …}`, with `chunks` if timestamps were asked for."""
        arguments: Arguments = assembly.context.fresh()
        rows = [dict(assembly.outputs[index]) for index in range(assembly.expected)]
        rows[-1]["is_last"] = True
        return self.copies.get().postprocess(rows, **arguments.postprocess)

    def _tensors(self, units: Sequence[Unit]) -> dict[str, Any]:
        if self.pads:
            value = getattr(self.pipe.feature_extractor, "padding_value", 0.0)
            return pad_features([unit.features["tensors"] for unit in units], value)
        return super().collate([replace(unit, features=unit.features["tensors"]) for unit in units])

    def _own(self, unit: Unit, longest: int) -> int | None:
        """How many frames of a padded row are the unit's own.

        None means all frames: the pipeline's estimate is sometimes one too many.
        """
        if not self.pads or _samples(unit) == longest:
            return None
        return int(self.pipe.model._get_feat_extract_output_lengths(torch.tensor(_samples(unit))))

    def _row(self, outputs: Any, unit: Unit, index: int, longest: int) -> dict[str, Any]:
        own = self._own(unit, longest)
        row = {
            name: value[index : index + 1] if own is None else value[index : index + 1, :own]
            for name, value in outputs.items()
            if name in ("tokens", "logits", "token_timestamps")
        }
        if outputs.get("lang_id", [None] * (index + 1))[index] is not None:
            row["lang_id"] = outputs["lang_id"][index]
        stride = outputs["stride"][index] if "stride" in outputs else unit.features["stride"]
        row |= unit.features.get("extra") or {}
        return {**row, "is_last": False, **({} if stride is None else {"stride": stride})}

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        parameters = dict(decoded.work.parameters)
        asked = parameters.pop("seed", None)
        arguments = self.parse(parameters)
        given = heard(decoded.value, self.pipe.feature_extractor.sampling_rate)
        self._require_pieces(len(given.samples), arguments)
        if given.stride is not None and self.pipe.type == "seq2seq" and not arguments.preprocess.get("chunk_length_s"):
            raise ItemError("bad_input", "this model takes no stride, which is for CTC models; leave it out", STAGE)
        forward = generation_of(arguments.fresh().forward, self._vocabulary)
        seed, alone, width = self._seed(asked, decoded.work), self._goes_alone(forward), self._width(forward)
        chunks = list(self.copies.get().preprocess(given.given(), **arguments.fresh().preprocess))
        assembly = Assembly(decoded.work, expected=len(chunks), context=arguments)
        units = [self._unit(assembly, index, dict(chunk), arguments, alone=alone) for index, chunk in enumerate(chunks)]
        for unit in units:
            unit.length = round(unit.length * width)
            unit.features["seed"] = row_seed(seed, unit.index) if unit.index else seed
            unit.features["extra"] = given.extra
        return units

    def _seed(self, asked: int | None, work: Work) -> int:
        """The seed of the first chunk; the other chunks have seeds of their own."""
        if asked is not None and self.pipe.type not in _DRAWING:
            raise ItemError("bad_parameter", "this model draws nothing at random; leave out seed", STAGE)
        return default_seed(work) if asked is None else asked

    def _drawing(self, units: Sequence[Unit]) -> contextlib.AbstractContextManager[None]:
        """A context in which each unit draws from its own seed: Whisper row by row, other models for a unit that runs alone."""
        seeds = [unit.features["seed"] for unit in units]
        if self._rows is not None:
            self._rows.seed(seeds)
        elif self.pipe.type in _DRAWING and len(units) == 1:
            return drawing(seeds[0], self.pipe.device, loads=True)
        return contextlib.nullcontext()

    def _goes_alone(self, forward: Mapping[str, Any]) -> bool:
        """Whether these arguments mix the rows of a batch."""
        if self.pipe.type not in _DRAWING:
            return False
        given, asked = self._asked(forward)
        # generate() fills shorter rows with this token, and only special tokens are left out of the text.
        pad = asked("pad_token_id")
        if pad is not None and pad not in self.pipe.tokenizer.all_special_ids:
            return True
        if self.pipe.type != WHISPER:
            return bool(asked("do_sample"))
        if forward.get("return_timestamps") == "word" and not self.times_together:
            return True
        # The text so far is padded in front, and positions count this padding; transformers drops all of it if row 0 has no text.
        if asked("condition_on_prev_tokens"):
            return True
        # With one sampled row, transformers drops the beams of all rows; and it detects silence in the rows of beams.
        return (asked("num_beams") or 1) > 1 and bool(given.get("temperature") or asked("no_speech_threshold"))

    def _asked(self, forward: Mapping[str, Any]) -> tuple[Mapping[str, Any], Callable[[str], Any]]:
        """The arguments of generate(), and a function from a name to its value there, or else in the generation config."""
        given = generate_arguments(self.pipe, forward)
        config = given.get("generation_config") or self.pipe.model.generation_config
        return given, lambda name: getattr(config, name, None) if given.get(name) is None else given[name]

    def _width(self, forward: Mapping[str, Any]) -> float:
        """The asked beams, as a multiple of the beams of an ordinary call, by which costs are measured; at least 1."""
        if self.pipe.type not in _DRAWING:
            return 1.0
        beams, usual = self._asked(forward)[1]("num_beams") or 1, self.pipe._default_generation_config.num_beams or 1
        return max(1.0, float(beams / usual))

    def _require_pieces(self, samples: int, arguments: Arguments) -> None:
        """Raise ItemError (bad_parameter, too_long) for too many pieces, or for a piece that is too long.

        Whisper hears pieces of half a minute, filled up with silence; other models hear the pieces as they are.
        """
        extractor, align = self.pipe.feature_extractor, getattr(self.pipe.model.config, "inputs_to_logits_ratio", 1)
        padded_bytes = 0
        if self.pipe.type == WHISPER:
            padded_bytes = extractor.feature_size * extractor.nb_max_frames * 4
        require_few_pieces(samples, extractor.sampling_rate, align, arguments.preprocess, padded_bytes)
        if self.pipe.type != WHISPER:
            rate, asked = extractor.sampling_rate, arguments.preprocess.get("chunk_length_s")
            seconds = min(samples / rate, asked or samples / rate)
            hint = "pass a smaller chunk_length_s" if asked else "pass chunk_length_s"
            require_piece(self.pipe.model, seconds, rate, self.max_whole_seconds, hint)

    def _unit(
        self, assembly: Assembly, index: int, chunk: dict[str, Any], arguments: Arguments, *, alone: bool
    ) -> Unit:
        require_frames(self.pipe.model, chunk)
        chunk.pop("is_last")
        stride = chunk.pop("stride", None)
        main = next(iter(chunk.values()))
        long = self.pipe.type == WHISPER and main.shape[-1] > self.pipe.feature_extractor.nb_max_frames
        # A CTC forward takes no arguments; they apply to its tokens later.
        forward_key = None if self.pipe.type == CTC else arguments.forward_key
        shape = tuple(chunk) if self.pads else shape_key(chunk)
        key = (forward_key, shape, stride is None, (id(assembly), index) if alone else None)
        features = {"tensors": chunk, "stride": stride, "long": long}
        if self.pipe.type == WHISPER:
            # The encoder runs over all frames, padding included; the time of decoding grows with the frames that hold sound.
            features["sounding"] = _sounding(chunk, main)
            return Unit(assembly, index, key, features["sounding"], features, fixed=int(main.shape[-1]))
        return Unit(assembly, index, key, max(1, int(main.shape[-1]) // SAMPLES_PER_FRAME), features)


@contextlib.contextmanager
def _parameters_judged() -> Iterator[None]:
    """Turn generate()'s ValueError (an unknown language or task, too great a length) into ItemError (bad_parameter)."""
    try:
        yield
    except ValueError as error:
        raise ItemError("bad_parameter", f"the model refuses the parameters: {brief(error)}", "forward") from error


def _samples(unit: Unit) -> int:
    return int(next(iter(unit.features["tensors"].values())).shape[1])


def _sounding(chunk: dict[str, Any], main: torch.Tensor) -> int:
    mask = chunk.get("attention_mask")
    return max(1, int(mask.sum())) if mask is not None else int(main.shape[-1])
