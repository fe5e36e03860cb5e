"""The adapter of most tasks: a transformers pipeline taken apart into its stages. It batches only inputs of equal shape.

    cpu threads:      prepare ─▶ units
    a lane's thread:  collate (on a GPU: in a thread beside it) ─▶ run ─▶ split ─▶ the output of each unit
    finish threads:   finish ─▶ result

The engine calls these methods. Stacking tensors of one shape is exact for every model; adapters that pad do so only where this is
exact too. `prepare` returns an ItemError for an item that fails; an exception in another method fails only its own item.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipefleet_workers.adapters.arguments import STAGE, ArgumentParser, Arguments
from pipefleet_workers.adapters.continuous import ContinuousWriter
from pipefleet_workers.adapters.progress import UNOBSERVED, Progress
from pipefleet_workers.adapters.text.long_texts import LongTexts
from pipefleet_workers.adapters.text.slices import SliceTokenizer
from pipefleet_workers.adapters.text.whole_texts import guard
from pipefleet_workers.adapters.vision.whole_pictures import require_pixels
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit
from pipefleet_workers.process.watchdog import working_on
from pipefleet_workers.settings import WorkerSettings

_PER_THREAD = ("tokenizer", "processor", "image_processor", "video_processor", "feature_extractor")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference, relative to the largest output, between a padded row and the same input alone."""
_OWN_PARAMETERS = ("pooling", "normalize", "strict_media")


class PipelineCopies:
    """One copy of the pipeline for each thread, with one model: a fast tokenizer that two threads use is silently wrong."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._local = threading.local()
        self._lock = threading.Lock()
        self._most = WorkerSettings().max_whole_characters

    def get(self) -> Any:
        """The calling thread's copy."""
        found = getattr(self._local, "pipe", None)
        if found is None:
            with self._lock:
                found = copy.copy(self._pipe)
                for name in _PER_THREAD:
                    if getattr(found, name, None) is not None:
                        setattr(found, name, copy.deepcopy(getattr(found, name)))
                self._guard(found)
            self._local.pipe = found
        return found

    def long_texts(self) -> LongTexts:
        """The LongTexts of the calling thread's tokenizer."""
        found: LongTexts | None = getattr(self._local, "long_texts", None)
        if found is None:
            found = self._local.long_texts = LongTexts(self.get().tokenizer)
        return found

    def slices(self) -> SliceTokenizer:
        """The SliceTokenizer of the calling thread's tokenizer."""
        found: SliceTokenizer | None = getattr(self._local, "slices", None)
        if found is None:
            found = self._local.slices = SliceTokenizer(self.get().tokenizer, self._most)
        return found

    def _guard(self, pipe: Any) -> None:
        processor = getattr(pipe, "processor", None)
        for tokenizer in (getattr(pipe, "tokenizer", None), getattr(processor, "tokenizer", None)):
            if callable(tokenizer):
                guard(tokenizer, self._most)


