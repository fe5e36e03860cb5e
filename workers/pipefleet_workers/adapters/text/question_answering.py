"""The adapter of question-answering: a question and its context go in, the span that answers comes out.

A long context becomes several chunks that overlap; each chunk is a unit, so chunks of different requests share batches. The
pipeline in `pipelines.question_answering` makes the chunks and reads the answer from their logits. It raises ItemError (too_long)
for a context with too many chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipefleet_workers.adapters.arguments import Arguments
from pipefleet_workers.adapters.pipelines.question_answering import LONGEST_CHUNK, Chunk, encode
from pipefleet_workers.adapters.text.encoder import TextEncoder
from pipefleet_workers.items import Assembly, Decoded, Unit


@dataclass(frozen=True, slots=True)
class Pair:
    """One question and its context, in chunks."""

    context: str
    chunks: list[Chunk]
    arguments: Arguments

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks in addition to the model's inputs."""
        return sum([chunk.nbytes for chunk in self.chunks])


class QuestionAnswerer(TextEncoder):
    """question-answering: the span of a context that answers a question."""

    cut_hint = "pass a smaller max_seq_len to have the context read in pieces"

    def example(self, size: int) -> dict[str, Any]:
        """A question about a context of `size` words."""
        return {"question": "How wide is the sea?", "context": " ".join((["the", "sea", "was", "wide"] * size)[:size])}

    def encode(self, values: Sequence[Any], arguments: Arguments) -> Sequence[Any]:
        """The chunks of each pair."""
        return encode(self.copies.get().tokenizer, values, **arguments.preprocess, most=self.max_whole_characters)

    def bounded(self, value: Any, arguments: Arguments) -> Any:
        """A value with its question cut soon after the tokens that are read. The context stays: chunks read it to its end."""
        bounds = [one for one in arguments.preprocess.values() if isinstance(one, int)]
        question = self.long_texts().shortened(value["question"], max([LONGEST_CHUNK, *bounds]))
        return {**value, "question": question}

    def units(self, decoded: Decoded, arguments: Arguments, encoded: Any) -> list[Unit]:
        """A unit for each chunk."""
        assembly = Assembly(decoded.work, len(encoded), Pair(decoded.value["context"], encoded, arguments))
        return [self.unit(assembly, index, chunk.features, arguments) for index, chunk in enumerate(encoded)]

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The logits of each unit's own tokens, `[2, tokens]`: row 0 for the answer's first token, row 1 for its last."""
        with torch.inference_mode():
            logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], 1).float().cpu()
        return [logits[row, :, self.span(unit, logits.shape[2])] for row, unit in enumerate(units)]

    def finish(self, assembly: Assembly) -> Any:
        """`{score, start, end, answer}`, or a list of these with `top_k`."""
        pair: Pair = assembly.context
        rows = [
            {"start": logits[:1], "end": logits[1:], "chunk": chunk, "context": pair.context}
            for chunk, logits in ((chunk, assembly.outputs[index]) for index, chunk in enumerate(pair.chunks))
        ]
        return self.copies.get().postprocess(rows, **pair.arguments.postprocess)
