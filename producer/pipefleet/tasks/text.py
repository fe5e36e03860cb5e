"""Tasks whose input is text alone."""

from __future__ import annotations

from pipefleet.parameters import boolean, choice, either, mapping_of, null
from pipefleet.tasks.shared import ACTIVATION, LABEL_COUNT, TOKENIZE, WRITE
from pipefleet.tasks.spec import CostUnit, Media, TaskSpec

ROWS = (
    TaskSpec(
        name="feature-extraction",
        media=Media.TEXT,
        parameters={
            "truncation": boolean,
            "tokenize_kwargs": mapping_of(TOKENIZE),
            "pooling": either(null, choice("mean", "cls", "last")),
            "normalize": boolean,
        },
        returns="[[[number]]] tokens by width, or [number] with pooling",
        cost_unit=CostUnit.TOKENS,
    ),
    TaskSpec(
        name="text-classification",
        aliases=("sentiment-analysis",),
        media=Media.TEXT,
        fields={"text": Media.TEXT, "text_pair": Media.TEXT},
        parameters={"top_k": LABEL_COUNT, "function_to_apply": ACTIVATION, **TOKENIZE},
        returns="[{label, score}]",
        cost_unit=CostUnit.TOKENS,
        bare_in_lists=True,
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
)