class Adapter:
    """Prepares, collates, runs and finishes the items of one task. `prepare` and `finish` are thread-safe."""

    typical_size = 28
    """Size of the made-up input that the warm-up measures batches with, see `warmup.example_units`. 0: nothing is measured, and the
    cost of the task table is used.
    """
    typical_steps = 0
    """Tokens that a model writes for an input of `typical_size`; 0 for a model that writes none."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.parallel = not getattr(pipe.model, "can_generate", lambda: False)()
        """Whether several threads may call `collate`, `run` and `split` at once, with batches that do not `exclude` others. A model
        that writes draws from the random numbers of the whole process.
        """
        self.copies = PipelineCopies(pipe)
        self.parser = ArgumentParser(pipe)
        settings = WorkerSettings()
        self.max_tokens, self.max_whole_seconds = settings.max_tokens, settings.max_whole_seconds
        self.max_whole_pixels = settings.max_whole_pixels
        self.max_whole_characters = settings.max_whole_characters
        self.pads = False
        """Whether units of unequal length may share a batch; the warm-up sets it to False if this changes results."""
        self.continuous: ContinuousWriter | None = None
        """Writes units that may join and leave at every step, if the warm-up has proved one; their key is `JOINS`."""
        self.tells_moments = False
        """Whether the model can tell when a word was spoken; then `moments` is proved too."""
        self.times_together = True
        """Whether units that ask for the moments of words may share a batch.

        The warm-up sets it to False if this changes results.
        """

    @property
    def sampling_rate(self) -> int | None:
        """The model's own rate in Hz, for audio."""
        extractor = getattr(self.pipe, "feature_extractor", None)
        return getattr(extractor, "sampling_rate", None)

    def longest(self, positions: int | None) -> int:
        """Tokens that a text may have: the size of the table of positions, else the bound of the settings or of the model's config.

        The memory of a forward grows with the square of the tokens. Without a bound, one text could end the worker.
        """
        if positions is not None:
            return positions
        known = getattr(self.pipe.model.config, "max_position_embeddings", None)
        return max(self.max_tokens, known or 0)

    def long_texts(self) -> LongTexts:
        """The LongTexts of the calling thread's copy of the tokenizer."""
        return self.copies.long_texts()

    def example(self, size: int) -> Any:
        """An input of about `size` for the warm-up; None if an input can be made up from the task's media alone."""
        return None

    def example_parameters(self) -> Mapping[str, Any]:
        """Parameters that this model needs for any example."""
        return {}

    def prepare(self, decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
        """The units or the failure of each item, in the order of `decoded`."""
        prepared: list[list[Unit] | ItemError] = []
        for one in decoded:
            working_on(one.work)
            try:
                require_pixels(self.pipe, one.value, self.max_whole_pixels)
                prepared.append(self._prepare(one))
            except ItemError as error:
                prepared.append(error)
            except BaseException as error:  # noqa: BLE001 - whatever a pipeline raises, a Rust panic too, is this input's failure alone
                prepared.append(ItemError("bad_input", f"the pipeline refuses the input: {brief(error)}", STAGE))
        return prepared

    def excludes(self, units: Sequence[Unit]) -> bool:
        """Whether no other batch may run beside this batch, although the adapter is `parallel`."""
        return False

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """One dict of model inputs, in the order of `units`."""
        names = units[0].features
        return {name: _joined([unit.features[name] for unit in units]) for name in names}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """The model's outputs for collated inputs, on the host. A forward of many steps calls `progress` at each step."""
        return self.pipe.forward(inputs, **self.arguments(units[0]).fresh().forward)

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The output of each unit, in order."""
        return [
            type(outputs)({name: _row(value, index) for name, value in outputs.items()}) for index in range(len(units))
        ]

    def numbers(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """The model's raw outputs for each unit, without padding. The proof of exactness compares these arrays."""
        rows = self.split(self.run(self.collate(units), units, UNOBSERVED), units)
        return [_as_numbers(next(iter(row.values())) if isinstance(row, Mapping) else row) for row in rows]

    def moments(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """For each unit, the second at which each written token was spoken. Called only with `tells_moments`."""
        raise NotImplementedError

    def text_so_far(self, unit: Unit, tokens: Sequence[int]) -> str | None:
        """The text of a unit's result if `tokens` were all its new tokens. None if the adapter writes no text step by step."""
        return None

    def finish(self, assembly: Assembly) -> Any:
        """The result of an item whose units all have their outputs: the same value as a single pipeline call returns."""
        arguments: Arguments = assembly.context.fresh()
        (output,) = assembly.outputs.values()
        return self.copies.get().postprocess(output, **arguments.postprocess)

    def arguments(self, unit: Unit) -> Arguments:
        """The parsed parameters of the job of a unit."""
        found = unit.assembly.context
        assert isinstance(found, Arguments)
        return found

    def parse(self, parameters: Mapping[str, Any]) -> Arguments:
        """The pipeline's arguments, without our own parameters."""
        return self.parser.parse({name: value for name, value in parameters.items() if name not in _OWN_PARAMETERS})

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        arguments = self.parse(decoded.work.parameters)
        fresh = arguments.fresh()
        features = dict(self.copies.get().preprocess(decoded.value, **fresh.preprocess))
        assembly = Assembly(decoded.work, expected=1, context=arguments)
        return [Unit(assembly, 0, (arguments.forward_key, shape_key(features)), _size(features), features)]


def shape_key(features: Mapping[str, Any]) -> tuple[Any, ...]:
    """A key that is equal for features that can be stacked: the same names, and the same shapes beyond the first dimension."""
    return tuple(
        (name, tuple(value.shape[1:]) if isinstance(value, torch.Tensor) else repr(value))
        for name, value in features.items()
    )


def brief(error: BaseException) -> str:
    """The class of an error and the first 300 characters of its first line; whole payloads never reach a message.

    If the first line ends with a colon, the next line is added: the first says nothing without it.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


def _size(features: Mapping[str, Any]) -> int:
    """Elements of the largest tensor; the cost of a stacked batch grows with them."""
    return max((value.numel() for value in features.values() if isinstance(value, torch.Tensor)), default=1)


def _as_numbers(value: Any) -> np.ndarray[Any, Any]:
    """The value as a NumPy array; a tensor becomes float32, since NumPy does not know bfloat16."""
    return np.asarray(value.float().cpu() if isinstance(value, torch.Tensor) else value)


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else values[0]


def _row(value: Any, index: int) -> Any:
    return value[index : index + 1] if isinstance(value, torch.Tensor) else value
