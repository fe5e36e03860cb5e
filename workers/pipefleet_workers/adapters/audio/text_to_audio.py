"""The adapter of text-to-audio: speech and music from texts. Random draws depend only on the seed of the request.

MusicGen writes its requests in one generate() call; each row has its own random numbers. All other models take one request at a
time. VITS hears beyond the end of a shorter neighbour, which changes its last 4096 samples; Bark and SpeechT5 draw noise inside.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import StoppingCriteria

from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.draws import drawing
from pipefleet_workers.adapters.padding import pad_features
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.writing.parameters import generation_of, nested, vocabulary_of
from pipefleet_workers.adapters.writing.rows import default_seed
from pipefleet_workers.items import Assembly, Audio, Decoded, ItemError, JobContext, Unit

_BATCHED = "musicgen"
MOST_STEPS = 65_536
"""Steps that one request may take, summed over its rows."""
_PROBED = 2
"""Steps of the decoder that the proof of exactness compares."""


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one request; `seed` decides all random draws of the model."""

    arguments: Arguments
    seed: int


class TextToAudio(Adapter):
    """Speech or music: `{"audio", "sampling_rate"}` as transformers gives it, with the samples as an artifact."""

    typical_size = (
        0  # not measured at warm-up, since made-up texts give no typical length of sound; the table's cost is used
    )

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.parallel = False  # every model draws from the random numbers of the whole process
        model = pipe.model
        # If a token could end a row, the rows of a call would have different lengths.
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.pads = model.config.model_type == _BATCHED and ends is None
        takes = inspect.signature(model.generate).parameters if model.can_generate() else {}
        self._can_stop = "stopping_criteria" in takes

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Tokens, padded at the end when requests share a call."""
        rows = [unit.features for unit in units]
        return dict(rows[0]) if len(rows) == 1 else pad_features(rows, self.pipe.tokenizer.pad_token_id or 0)

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """The outputs of the pipeline's forward; a list of failures when every job of the batch was stopped."""
        arguments, jobs = _request(units[0]).arguments.fresh().forward, [unit.assembly.work.job for unit in units]
        voice, steps = (generation_of(arguments[name], None) for name in ("forward_params", "generate_kwargs"))
        if "speaker_embeddings" in voice:
            voice["speaker_embeddings"] = torch.tensor(voice["speaker_embeddings"]).reshape(1, -1).to(self.pipe.dtype)
        if self._can_stop:
            steps["stopping_criteria"] = [_EachStep(jobs, progress)]
        with contextlib.suppress(_AllStoppedError), self._drawing([_request(unit).seed for unit in units]):
            return self.pipe.forward(inputs, forward_params=voice, generate_kwargs=steps)
        return [progress.stopped(job) for job in jobs]

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The sound of each unit; `[1, channels, frames]` for units that shared a call. For a stopped unit its failure."""
        if isinstance(outputs, list):
            return outputs
        if len(units) == 1:
            return [outputs]
        return [{"sequences": part} for part in outputs["sequences"].chunk(len(units))]

    def numbers(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """Logits of the decoder's first steps, which read the text."""
        model, device = self.pipe.model, self.pipe.device
        inputs = {name: tensor.to(device) for name, tensor in self.collate(units).items()}
        books = model.decoder.num_codebooks
        begin = torch.full((len(units) * books, _PROBED), model.config.decoder.pad_token_id, device=device)
        with torch.inference_mode():
            logits = model(**inputs, decoder_input_ids=begin).logits.float().cpu().numpy()
        return [logits[index * books : (index + 1) * books] for index in range(len(units))]

    def finish(self, assembly: Assembly) -> Any:
        """`{"audio", "sampling_rate"}`."""
        made = self.copies.get().postprocess(assembly.outputs[0])
        rate = int(made["sampling_rate"])
        return {"audio": _sound(made["audio"], rate), "sampling_rate": made["sampling_rate"]}

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        parameters = dict(decoded.work.parameters)
        seed = parameters.pop("seed", None)
        arguments = self.parser.parse(nested(parameters))
        asked = self._asked(arguments)
        if arguments.forward["generate_kwargs"] and not self.pipe.model.can_generate():
            text = "this model does not write step by step; pass forward_params instead of generate_kwargs"
            raise ItemError("bad_parameter", text, STAGE)
        self.long_texts().require(decoded.value, self.longest(None), "cut it into sentences")
        features = dict(self.copies.get().preprocess(decoded.value, **arguments.fresh().preprocess))
        length = int(features["input_ids"].shape[-1])
        if not length:
            raise ItemError("bad_input", "the text has nothing that the model could speak", STAGE)
        if length > self.longest(None):
            text = f"the text has {length} tokens, the model takes {self.longest(None)}; cut it into sentences"
            raise ItemError("too_long", text, STAGE)
        request = Request(arguments, default_seed(decoded.work) if seed is None else seed)
        assembly = Assembly(decoded.work, expected=1, context=request)
        key = (arguments.forward_key, tuple(features), None if self.pads else id(assembly))
        return [Unit(assembly, 0, key, length, features, fixed=self._steps(asked))]

    def _asked(self, arguments: Arguments) -> Mapping[str, Any]:
        """The arguments of generate().

        Raises ItemError (bad_parameter) for tokens beyond the vocabulary, and for too many steps.
        """
        asked = {**arguments.forward["forward_params"], **arguments.forward["generate_kwargs"]}
        generation_of(asked, vocabulary_of(self.pipe.model))
        if self._steps(asked) > MOST_STEPS:
            text = (
                f"num_return_sequences and num_beams times max_new_tokens are above {MOST_STEPS}; ask in several calls"
            )
            raise ItemError("bad_parameter", text, STAGE)
        return asked

    def _steps(self, asked: Mapping[str, Any]) -> int:
        """Steps of generate() for all its rows; a step costs as much as a token of the text."""
        if not self.pipe.model.can_generate():
            return 0
        rows = max(asked.get("num_return_sequences") or 1, asked.get("num_beams") or 1)
        return int(asked.get("max_new_tokens") or asked.get("max_length") or 256) * rows

    def _drawing(self, seeds: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
        """Random numbers of each request as if torch had been seeded for it alone."""
        return _RowDraws(seeds, self.pipe.device) if len(seeds) > 1 else drawing(seeds[0], self.pipe.device)


class _RowDraws(TorchFunctionMode):
    """Draws the tokens of each request of a call from its own generator, in the thread that enters it."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.multinomial:
            return func(*args, **(kwargs or {}))
        parts = args[0].chunk(len(self._generators))
        drawn = zip(parts, self._generators, strict=True)
        return torch.cat([func(part, *args[1:], generator=one, **(kwargs or {})) for part, one in drawn])


class _AllStoppedError(Exception):
    """No job waits for the rest of a generate() call."""


class _EachStep(StoppingCriteria):  # type: ignore[misc]
    """Gives a sign of life at every step, and ends the call once all its jobs are cancelled or expired."""

    def __init__(self, jobs: Sequence[JobContext], progress: Progress) -> None:
        self._jobs = jobs
        self._progress = progress

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """False for each row."""
        self._progress.tick()
        if all(self._progress.stopped(job) for job in self._jobs):
            raise _AllStoppedError
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _sound(samples: Any, rate: int) -> Any:
    """Samples in the form of a result. Several sequences with more than one channel are no recording."""
    if isinstance(samples, list):
        return [_sound(one, rate) for one in samples]
    samples = np.asarray(samples, np.float32)
    return Audio(samples, rate) if samples.ndim <= 2 else samples


def _request(unit: Unit) -> Request:
    found = unit.assembly.context
    assert isinstance(found, Request)
    return found
