"""The rows of tasks whose input is text alone."""

from __future__ import annotations

from dataclasses import replace

from pipefleet.tasks.checks import (
    Check,
    boolean,
    choice,
    either,
    integer,
    list_of,
    mapping_of,
    null,
    number,
    some_text,
    template,
    text,
    word,
)
from pipefleet.tasks.generation import GENERATION, SEED, generation_without
from pipefleet.tasks.requirements import (
    fields_filled,
    labels_given,
    one_truncation,
    one_way_of_showing,
    request_in_json,
    text_filled,
    text_not_blank,
    words_or_text,
    writable,
)
from pipefleet.tasks.shared import (
    ACTIVATION,
    CANDIDATE_LABELS,
    LABEL_COUNT,
    SHOWN,
    SWITCHES,
    TOKENIZE,
    TRUNCATION,
    WRITE,
)
from pipefleet.tasks.spec import Media, TaskSpec

_LABEL = text(1000)
_PADDING = either(boolean, choice("longest", "max_length", "do_not_pad"))
_TOKENIZE: dict[str, Check] = {**TOKENIZE, "padding": _PADDING}
"""Texts are padded to their batches whatever it says; only vectors of tokens show it, where they are padded to max_length."""
_REWRITE: dict[str, Check] = {
    **{name: check for name, check in WRITE.items() if name not in ("guidance_scale", "watermarking_config")},
    "truncation": TRUNCATION,
    "clean_up_tokenization_spaces": boolean,
    "return_tensors": boolean,
    "return_text": boolean,
}
_ENCODE: dict[str, Check] = {**TOKENIZE, **SWITCHES}
_TRANSLATE: dict[str, Check] = {**_REWRITE, "src_lang": text(40), "tgt_lang": text(40)}

_TRANSLATION = TaskSpec(
    name="translation",
    media=Media.TEXT,
    parameters=_TRANSLATE,
    nones=frozenset(GENERATION),
    returns="[{translation_text}]",
    requires=(writable,),
    tensors=("translation_token_ids",),
    bare_in_lists=True,
)

