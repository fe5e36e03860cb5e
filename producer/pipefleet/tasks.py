"""The producer's half of the task table: what each task takes, allows and returns. `TASKS` is the whole of it.

A task is one row here and one row in `pipefleet_workers.runtime.RUNTIME`; a test holds the two key sets equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from pipefleet.errors import UnknownTaskError, nearest
from pipefleet.parameters import (
    Check,
    boolean,
    check_parameters,
    choice,
    either,
    integer,
    list_of,
    mapping_of,
    null,
    number,
    text,
)


class Media(StrEnum):
    """What one input is made of, and so how bytes become a value."""

    TEXT = "text"
    PROMPT = "text or chat"
    IMAGE = "image"
    AUDIO = "audio"


class CostUnit(StrEnum):
    """What the work of one item grows with."""

    TOKENS = "tokens"
    SECONDS = "seconds"
    IMAGES = "images"


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One row: `media` of the main input, `fields` a dict input may have, allowed `parameters`, what comes back."""

    name: str
    media: Media
    parameters: Mapping[str, Check]
    returns: str
    cost_unit: CostUnit
    aliases: tuple[str, ...] = ()
    fields: Mapping[str, Media] = field(default_factory=dict)
    """Fields of an input that is a dict, e.g. a text and its pair; empty when the task takes no dicts."""

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raise ParameterError unless every parameter is allowed for this task and within its bounds."""
        check_parameters(self.name, self.parameters, parameters)


_LABELS = either(null, integer(1, 100_000))
_ACTIVATION = either(null, choice("default", "sigmoid", "softmax", "none"))
_TOKENIZE: dict[str, Check] = {"truncation": boolean, "max_length": integer(1, 1_000_000)}
_GENERATE: dict[str, Check] = {
    "max_new_tokens": integer(1, 32_768),
    "min_new_tokens": integer(0, 32_768),
    "do_sample": boolean,
    "temperature": number(0.0, 100.0),
    "top_k": integer(0, 1_000_000),
    "top_p": number(0.0, 1.0),
    "num_beams": integer(1, 32),
    "length_penalty": number(-10.0, 10.0),
    "repetition_penalty": number(0.01, 100.0),
    "no_repeat_ngram_size": integer(0, 1000),
}
_WRITE: dict[str, Check] = {
    **_GENERATE,
    "max_length": integer(1, 1_000_000),
    "num_return_sequences": integer(1, 64),
    "early_stopping": either(boolean, choice("never")),
    "stop": list_of(text(200), 16),
    "seed": integer(-(2**63), 2**63 - 1),
}
_WHISPER: dict[str, Check] = {
    **_GENERATE,
    "language": text(40),
    "task": choice("transcribe", "translate"),
    "condition_on_prev_tokens": boolean,
    "compression_ratio_threshold": number(0.0, 100.0),
    "logprob_threshold": number(-100.0, 0.0),
    "no_speech_threshold": number(0.0, 1.0),
}

_ROWS = (
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
        name="text-classification",
        aliases=("sentiment-analysis",),
        media=Media.TEXT,
        fields={"text": Media.TEXT, "text_pair": Media.TEXT},
        parameters={"top_k": _LABELS, "function_to_apply": _ACTIVATION, **_TOKENIZE},
        returns="[{label, score}]",
        cost_unit=CostUnit.TOKENS,
    ),
    TaskSpec(
        name="text-generation",
        media=Media.PROMPT,
        parameters={
            **_WRITE,
            "return_full_text": boolean,
            "continue_final_message": boolean,
            "add_special_tokens": boolean,
        },
        returns="[{generated_text}]",
        cost_unit=CostUnit.TOKENS,
    ),
    TaskSpec(
        name="automatic-speech-recognition",
        media=Media.AUDIO,
        parameters={
            "return_timestamps": either(null, boolean, choice("word", "char")),
            "return_language": boolean,
            "chunk_length_s": number(0.0, 3600.0),
            "stride_length_s": either(null, number(0.0, 1800.0), list_of(number(0.0, 1800.0), 2)),
            "max_new_tokens": _GENERATE["max_new_tokens"],
            "generate_kwargs": mapping_of(_WHISPER),
        },
        returns="{text, chunks?}",
        cost_unit=CostUnit.SECONDS,
    ),
    TaskSpec(
        name="image-classification",
        media=Media.IMAGE,
        parameters={"top_k": _LABELS, "function_to_apply": _ACTIVATION},
        returns="[{label, score}]",
        cost_unit=CostUnit.IMAGES,
    ),
)

TASKS: Mapping[str, TaskSpec] = MappingProxyType({row.name: row for row in _ROWS})
"""Every task by its canonical name."""

ALIASES: Mapping[str, str] = MappingProxyType({alias: row.name for row in _ROWS for alias in row.aliases})
"""Other names that people know, and the canonical name of each."""


def task_spec(name: str) -> TaskSpec:
    """The row of a task given by name or alias. Raises UnknownTaskError with the nearest name there is."""
    canonical = ALIASES.get(name, name)
    if canonical not in TASKS:
        known = [*TASKS, *ALIASES]
        raise UnknownTaskError(
            f"there is no task {name[:60]!r}{nearest(name, known)}; `pipefleet tasks` lists all {len(TASKS)}"
        )
    return TASKS[canonical]
