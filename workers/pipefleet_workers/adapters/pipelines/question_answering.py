"""The pipeline of question-answering: the span of a context that answers a question. transformers 5 no longer has the pipeline.

Results equal the results of transformers 4.57, the last release with this pipeline, scores included. The scores of a chunk are a
softmax over its context and its first special token. An answer is widened to whole words. Spans of the same words are one answer,
and its score is the sum of their scores. The adapter of the task calls `encode` and `postprocess`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from pipefleet_workers.adapters.text.whole_texts import require_few_pieces

NAME = "pipefleet/question-answering"
LONGEST_CHUNK = 384
"""Tokens of question and context together, unless `max_seq_len` sets another bound."""
OVERLAP = 128
"""Most tokens that two chunks of a context share, unless `doc_stride` sets another number."""
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A question with a piece of its context: model inputs, the tokens of the context, and the characters of each token.

    It holds arrays, since the tokenizer's own encoding takes a dozen times as much memory: a book has thousands of chunks.
    """

    features: dict[str, _Array]
    allowed: _Array
    context: slice
    """The tokens of the context."""
    offsets: _Array
    """`[tokens, 2]`: the first character of each token, and the character after its last."""
    words: _Array
    """The word of each token, counted from 0; -1 for tokens without a word."""

    @property
    def nbytes(self) -> int:
        """Bytes in addition to the model's inputs."""
        return self.allowed.nbytes + self.offsets.nbytes + self.words.nbytes

    def characters(self, first: int, last: int, *, align_to_words: bool) -> tuple[int, int]:
        """The first character of token `first`, and the character after token `last`.

        With `align_to_words`, both tokens are widened to their words, if they have words.
        """
        if not align_to_words or self.words[first] < 0 or self.words[last] < 0:
            return int(self.offsets[first][0]), int(self.offsets[last][1])
        return int(self._word(first)[0][0]), int(self._word(last)[-1][1])

    def _word(self, token: int) -> _Array:
        """The offsets of all tokens of a token's word, as far as they lie in this chunk."""
        found: _Array = self.offsets[self.context][self.words[self.context] == self.words[token]]
        return found if len(found) else self.offsets[token : token + 1]


class QuestionAnsweringPipeline(ChunkPipeline):  # type: ignore[misc]  # transformers has no types
    """`{question, context}` to `{score, start, end, answer}`, or to a list of these with `top_k` above 1."""

    default_input_names = "question,context"
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not self.tokenizer.is_fast:
            raise ValueError("question-answering needs a model with a fast tokenizer; this one's is slow")

    def __call__(self, *inputs: Any, **parameters: Any) -> Any:
        """Answer one dict, a list of them, or `question` and `context` as two arguments or keywords."""
        if not inputs:
            inputs = ({"question": parameters.pop("question"), "context": parameters.pop("context")},)
        elif len(inputs) == 2:
            inputs = ({"question": inputs[0], "context": inputs[1]},)
        return super().__call__(*inputs, **parameters)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        parameters.pop("padding", None)
        given = {name: value for name, value in parameters.items() if value is not None}
        bounds = {"doc_stride", "max_seq_len", "max_question_len"}
        pre = {name: given.pop(name) for name in bounds & given.keys()}
        known = {"top_k", "max_answer_len", "handle_impossible_answer", "align_to_words"}
        if unknown := given.keys() - known:
            raise TypeError(f"question-answering takes no parameter {sorted(unknown)[0]!r}")
        return pre, {}, given

    def preprocess(self, example: Mapping[str, str], **bounds: Any) -> Iterator[dict[str, Any]]:
        """The chunks of one example, as tensors."""
        (chunks,) = encode(self.tokenizer, [example], **bounds)
        for index, chunk in enumerate(chunks):
            inputs = {name: torch.from_numpy(values.astype(np.int64))[None] for name, values in chunk.features.items()}
            yield {**inputs, "chunk": chunk, "context": example["context"], "is_last": index == len(chunks) - 1}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        kept = {name: model_inputs.pop(name) for name in ("chunk", "context", "is_last")}
        outputs = self.model(**model_inputs)
        return {"start": outputs["start_logits"], "end": outputs["end_logits"], **kept}

    def postprocess(
        self,
        model_outputs: Sequence[Mapping[str, Any]],
        *,
        top_k: int = 1,
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
    ) -> Any:
        """The best answers of all chunks; a dict when there is one, a list when there are several or none."""
        # Spans of the same words become one answer, so more spans are needed than answers are wanted.
        count, nothing = 2 * top_k + 10 if align_to_words else top_k, 1_000_000.0
        found: dict[str, dict[str, Any]] = {}
        for output in model_outputs:
            chunk, context = output["chunk"], output["context"]
            start, end = (_probable(output[name][0].float().numpy(), chunk.allowed) for name in ("start", "end"))
            nothing = min(nothing, float(start[0] * end[0]))
            start[0] = end[0] = 0.0
            for first, last, score in _spans(start, end, chunk.allowed, longest=max_answer_len, count=count):
                begin, stop = chunk.characters(first, last, align_to_words=align_to_words)
                answer = {"score": 0.0, "start": begin, "end": stop, "answer": context[begin:stop]}
                found.setdefault(answer["answer"].lower(), answer)["score"] += score
        answers = list(found.values())
        if handle_impossible_answer:
            answers.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
        answers = sorted(answers, key=lambda answer: answer["score"], reverse=True)[:top_k]
        return answers[0] if len(answers) == 1 else answers