ROWS = (
    TaskSpec(
        name="decision",
        media=Media.TEXT,
        fields={"state": Media.DATA, "questions": Media.DATA},
        required=("state", "questions"),
        positional=("state", "questions"),
        parameters={},
        returns="{question: {type, …}}",
        requires=(request_in_json,),
    ),
    TaskSpec(
        name="feature-extraction",
        media=Media.TEXT,
        parameters={
            "truncation": TRUNCATION,
            "padding": _PADDING,  # without effect, as in transformers, which takes it in tokenize_kwargs
            "tokenize_kwargs": mapping_of(_TOKENIZE),
            "return_tensors": boolean,
            "pooling": either(null, choice("mean", "cls", "last")),
            "normalize": boolean,
        },
        merges=frozenset({"tokenize_kwargs"}),
        requires=(one_truncation,),
        returns="[[[number]]] tokens by width, or [number] with pooling",
        tensors=("",),
    ),
    TaskSpec(
        name="fill-mask",
        media=Media.TEXT,
        parameters={
            "top_k": integer(1, 100_000),
            "targets": some_text(either(text(100), list_of(text(100), 1000))),
            "tokenizer_kwargs": mapping_of(_TOKENIZE),
        },
        returns="[{score, token, token_str, sequence}], or a list of those for each of several masks",
        requires=(text_not_blank,),
        answers_one_alone=True,
    ),
    TaskSpec(
        name="question-answering",
        media=None,
        fields={"question": Media.TEXT, "context": Media.TEXT},
        required=("question", "context"),
        positional=("question", "context"),
        parameters={
            "top_k": integer(1, 1000),
            "doc_stride": integer(0, 100_000),
            "max_answer_len": integer(1, 10_000),
            "max_seq_len": integer(1, 100_000),
            "max_question_len": integer(1, 100_000),
            "handle_impossible_answer": boolean,
            "align_to_words": boolean,
            "padding": _PADDING,
        },
        returns="{score, start, end, answer}, or a list of those with top_k",
        requires=(fields_filled("question", "context"),),
        answers_one_alone=True,
    ),
    TaskSpec(
        name="summarization",
        media=Media.TEXT,
        parameters=_REWRITE,
        nones=frozenset(GENERATION),
        returns="[{summary_text}]",
        requires=(writable,),
        tensors=("summary_token_ids",),
        bare_in_lists=True,
    ),
    TaskSpec(
        name="table-question-answering",
        media=None,
        fields={"table": Media.TABLE, "query": Media.TEXTS},
        required=("table", "query"),
        positional=("table", "query"),
        parameters={
            **generation_without("guidance_scale", "watermarking_config", "stop_strings"),
            **SEED,
            "sequential": boolean,
            "padding": _PADDING,
            "truncation": either(boolean, choice("drop_rows_to_fit", "do_not_truncate")),
        },
        nones=frozenset(GENERATION),
        returns="{answer, coordinates, cells, aggregator?}, or a list of those for a list of queries",
        requires=(fields_filled("query"),),
        tuples=("coordinates",),
        answers_one_alone=True,
    ),
    TaskSpec(
        name="text-classification",
        aliases=("sentiment-analysis",),
        media=Media.TEXT,
        fields={"text": Media.TEXT, "text_pair": Media.TEXT},
        positional=("text",),
        required=("text",),
        parameters={"top_k": LABEL_COUNT, "function_to_apply": ACTIVATION, **_TOKENIZE},
        nones=frozenset({"top_k", *_TOKENIZE}),
        returns="[{label, score}]",
        bare_in_lists=True,
        bare_in_streams=True,
        kept_with=("top_k",),
    ),
    TaskSpec(
        name="text-generation",
        media=Media.PROMPT,
        parameters={
            **WRITE,
            **SHOWN,
            "add_special_tokens": boolean,
            "prefix": text(10_000),
            "truncation": TRUNCATION,
            "padding": either(boolean, choice("longest", "do_not_pad")),
            "handle_long_generation": choice("hole"),
            "tokenizer_encode_kwargs": mapping_of(_ENCODE),
        },
        nones=frozenset({*GENERATION, "add_special_tokens", "padding"}) - {"max_length"},
        returns="[{generated_text}], or [{generated_token_ids}]",
        requires=(one_way_of_showing, writable),
    ),
    TaskSpec(
        name="text2text-generation",
        media=Media.TEXT,
        parameters=_REWRITE,
        nones=frozenset(GENERATION),
        returns="[{generated_text}]",
        requires=(writable,),
        tensors=("generated_token_ids",),
        bare_in_lists=True,
    ),
    TaskSpec(
        name="token-classification",
        aliases=("ner",),
        media=Media.TEXTS,
        parameters={
            "aggregation_strategy": word("none", "simple", "first", "average", "max"),
            "ignore_labels": list_of(either(_LABEL, number(-1e9, 1e9))),  # a number is no label, and ignores none
            "stride": integer(0, 100_000),
            "is_split_into_words": boolean,
            "delimiter": text(100),
        },
        returns="[{entity, score, index, word, start, end}], or [{entity_group, score, word, start, end}]",
        requires=(words_or_text,),
    ),
    _TRANSLATION,
    replace(_TRANSLATION, name="translation_xx_to_yy"),
    TaskSpec(
        name="zero-shot-classification",
        media=Media.TEXT,
        positional=("sequences", "candidate_labels"),
        parameters={
            "candidate_labels": CANDIDATE_LABELS,
            "hypothesis_template": template(),
            "multi_label": boolean,
            "truncation": TRUNCATION,  # without effect, as in transformers: the text is cut and the label is not
        },
        nones=frozenset({"multi_label"}),
        returns="{sequence, labels, scores}",
        requires=(text_filled, labels_given),
    ),
)
