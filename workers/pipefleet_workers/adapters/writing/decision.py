"""The adapter of decision: a state and typed questions go in, a probability for every option comes out.

It runs one request at a time, as in transformers: the prompts cannot be padded. A bad request, and fields that transformers would
open as URLs, raise ItemError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.writing.generate import context_length
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

_FIELDS = {"state", "questions"}
_QUESTIONS = "each has a type (noul, choice, score), instructions and, for choice and score, criteria"
_ANY_REQUEST = {"state": "", "questions": {"ready": {"type": "noul", "instructions": "Is it?"}}}


class Decider(Adapter):
    """decision: answers typed questions about a state, with a probability for every option."""

    typical_size = 0

    def __init__(self, pipe: Any) -> None:
        # The first request adds tokens to the tokenizer; this must happen before threads take copies of it.
        pipe.preprocess(_ANY_REQUEST)
        super().__init__(pipe)

    def example(self, size: int) -> dict[str, Any]:
        """A state of `size` words and a question."""
        return {**_ANY_REQUEST, "state": "wide sea " * (size // 2)}

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """The prompts of the one unit."""
        (unit,) = units
        return {"prompts": unit.features}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """The scores of every question, on the host."""
        return self.pipe.forward(inputs)

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The outputs themselves: a batch has one unit."""
        return [outputs]

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        request = _request(decoded.value)
        arguments = self.parse(decoded.work.parameters)
        try:
            prompts = self.copies.get().preprocess(request, **arguments.fresh().preprocess)["prompts"]
        except ValueError:  # the text of the error repeats the request, so it is dropped
            raise ItemError("bad_input", f"the model does not take the questions: {_QUESTIONS}", STAGE) from None
        lengths, longest = [_tokens(inputs) for inputs, _ in prompts], context_length(self.pipe.model)
        if longest is not None and max(lengths) > longest:
            raise ItemError("too_long", f"a prompt has {max(lengths)} tokens, the model takes {longest}", STAGE)
        assembly = Assembly(decoded.work, expected=1, context=arguments)
        return [Unit(assembly, 0, id(assembly), sum(lengths), prompts)]


def _request(value: Any) -> dict[str, Any]:
    """A request, given as a dict or as its JSON.

    Raises ItemError for further fields: transformers would open the URLs of images.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ItemError("bad_input", f"a text must be the JSON of a request: {error}", STAGE) from None
    if not isinstance(value, Mapping) or set(value) != _FIELDS:
        raise ItemError("bad_input", "a request has a state and questions, and nothing else", STAGE)
    return dict(value)


def _tokens(inputs: Mapping[str, Any]) -> int:
    ids = inputs["input_ids"]
    assert isinstance(ids, torch.Tensor)
    return int(ids.numel())
