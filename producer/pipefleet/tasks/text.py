"""Tasks whose input is text alone."""

from __future__ import annotations

from dataclasses import replace

from pipefleet.parameters import (
    Check,
    boolean,
    choice,
    either,
    integer,
    list_of,
    mapping_of,
    null,
    some_text,
    template,
    text,
)
from pipefleet.tasks.requirements import (
    fields_filled,
    labels_given,
    request_in_json,
    text_filled,
    text_not_blank,
    words_or_text,
)
from pipefleet.tasks.shared import ACTIVATION, CANDIDATE_LABELS, LABEL_COUNT, TOKENIZE, WRITE
from pipefleet.tasks.spec import CostUnit, Media, TaskSpec

_LABEL = text(1000)
_TOKENIZE: dict[str, Check] = {**TOKENIZE, "padding": either(boolean, choice("longest", "do_not_pad"))}
"""Padding is accepted because people pass it; texts are padded to their batches whatever it says."""
_REWRITE: dict[str, Check] = {
    **WRITE,
    "min_length": integer(0, 32_768),
    "truncation": boolean,
    "clean_up_tokenization_spaces": boolean,
}
_TRANSLATE: dict[str, Check] = {**_REWRITE, "src_lang": text(40), "tgt_lang": text(40)}

_TRANSLATION = TaskSpec(
    name="translation",
    media=Media.TEXT,
    parameters=_TRANSLATE,
    returns="[{translation_text}]",
    cost_unit=CostUnit.TOKENS,
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
        cost_unit=CostUnit.TOKENS,
        requires=(request_in_json,),
    ),
    TaskSpec(
        name="feature-extraction",
        media=Media.TEXT,
        parameters={
            "truncation": boolean,
            "tokenize_kwargs": mapping_of(_TOKENIZE),
            "pooling": either(null, choice("mean", "cls", "last")),
            "normalize": boolean,
        },
        returns="[[[number]]] tokens by width, or [number] with pooling",
        cost_unit=CostUnit.TOKENS,
    ),
    TaskSpec(
        name="fill-mask",
        media=Media.TEXT,
        parameters={
            "top_k": integer(1, 100_000),
            "targets": some_text(either(text(100), list_of(text(100), 1000))),
            "tokenizer_kwargs": mapping_of({**_TOKENIZE, "add_special_tokens": boolean}),
        },
        returns="[{score, token, token_str, sequence}], or a list of those for each of several masks",
        cost_unit=CostUnit.TOKENS,
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
            "padding": either(boolean, choice("longest", "max_length", "do_not_pad")),
        },
        returns="{score, start, end, answer}, or a list of those with top_k",
        cost_unit=CostUnit.TOKENS,
        requires=(fields_filled("question", "context"),),
        answers_one_alone=True,
    ),
    TaskSpec(
        name="summarization",
        media=Media.TEXT,
        parameters=_REWRITE,
        returns="[{summary_text}]",
        cost_unit=CostUnit.TOKENS,
        bare_in_lists=True,
    ),
    TaskSpec(
        name="table-question-answering",
        media=None,
        fields={"table": Media.TABLE, "query": Media.TEXTS},
        required=("table", "query"),
        positional=("table", "query"),
        parameters={
            "sequential": boolean,
            "padding": either(boolean, choice("longest", "max_length", "do_not_pad")),
            "truncation": either(boolean, choice("drop_rows_to_fit", "do_not_truncate")),
        },
        returns="{answer, coordinates, cells, aggregator?}, or a list of those for a list of queries",
        cost_unit=CostUnit.TOKENS,
        requires=(fields_filled("query"),),
        tuples=("coordinates",),
        answers_one_alone=True,
    ),
    TaskSpec(
        name="text-classification",
        aliases=("sentiment-analysis",),
        media=Media.TEXT,
        fields={"text": Media.TEXT, "text_pair": Media.TEXT},
        required=("text",),
        parameters={"top_k": LABEL_COUNT, "function_to_apply": ACTIVATION, **_TOKENIZE},
        returns="[{label, score}]",
        cost_unit=CostUnit.TOKENS,
        bare_in_lists=True,
        kept_with=("top_k",),
    ),
    TaskSpec(
        name="text-generation",
        media=Media.PROMPT,
        parameters={
            **WRITE,
            "return_full_text": boolean,
            "continue_final_message": boolean,
            "add_special_tokens": boolean,
        },
        returns="[{generated_text}]",
        cost_unit=CostUnit.TOKENS,
    ),
    TaskSpec(
        name="text2text-generation",
        media=Media.TEXT,
        parameters=_REWRITE,
        returns="[{generated_text}]",
        cost_unit=CostUnit.TOKENS,
        bare_in_lists=True,
    ),
    TaskSpec(
        name="token-classification",
        aliases=("ner",),
        media=Media.TEXTS,
        parameters={
            "aggregation_strategy": choice("none", "simple", "first", "average", "max"),
            "ignore_labels": list_of(_LABEL),
            "stride": integer(0, 100_000),
            "is_split_into_words": boolean,
            "delimiter": text(100),
        },
        returns="[{entity, score, index, word, start, end}], or [{entity_group, score, word, start, end}]",
        cost_unit=CostUnit.TOKENS,
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
        },
        returns="{sequence, labels, scores}",
        cost_unit=CostUnit.TOKENS,
        requires=(text_filled, labels_given),
    ),
)
