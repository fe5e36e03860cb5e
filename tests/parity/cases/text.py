"""Tasks whose input is text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import CHECKPOINTS
from tests.parity.cases.case import Case, direct
from tests.parity.harness import Call


def pooled(pipe: Any, call: Call) -> Any:
    """Pooling by hand over the token matrix of the pipeline."""
    parameters = dict(call.parameters)
    pooling, normalize = parameters.pop("pooling", None), parameters.pop("normalize", False)
    matrix = np.asarray(pipe(call.inputs, **parameters), np.float64)
    ways = {"mean": lambda: matrix[0].mean(0), "cls": lambda: matrix[0, 0], "last": lambda: matrix[0, -1]}
    value = ways[pooling]() if pooling else matrix
    return value / np.linalg.norm(value, axis=-1, keepdims=True) if normalize else value


def written(pipe: Any, call: Call) -> Any:
    """For generate() `stop` is `stop_strings`, which needs the tokenizer. Older pipelines have no name for several strings."""
    parameters = dict(call.parameters)
    if "stop" in parameters:
        parameters |= {"stop_strings": parameters.pop("stop"), "tokenizer": pipe.tokenizer}
    return direct(pipe, Call(call.inputs, parameters))


def short_texts(folder: Path) -> list[Any]:
    """Texts that fit the model without truncation."""
    return [text[:150] for text in CHECKPOINTS["feature-extraction"].inputs(folder)]


def pairs(_: Path) -> list[Any]:
    return [
        {"text": "A cat sleeps.", "text_pair": "An animal rests on the red couch."},
        {"text": "The delivery was fast, but the packaging was the worst.", "text_pair": "No."},
        {"text": "ok", "text_pair": "ok"},
    ]


def worded(pipe: Any, call: Call) -> Any:
    """A list of words is one input, whose result the pipeline puts into a list."""
    result = direct(pipe, call)
    return result[0] if isinstance(call.inputs, list) else result


def masks(folder: Path) -> list[Any]:
    two = ["[MASK] is sleeping on the [MASK].", "The [MASK] of [MASK] and [MASK] was slow, but it was fine in the end."]
    return [*CHECKPOINTS["fill-mask"].inputs(folder)[:3], *two]


def words(_: Path) -> list[Any]:
    return [
        ["Angela", "Merkel", "met", "Emmanuel", "Macron", "in", "Paris", "."],
        ["ok"],
        ["A", "very", "long", "text", "of", "which", "Paris", "is", "told", "on", "Tuesday", ",", "again", "!"] * 5,
    ]


def spans_by_hand(pipe: Any, call: Call) -> Any:
    """The best span of a context that fits in one chunk, from the logits of the model itself and without any word of ours."""
    question, context = call.inputs["question"], call.inputs["context"]
    encoded = pipe.tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets, sequence = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
    with torch.no_grad():
        output = pipe.model(**encoded)
    context_or_first = torch.tensor([one == 1 or index == 0 for index, one in enumerate(sequence)])
    start, end = (
        logits[0].masked_fill(~context_or_first, -torch.inf).softmax(0)
        for logits in (output.start_logits, output.end_logits)
    )
    found = max(
        (float(start[first] * end[last]), -first, -last)
        for first, one in enumerate(sequence)
        for last in range(first, min(first + call.parameters.get("max_answer_len", 15), len(sequence)))
        if one == 1 and sequence[last] == 1
    )
    begin, stop = offsets[-found[1]][0], offsets[-found[2]][1]
    return {"score": found[0], "start": begin, "end": stop, "answer": context[begin:stop]}


def words_by_hand(pipe: Any, call: Call) -> Any:
    """The answers of a context in one chunk: of the best spans, those in the same words are one, with the sum of their scores."""
    question, context = call.inputs["question"], call.inputs["context"]
    encoded = pipe.tokenizer(question, context, return_tensors="pt")
    with torch.no_grad():
        output = pipe.model(**encoded)
    own = [index for index, one in enumerate(encoded.sequence_ids(0)) if one == 1]
    others = torch.ones(encoded["input_ids"].shape[1], dtype=torch.bool)
    others[[0, *own]] = False
    start, end = (
        logits[0].masked_fill(others, -torch.inf).softmax(0) for logits in (output.start_logits, output.end_logits)
    )
    spans = [(float(start[first] * end[last]), first, last) for first in own for last in own if 0 <= last - first < 15]
    wanted, answers = call.parameters.get("top_k", 1), dict[str, dict[str, Any]]()
    for score, first, last in sorted(spans, reverse=True)[: 2 * wanted + 10]:
        begin = encoded.word_to_chars(encoded.token_to_word(first), sequence_index=1).start
        stop = encoded.word_to_chars(encoded.token_to_word(last), sequence_index=1).end
        words = context[begin:stop]
        answers.setdefault(words.lower(), {"score": 0.0, "start": begin, "end": stop, "answer": words})["score"] += (
            score
        )
    best = sorted(answers.values(), key=lambda answer: -answer["score"])[:wanted]
    return best[0] if len(best) == 1 else best


def short_questions(folder: Path) -> list[Any]:
    return [one for one in CHECKPOINTS["question-answering"].inputs(folder) if len(one["context"]) < 250]


def tables_with_several_questions(folder: Path) -> list[Any]:
    inputs = CHECKPOINTS["table-question-answering"].inputs(folder)
    asked = {
        "table": inputs[1]["table"],
        "query": ["Which club?", "sum of goals", "And which player had the most of them?"],
    }
    return [asked, inputs[0], {**inputs[2], "query": ["What?", "What is the capital of France?"]}]


def short_sources(folder: Path) -> list[Any]:
    return CHECKPOINTS["text2text-generation"].inputs(folder)[2:]


def generated(pipe: Any, call: Call) -> Any:
    """Our `stop` is `stop_strings` and the tokenizer for generate()."""
    parameters = dict(call.parameters)
    if "stop" in parameters:
        parameters |= {"stop_strings": parameters.pop("stop"), "tokenizer": pipe.tokenizer}
    return pipe(call.inputs, **parameters)


def written_by_hand(name: str, prefix: str = "", **trained: Any) -> Any:
    """What generate() of the model writes behind the prefix, with the parameters it was trained with below those of the call."""

    def expected(pipe: Any, call: Call) -> Any:
        languages = ("src_lang", "tgt_lang")
        called = {name: value for name, value in call.parameters.items() if name not in languages}
        own = {name: value for name, value in trained.items() if name != "max_length" or "max_new_tokens" not in called}
        parameters = {"num_beams": 4, **own, **called}
        ids = pipe.tokenizer(prefix + call.inputs, return_tensors="pt").input_ids
        sequences = pipe.model.generate(ids, **parameters)
        return [{name: pipe.tokenizer.decode(one, skip_special_tokens=True)} for one in sequences]

    return expected


def translated_by_hand(pipe: Any, call: Call) -> Any:
    """As the documentation of NLLB has it: the language in front, that of the translation forced."""
    parameters = dict(call.parameters)
    tokenizer, target = pipe.tokenizer, parameters.pop("tgt_lang")
    ids = tokenizer(call.inputs, add_special_tokens=False).input_ids
    begin = tokenizer.convert_tokens_to_ids([parameters.pop("src_lang")])
    ids = torch.tensor([[*begin, *ids, tokenizer.eos_token_id]])
    forced = tokenizer.convert_tokens_to_ids(target)
    sequences = pipe.model.generate(ids, forced_bos_token_id=forced, **parameters)
    return [{"translation_text": tokenizer.decode(one, skip_special_tokens=True)} for one in sequences]


_WRITING = "text-generation"
_BEAMS = {"do_sample": False, "num_beams": 3, "max_new_tokens": 7}

_SHORT = {"do_sample": False, "max_new_tokens": 8}

CASES = (
    Case("feature-extraction", ragged=True, shares=6),
    Case(
        "feature-extraction",
        [{"truncation": True}, {"tokenize_kwargs": {"truncation": True, "max_length": 9}}],
        "cut",
        ragged=True,
    ),
    Case(
        "feature-extraction",
        [
            {"pooling": pooling, "normalize": normalize}
            for pooling in (None, "mean", "cls", "last")
            for normalize in (False, True)
        ],
        "pooled",
        short_texts,
        expected=pooled,
        ragged=True,
    ),
    Case("text-classification", ragged=True, shares=6),
    Case(
        "text-classification",
        [
            {},
            {"top_k": 1},
            {"top_k": 2},
            {"top_k": None},
            {"function_to_apply": "sigmoid"},
            {"function_to_apply": "none", "top_k": None},
            {"truncation": True, "max_length": 8},
        ],
        "parameters",
        short_texts,
        ragged=True,
    ),
    Case(
        "text-classification", [{}, {"top_k": 2}, {"truncation": True, "max_length": 12}], "pairs", pairs, ragged=True
    ),
    Case(
        _WRITING,
        [
            {"do_sample": False, "max_new_tokens": 3},
            {"do_sample": False, "max_new_tokens": 20},
            {"do_sample": False, "max_new_tokens": 12, "return_full_text": False},
            {"do_sample": False, "max_new_tokens": 25, "stop": ["e", "the"]},
            {"do_sample": False, "max_new_tokens": 25, "stop": ["a"], "return_full_text": False},
            {"do_sample": False, "max_length": 250},
            {"do_sample": False, "max_new_tokens": 9, "add_special_tokens": True},
        ],
        expected=written,
        ragged=True,
        shares=30,
    ),
    Case(
        _WRITING,
        [
            {"do_sample": False, "max_new_tokens": 9, "repetition_penalty": 1.7},
            {"do_sample": False, "max_new_tokens": 5, "repetition_penalty": 1.7},
            {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9},
            {"do_sample": False, "max_new_tokens": 14, "no_repeat_ngram_size": 1},
        ],
        "penalties",
        ragged=True,
        shares=6,
    ),
    Case(
        _WRITING,
        [
            _BEAMS,
            {**_BEAMS, "num_return_sequences": 2},
            {**_BEAMS, "length_penalty": 2.0, "early_stopping": True},
            {**_BEAMS, "stop": ["e"], "early_stopping": "never"},
        ],
        "beams",
        expected=written,
        ragged=True,
        shares=6,
    ),
    Case(
        _WRITING,
        [
            {**_SHORT, "stop_sequence": "e", "skip_special_tokens": False},
            {**_SHORT, "return_tensors": True},
            {**_SHORT, "prefix": "In May: "},
            {**_SHORT, "temperature": 0.0},
            {**_SHORT, "use_cache": False, "truncation": True, "tokenizer_encode_kwargs": {"max_length": 9}},
            {"do_sample": False, "max_new_tokens": None},
        ],
        "arguments",
        ragged=True,
        shares=16,
    ),
    Case(
        _WRITING,
        [
            {**_SHORT, "bad_words_ids": [[5], [260, 261]]},
            {**_SHORT, "sequence_bias": [[[70], 4.0], [[70, 71], -9.0]], "repetition_penalty": 1.7},
            {**_SHORT, "suppress_tokens": [70, 71, 72], "begin_suppress_tokens": [73]},
            {**_SHORT, "exponential_decay_length_penalty": [2, 1.5]},
            {**_SHORT, "eos_token_id": [70, 260], "pad_token_id": 5},
            {**_SHORT, "forced_eos_token_id": 9, "renormalize_logits": True, "remove_invalid_values": True},
            {**_SHORT, "encoder_repetition_penalty": 3.0, "encoder_no_repeat_ngram_size": 2},
            {**_SHORT, "guidance_scale": 1.5},
            {**_BEAMS, "num_return_sequences": 2, "return_tensors": True},
        ],
        "scores",
        ragged=True,
        shares=4,
    ),
    Case("fill-mask", ragged=True, shares=5),
    Case(
        "fill-mask",
        [
            {},
            {"top_k": 2},
            {"targets": ["the", "cat", "was"]},
            {"targets": "dog", "top_k": 4},
            {"tokenizer_kwargs": {"truncation": True, "max_length": 20}},
        ],
        "parameters",
        masks,
        ragged=True,
        shares=20,
    ),
    Case("token-classification", ragged=True, shares=9),
    Case(
        "token-classification",
        [
            {},
            {"ignore_labels": []},
            {"ignore_labels": ["O", "I-LOC"], "aggregation_strategy": "none"},
            {"aggregation_strategy": "first"},
            {"aggregation_strategy": "average", "stride": 3},
            {"aggregation_strategy": "max", "ignore_labels": ["PER"], "stride": 20},
        ],
        "parameters",
        ragged=True,
        shares=30,
    ),
    Case(
        "token-classification",
        [
            {"is_split_into_words": True},
            {"is_split_into_words": True, "aggregation_strategy": "simple"},
            {"is_split_into_words": True, "aggregation_strategy": "first", "stride": 8, "delimiter": "--"},
        ],
        "words",
        words,
        expected=worded,
        ragged=True,
        shares=9,
    ),
    Case("zero-shot-classification", ragged=True, shares=24),
    Case(
        "zero-shot-classification",
        [
            {"candidate_labels": ["sports", "politics"], "multi_label": True},
            {"candidate_labels": "travel, business and science , sports"},
            {"candidate_labels": ["one"], "hypothesis_template": "It is about {}."},
            {"candidate_labels": ["a", "b", "c"], "hypothesis_template": "{}!", "multi_label": False},
        ],
        "parameters",
        ragged=True,
        shares=30,
    ),
    Case("question-answering", ragged=True, shares=5),
    Case(
        "question-answering",
        [
            {"top_k": 3},
            {"top_k": 2, "handle_impossible_answer": True},
            {"handle_impossible_answer": True},
            {"align_to_words": False, "max_answer_len": 3},
            {"max_seq_len": 40, "doc_stride": 8},
            {"max_seq_len": 64, "max_question_len": 3, "padding": True},
            {"max_answer_len": 1000, "top_k": 4},
        ],
        "parameters",
        ragged=True,
        shares=30,
    ),
    Case(
        "question-answering",
        [{"align_to_words": False}, {"align_to_words": False, "max_answer_len": 2}],
        "by hand",
        short_questions,
        expected=spans_by_hand,
        ragged=True,
        shares=4,
    ),
    Case(
        "question-answering",
        [{}, {"top_k": 3}],
        "words by hand",
        short_questions,
        expected=words_by_hand,
        ragged=True,
        shares=4,
    ),
    Case("table-question-answering", ragged=True, shares=4),
    Case(
        "table-question-answering",
        [{}, {"sequential": True}, {"padding": "max_length"}, {"truncation": "drop_rows_to_fit", "padding": True}],
        "several",
        tables_with_several_questions,
        ragged=True,
        shares=6,
    ),
    Case("summarization", ragged=True, shares=5),
    Case("translation", ragged=True, shares=5),
    Case("translation_xx_to_yy", ragged=True, shares=5),
    Case("text2text-generation", ragged=True, shares=5),
    Case(
        "text2text-generation",
        [
            {"num_beams": 1, "max_new_tokens": 3},
            {"num_beams": 1, "max_length": 20},
            {"num_beams": 1, "max_new_tokens": 30, "stop": ["e"]},
            {"num_beams": 1, "max_new_tokens": 12, "truncation": True, "clean_up_tokenization_spaces": True},
        ],
        "rows",
        expected=generated,
        ragged=True,
        shares=20,
    ),
    Case(
        "text2text-generation",
        [
            {"num_beams": 1, "max_new_tokens": 9, "repetition_penalty": 1.7},
            {"num_beams": 1, "max_new_tokens": 9, "no_repeat_ngram_size": 1},
            {"num_beams": 1, "max_new_tokens": 9, "min_length": 6},
            {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 2, "length_penalty": 2.0},
            {"num_beams": 3, "max_new_tokens": 6, "early_stopping": True, "min_new_tokens": 3},
        ],
        "penalties",
        ragged=True,
        shares=5,
    ),
    Case(
        "text2text-generation",
        [
            {"num_beams": 1, "max_new_tokens": 9, "encoder_repetition_penalty": 4.0},
            {"num_beams": 1, "max_new_tokens": 9, "encoder_no_repeat_ngram_size": 1},
            {"num_beams": 1, "max_new_tokens": 9, "return_tensors": True},
            {"num_beams": 3, "max_new_tokens": 9, "num_return_sequences": 3, "return_tensors": True},
        ],
        "encoder",
        ragged=True,
        shares=5,
    ),
    Case(
        "summarization",
        [{}, {"max_new_tokens": 7}, {"num_beams": 1, "max_length": 9}],
        "by hand",
        short_sources,
        expected=written_by_hand("summary_text", "summarize: ", max_length=40, min_length=4, num_beams=2),
        ragged=True,
        shares=3,
    ),
    Case(
        "translation_xx_to_yy",
        [{"src_lang": "en", "tgt_lang": "de", "max_new_tokens": 8}],
        "by hand",
        expected=written_by_hand("translation_text", "translate English to German: ", num_beams=2),
        ragged=True,
        shares=5,
    ),
    Case(
        "summarization:bart",
        [{"truncation": True, "max_new_tokens": 8}, {"truncation": True, "num_beams": 1, "max_new_tokens": 5}],
        ragged=True,
        shares=5,
    ),
    Case(
        "translation:nllb",
        [
            {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn", "num_beams": 1, "max_new_tokens": 8},
            {"src_lang": "deu_Latn", "tgt_lang": "fra_Latn", "num_beams": 1, "max_new_tokens": 5},
            {"src_lang": "eng_Latn", "tgt_lang": "deu_Latn", "num_beams": 1, "max_new_tokens": 8},
        ],
        expected=translated_by_hand,
        ragged=True,
        shares=10,
    ),
    Case("decision", shares=1),
)
