"""The adapter of encoder-decoders that write text: a text goes in; a summary, a translation or another text comes out.

Texts are padded on the right, where the encoder's mask hides the padding. Every decoder begins with one token, so no decoder input
is padded. Requests may differ in the same arguments as in `TextGenerator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import StoppingCriteriaList

from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.text.encoder import position_limit
from pipefleet_workers.adapters.writing.generate import Request, TextGenerator, filled, learnt_positions
from pipefleet_workers.adapters.writing.leaving import LeavingRows
from pipefleet_workers.adapters.writing.plan import Plan
from pipefleet_workers.items import Assembly, ItemError, Unit


class TextRewriter(TextGenerator):
    """text2text-generation, summarization and translation."""

    typical_size = 64
    typical_steps = 48

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._positions = learnt_positions(pipe.model.get_decoder(), pipe.model)
        self._readable = position_limit(pipe.model.get_encoder())

    def example(self, size: int) -> str:
        """`size` words, or fewer if the model has no positions for them."""
        words = size if self._readable is None else min(size, self._readable // 3)
        return " ".join((["the", "sea", "of", "trees"] * size)[:words])

    def example_parameters(self) -> Mapping[str, Any]:
        """Two languages, for a model that must be told them."""
        languages = getattr(self.pipe, "languages", ())
        return {"src_lang": languages[0], "tgt_lang": languages[-1]} if languages else {}

    def prompt_length(self, inputs: dict[str, Any]) -> int:
        """1: generate() puts one token before the text."""
        return 1

    def finish(self, assembly: Assembly) -> Any:
        """`[{"summary_text": …}]`, with the key of the task; one for each sequence."""
        request: Request = assembly.context
        tensors = bool(request.arguments.postprocess.get("return_tensors"))
        written = filled(assembly.outputs[0], request, self.hidden, all_shown=tensors)
        outputs = {"output_ids": [[[self._begin(request), *one] for one in written]]}
        return self.copies.get().postprocess(outputs, **request.arguments.fresh().postprocess)

    def _nested(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return parameters

    def _read(self, value: Any, arguments: Arguments) -> tuple[Any, torch.Tensor, Any]:
        """The text, the one token that its decoder begins with, and the tokens of the text."""
        longest, before = self.longest(self._readable), arguments.fresh().preprocess
        read = self.long_texts().bounded(value, before, longest, "pass truncation=true to cut it")
        ids: torch.Tensor = self.copies.get().preprocess(read, **before)["input_ids"][0].long()
        if len(ids) > longest:
            text = f"the text has {len(ids)} tokens, the model takes {longest}; pass truncation=true to cut it"
            raise ItemError("too_long", text, STAGE)
        if not len(ids):
            raise ItemError("bad_input", "the text is empty, and the tokenizer adds no token to it", STAGE)
        return value, torch.zeros(1, dtype=torch.long), ids

    def _hears_padding(self, plan: Plan) -> bool:
        """Usually not: padding lies in the encoder, away from the arguments that count and compare written tokens."""
        return plan.reads_encoder

    def _generate(self, inputs: dict[str, Any], **arguments: Any) -> Any:
        """The model's answers. On a CPU, rows that have ended leave the batch."""
        model = self.pipe.model
        config, rows = model.generation_config, len(inputs["input_ids"])

        def asked(name: str) -> Any:
            return arguments.get(name, getattr(config, name, None))

        if not LeavingRows.possible(model, rows, asked):
            return super()._generate(inputs, **arguments)
        ends = torch.tensor(asked("eos_token_id") if asked("eos_token_id") is not None else []).flatten().tolist()
        with LeavingRows(model, ends, arguments.pop("stopping_criteria", ())) as leaving:
            return super()._generate(inputs, stopping_criteria=StoppingCriteriaList([leaving]), **arguments)

    def _begin(self, request: Request) -> int:
        """The token that a decoder begins with."""
        asked = request.plan.shared.get("decoder_start_token_id")
        config = self.pipe.model.generation_config
        known = [asked, config.decoder_start_token_id, config.bos_token_id]
        return int(next(one for one in known if one is not None))

    def _prompt_cost(self, request: Request, features: Any) -> int:
        return len(features)

    def _inputs(self, units: Sequence[Unit]) -> dict[str, Any]:
        longest = max(len(unit.features) for unit in units)
        ids = torch.full((len(units), longest), self._pad)
        mask = torch.zeros_like(ids)
        for index, unit in enumerate(units):
            ids[index, : len(unit.features)] = unit.features
            mask[index, : len(unit.features)] = 1
        return {"input_ids": ids, "attention_mask": mask}
