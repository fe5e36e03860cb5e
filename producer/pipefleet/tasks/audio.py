"""Tasks whose input or result is sound."""

from __future__ import annotations

from pipefleet.parameters import Check, boolean, choice, either, list_of, mapping_of, null, number, text
from pipefleet.tasks.shared import GENERATE
from pipefleet.tasks.spec import CostUnit, Media, TaskSpec

_WHISPER: dict[str, Check] = {
    **GENERATE,
    "language": text(40),
    "task": choice("transcribe", "translate"),
    "condition_on_prev_tokens": boolean,
    "compression_ratio_threshold": number(0.0, 100.0),
    "logprob_threshold": number(-100.0, 0.0),
    "no_speech_threshold": number(0.0, 1.0),
}

ROWS = (
    TaskSpec(
        name="automatic-speech-recognition",
        media=Media.AUDIO,
        parameters={
            "return_timestamps": either(null, boolean, choice("word", "char")),
            "return_language": boolean,
            "chunk_length_s": number(0.0, 3600.0),
            "stride_length_s": either(null, number(0.0, 1800.0), list_of(number(0.0, 1800.0), 2)),
            "max_new_tokens": GENERATE["max_new_tokens"],
            "generate_kwargs": mapping_of(_WHISPER),
        },
        returns="{text, chunks?}",
        cost_unit=CostUnit.SECONDS,
        tuples=("timestamp",),
    ),
)
