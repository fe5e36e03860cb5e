"""The adapter of table-question-answering: a table and questions go in, cells or a written answer come out.

Each question is a unit; questions about different tables share a batch. TAPAS reads a table with a question and points at
cells; its inputs are padded. Other models (TAPEX) write their answer; their questions share a batch only if their inputs have one
length.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas
import torch

from pipefleet.contract.messages import encode_json
from pipefleet_workers.adapters.arguments import STAGE, Arguments, with_forward
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.draws import drawing
from pipefleet_workers.adapters.progress import UNOBSERVED, Progress
from pipefleet_workers.adapters.text.encoder import position_limit
from pipefleet_workers.adapters.writing.parameters import apart
from pipefleet_workers.adapters.writing.plan import GenerationPlanner
from pipefleet_workers.adapters.writing.rows import default_seed
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

TAPAS = "tapas"


@dataclass(frozen=True, slots=True)
class TableQuestions:
    """One table with its questions, tokenised: each tensor has a row for each question."""

    table: Any
    tensors: Mapping[str, torch.Tensor]
    generation: Mapping[str, Any]
    """Arguments of generate(), for a model that writes."""
    seed: int | None
    """None if nothing is drawn."""


class TableReader(Adapter):
    """table-question-answering: answers one question about a table, or a list of them."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.pads = pipe.type == TAPAS and pipe.tokenizer.padding_side == "right"
        self.typical_size = 48 if pipe.type == TAPAS else 0
        self._positions = position_limit(pipe.model)
        self._planner = None if pipe.type == TAPAS else GenerationPlanner(pipe)

    def example(self, size: int) -> dict[str, Any]:
        """A table of `size` cells."""
        rows = max(1, size // 2)
        table = {"name": [f"row {row}" for row in range(rows)], "count": [str(row * 7 % 11) for row in range(rows)]}
        return {"table": pandas.DataFrame(table, dtype=str), "query": "How many are there in row 3?"}

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """The inputs of TAPAS, padded on the right behind its mask; the inputs of other models, stacked."""
        longest = max(_tokens(unit) for unit in units)  # a unit's length also counts the rows of its answer
        names = units[0].features
        return {name: torch.cat([self._padded(name, unit, longest) for unit in units]) for name in names}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """Logits of tokens and of aggregations, or the written tokens, `[units, …]`."""
        pipe = self.pipe
        with torch.inference_mode():
            tensors = {name: tensor.to(pipe.device) for name, tensor in inputs.items()}
            if pipe.type != TAPAS:
                return (self._written(tensors, units),)
            if len(tensors["input_ids"]) > len(units):  # a sequence of questions, alone in its batch
                return pipe.sequential_inference(**tensors)
            outputs = pipe.model(**tensors)
        return outputs.to_tuple()[:2] if pipe.aggregate else (outputs.logits,)

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """For each unit its part of each output; the units of a sequence come in their order."""
        on_host = [output.float().cpu() if output.is_floating_point() else output.cpu() for output in outputs]
        rows = []
        if self.pipe.type != TAPAS:
            return [(part,) for part in on_host[0].chunk(len(units))]
        for row, unit in enumerate(units):
            count = len(unit.features["input_ids"])
            first, *others = [output[row : row + count] for output in on_host]
            rows.append((first[:, : unit.length], *others))
        return rows

    def numbers(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """The logits of each unit's own tokens."""
        return [row[0].numpy() for row in self.split(self.run(self.collate(units), units, UNOBSERVED), units)]

    def finish(self, assembly: Assembly) -> Any:
        """`{answer, coordinates, cells, aggregator?}`; a list of these if several questions were asked."""
        questions: TableQuestions = assembly.context
        parts = [assembly.outputs[index] for index in range(assembly.expected)]
        if self.pipe.type == TAPAS:
            outputs: Any = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        else:
            outputs = [row for (part,) in parts for row in part]
        rows = {"model_inputs": dict(questions.tensors), "table": questions.table, "outputs": outputs}
        return self.copies.get().postprocess(rows)

    def _written(self, tensors: dict[str, torch.Tensor], units: Sequence[Unit]) -> torch.Tensor:
        """The tokens of the answers. A unit has one row for each asked sequence."""
        request: TableQuestions = units[0].assembly.context
        with drawing(request.seed, self.pipe.device, loads=True):
            written: torch.Tensor = self.pipe.model.generate(**tensors, **copy.deepcopy(dict(request.generation)))
        return written

    def _generation(self, decoded: Decoded) -> tuple[Arguments, Mapping[str, Any], int | None, int]:
        """The pipeline's arguments, the arguments of generate(), the seed of its draws, and the rows of one question."""
        parameters, given = apart(decoded.work.parameters)
        seed = parameters.pop("seed", None)
        arguments = self.parse(parameters)
        if self._planner is None:  # a model that points at cells ignores these arguments, in transformers as well
            return arguments, {}, None, 1
        arguments = with_forward(arguments, given)
        plan = self._planner.plan(f"generate {encode_json(sorted(given.items()))}", given)
        drawn = plan.sampling is not None or plan.alone
        chosen = (default_seed(decoded.work) if seed is None else seed) if drawn else None
        return arguments, self._planner.merged(given)[0], chosen, plan.rows

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        arguments, generation, seed, answers = self._generation(decoded)
        encoded = dict(self.copies.get().preprocess(decoded.value, **arguments.fresh().preprocess))
        table = encoded.pop("table")
        tensors = {name: value for name, value in encoded.items() if name in self.pipe.tokenizer.model_input_names}
        count, length = tensors["input_ids"].shape
        if self._positions is not None and length > self._positions:
            text = f"table and question have {length} tokens, the model takes {self._positions}; pass truncation=true"
            raise ItemError("too_long", text, STAGE)
        together = bool(arguments.forward.get("sequential")) and count > 1
        groups = [slice(0, count)] if together else [slice(row, row + 1) for row in range(count)]
        assembly = Assembly(decoded.work, len(groups), TableQuestions(table, tensors, generation, seed))
        alone = id(assembly) if together or seed is not None else None
        asked = None if self._planner is None else repr(sorted(generation.items()))
        key = (tuple(tensors), None if self.pads else length, alone, asked)
        parts = [{name: tensor[group] for name, tensor in tensors.items()} for group in groups]
        return [Unit(assembly, index, key, length * answers, part) for index, part in enumerate(parts)]

    def _padded(self, name: str, unit: Unit, longest: int) -> torch.Tensor:
        value: torch.Tensor = unit.features[name]
        filler = self.pipe.tokenizer.pad_token_id if name == "input_ids" else 0
        padded = value.new_full((len(value), longest, *value.shape[2:]), filler or 0)
        padded[:, : _tokens(unit)] = value
        return padded


def _tokens(unit: Unit) -> int:
    """Tokens of a unit's table with its question."""
    return int(unit.features["input_ids"].shape[1])