def encode(
    tokenizer: Any,
    examples: Sequence[Mapping[str, str]],
    *,
    max_seq_len: int | None = None,
    doc_stride: int | None = None,
    max_question_len: int | None = None,
    most: int | None = None,
) -> list[list[Chunk]]:
    """The chunks of each example, tokenised in as few calls as possible.

    A question longer than `max_question_len` tokens is cut; without this argument no question is cut. Raises ValueError for an
    empty example, and for a question that leaves no room for a context. Raises ItemError (too_long) for an example whose chunks
    have more than `most` tokens together.
    """
    if not all(example["question"] and example["context"] for example in examples):
        raise ValueError("neither the question nor the context may be empty")
    longest = max_seq_len or min(tokenizer.model_max_length, LONGEST_CHUNK)
    stride = min(longest // 2, OVERLAP) if doc_stride is None else doc_stride
    questions, lengths = _cut(tokenizer, [example["question"] for example in examples], max_question_len)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    rooms = [longest - length - special for length in lengths]
    if min(rooms) < 2:
        raise ValueError(f"a question of {max(lengths)} tokens leaves no room for a context in {longest} tokens")
    # If the overlap were as long as the room, the tokenizer would panic instead of raising an exception.
    strides = [min(stride, room - 1) for room in rooms]
    for example, room, own_stride in zip(examples, rooms, strides, strict=True):
        if most is not None:
            require_few_pieces(tokenizer, example["context"], room=room, stride=own_stride, longest=longest, most=most)
    chunks: list[list[Chunk]] = [[] for _ in examples]
    for common in sorted(set(strides)):
        own = [index for index, value in enumerate(strides) if value == common]
        pairs = [(questions[index], examples[index]["context"]) for index in own]
        for owner, chunk in _chunks(tokenizer, pairs, longest=longest, stride=common):
            chunks[own[owner]].append(chunk)
    return chunks


def _cut(tokenizer: Any, questions: Sequence[str], longest: int | None) -> tuple[list[str], list[int]]:
    """The questions, cut to `longest` tokens, and the number of tokens of each."""
    encoded = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True)
    kept, lengths = [], []
    for question, offsets in zip(questions, encoded["offset_mapping"], strict=True):
        cut = longest is not None and len(offsets) > longest
        kept.append(question[: offsets[longest - 1][1]] if longest and cut else question)
        lengths.append(longest if longest and cut else len(offsets))
    return kept, lengths


def _chunks(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], *, longest: int, stride: int
) -> Iterator[tuple[int, Chunk]]:
    """The chunks of pairs of question and context, each with the index of its pair."""
    right = tokenizer.padding_side == "right"
    questions, contexts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    encoded = tokenizer(
        *((questions, contexts) if right else (contexts, questions)),
        truncation="only_second" if right else "only_first",
        max_length=longest,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    names = [name for name in tokenizer.model_input_names if name in encoded]
    for row, owner in enumerate(encoded["overflow_to_sample_mapping"]):
        features = {name: np.asarray(encoded[name][row], np.int32) for name in names}
        own = np.asarray([sequence == int(right) for sequence in encoded.sequence_ids(row)])
        # Some models choose this token to say that there is no answer.
        own |= features["input_ids"] == tokenizer.cls_token_id
        yield owner, Chunk(features, own, *_places(encoded[row], int(right)))


def _places(encoding: Any, sequence: int) -> tuple[slice, _Array, _Array]:
    """Where the context's tokens are in a chunk, the offsets of all tokens, and their words."""
    own = [index for index, one in enumerate(encoding.sequence_ids) if one == sequence]
    words = [-1 if word is None else word for word in encoding.word_ids]
    offsets = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
    return slice(own[0], own[-1] + 1) if own else slice(0), offsets, np.asarray(words, np.int32)


def _probable(logits: _Array, allowed: _Array) -> _Array:
    """A softmax over the allowed tokens."""
    logits = np.where(allowed, logits, -10_000.0)
    scores = np.exp(logits - logits.max())
    return scores / scores.sum()  # type: ignore[no-any-return]


def _spans(start: _Array, end: _Array, allowed: _Array, *, longest: int, count: int) -> list[tuple[int, int, float]]:
    """The `count` best spans of at most `longest` tokens: first token, last token, score."""
    width = min(longest, len(start))
    ends = np.lib.stride_tricks.sliding_window_view(np.concatenate([end, np.zeros(width - 1, end.dtype)]), width)
    scores = (start[:, None] * ends).ravel()
    if count == 1:
        best = np.asarray([scores.argmax()])
    else:
        likely = np.flatnonzero(scores > 0)
        if len(likely) > count:  # sorting all spans would take longer than the model
            least = np.partition(scores[likely], -count)[-count]
            likely = np.flatnonzero(scores >= least)
        best = likely[np.argsort(-scores[likely], kind="stable")][:count]
    places = [(int(place) // width, int(place) // width + int(place) % width, float(scores[place])) for place in best]
    possible = allowed.copy()
    possible[0] = True
    return [place for place in places if possible[place[0]] and possible[place[1]]]


PIPELINE_REGISTRY.register_pipeline(
    NAME, pipeline_class=QuestionAnsweringPipeline, pt_model=AutoModelForQuestionAnswering
)
