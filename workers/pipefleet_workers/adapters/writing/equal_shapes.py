"""The adapter of writing models that padding would change: encoder-decoders, and models with a generate() of their own.

Requests share a call if their tensors have equal shapes and their arguments of generate() are equal. A request that samples has a
call of its own, seeded by the request. Texts that are too long raise ItemError (too_long).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin, StoppingCriteriaList

from pipefleet.contract.messages import encode_json
from pipefleet.contract.records import JobFailure
from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.base import Adapter, shape_key
from pipefleet_workers.adapters.draws import drawing
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.writing.generate import context_length, learnt_positions, on_device
from pipefleet_workers.adapters.writing.parameters import without_stops
from pipefleet_workers.adapters.writing.plan import GenerationPlanner
from pipefleet_workers.adapters.writing.rows import Row, RowStops, default_seed
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

_UNBOUNDED = 1 << 40
PATCH = 32 * 32 * 3
"""Numbers of a picture's tensor that count as one token."""
_PROMPTS = ("decoder_input_ids", "input_ids")


@dataclass(frozen=True, slots=True)
class Writing:
    """The parts of one request: `generation` has its arguments of generate(), `prompt` the text that its result repeats."""

    arguments: Arguments
    generation: Mapping[str, Any]
    stop: tuple[str, ...]
    seed: int | None
    """None if nothing is drawn."""
    prompt: Any = None


class EqualWriter(Adapter):
    """Writes with generate(). `finish` gets, as output of an item, its sequences `[sequences, tokens]`."""

    typical_steps = 16
    loads = False
    """Whether transformers' pipeline reads a single input through a DataLoader."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._planner = GenerationPlanner(pipe)
        self._positions = learnt_positions(pipe.model.get_decoder(), pipe.model)

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """For each unit its sequences, or why it has none."""
        request, model, device = _writing(units[0]), self.pipe.model, self.pipe.device
        stops = RowStops([Row(unit.assembly.work.job, _UNBOUNDED) for unit in units], 0, progress)
        arguments: dict[str, Any] = copy.deepcopy(dict(request.generation))
        if request.stop:
            arguments |= {"stop_strings": list(request.stop), "tokenizer": self.pipe.tokenizer}
        with torch.inference_mode(), drawing(request.seed, device, loads=self.loads):
            sequences = model.generate(
                **on_device(inputs, device), stopping_criteria=StoppingCriteriaList([stops]), **arguments
            )
        return _apart(getattr(sequences, "sequences", sequences).cpu(), stops, units)

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The outputs themselves: `run` has split them already."""
        return list(outputs)

    def finish(self, assembly: Assembly) -> Any:
        """The result of the pipeline's postprocess for the sequences."""
        request: Writing = assembly.context
        outputs = {"output_ids": assembly.outputs[0]}
        return self.copies.get().postprocess(outputs, **request.arguments.fresh().postprocess)

    def generation(self, arguments: Arguments) -> Mapping[str, Any]:
        """The arguments of generate(), taken from the arguments of the pipeline's forward."""
        return arguments.forward

    def read(self, value: Any, arguments: Arguments) -> tuple[dict[str, torch.Tensor], Any]:
        """The tensors of an input, and the part of it that the result repeats."""
        return dict(self.copies.get().preprocess(value, **arguments.fresh().preprocess)), None

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        parameters, stop = without_stops(decoded.work.parameters)
        seed = parameters.pop("seed", None)
        arguments = self.parse(parameters)
        plan = self._planner.plan(arguments.forward_key, self.generation(arguments))
        self._require_room(decoded.value, arguments)
        features, prompt = self.read(decoded.value, arguments)
        tokens = next((features[name].shape[1] for name in _PROMPTS if name in features), 1)
        generation = self._bounded(self._arguments(arguments), tokens)
        drawn = plan.sampling is not None or plan.alone
        chosen = (default_seed(decoded.work) if seed is None else seed) if drawn else None
        request = Writing(arguments, generation, stop, chosen, prompt)
        assembly = Assembly(decoded.work, expected=1, context=request)
        shared = encode_json(sorted((name, repr(value)) for name, value in generation.items()))
        key = (shared, request.stop, shape_key(features), id(assembly) if drawn else None)
        written = generation.get("max_new_tokens") or plan.max_new_tokens or plan.max_length or 1
        return [Unit(assembly, 0, key, self.cost(features, tokens + written) * plan.rows, features)]

    def _require_room(self, value: Any, arguments: Arguments) -> None:
        """Raise ItemError (too_long) for a text beside a picture that is much too long, unless the request asks to cut it."""
        longest = self._positions or context_length(self.pipe.model) or self.max_tokens
        if isinstance(value, Mapping) and not arguments.preprocess.get("truncation"):
            for one in value.values():
                if isinstance(one, str):
                    self.long_texts().require(one, longest)

    def cost(self, features: Mapping[str, torch.Tensor], tokens: int) -> int:
        """The cost of a row: the tokens of its prompt and its answer, and its picture in patches."""
        return tokens + _numbers(features) // PATCH

    def _arguments(self, arguments: Arguments) -> dict[str, Any]:
        """All arguments that the pipeline passes to generate()."""
        generation = self._planner.merged(self.generation(arguments))[0]
        if type(self.pipe.model).generate is not GenerationMixin.generate:
            generation.pop("pad_token_id", None)  # such a model passes its own padding token to its decoder
        return generation

    def _bounded(self, generation: dict[str, Any], prompt: int) -> dict[str, Any]:
        """`generation`, with no more new tokens than a learnt table of positions has room for."""
        if self._positions is None:
            return generation
        if prompt > self._positions:
            # Refuse it here: on a GPU an index beyond the table breaks the device for every later input.
            raise ItemError("too_long", f"the text has {prompt} tokens, the model takes {self._positions}", STAGE)
        room = {"max_new_tokens": self._positions - prompt + 1, "max_length": self._positions + 1}
        bounds = {name: min(bound, generation[name]) for name, bound in room.items() if generation.get(name)}
        return {**generation, **bounds}


def _numbers(features: Mapping[str, torch.Tensor]) -> int:
    return max(one.numel() for one in features.values() if isinstance(one, torch.Tensor))


def _writing(unit: Unit) -> Writing:
    found = unit.assembly.context
    assert isinstance(found, Writing)
    return found


def _apart(sequences: torch.Tensor, stops: RowStops, units: Sequence[Unit]) -> list[torch.Tensor | JobFailure]:
    each = len(sequences) // len(units)
    return [
        stops.stopped[index][1] if index in stops.stopped else sequences[index * each : (index + 1) * each]
        for index in range(len(units))
    ]
