"""Tasks whose input or result is sound."""

from __future__ import annotations

from pipefleet.parameters import (
    Check,
    boolean,
    choice,
    either,
    integer,
    list_of,
    mapping_of,
    null,
    number,
    template,
    text,
)
from pipefleet.tasks.shared import CANDIDATE_LABELS, GENERATE, LABEL_COUNT
from pipefleet.tasks.spec import CostUnit, Media, TaskSpec

_WHISPER: dict[str, Check] = {
    **GENERATE,
    "language": text(40),
    "task": choice("transcribe", "translate"),
    "temperature": either(GENERATE["temperature"], list_of(number(0.0, 100.0), 16)),
    "condition_on_prev_tokens": boolean,
    "compression_ratio_threshold": number(0.0, 100.0),
    "logprob_threshold": number(-100.0, 0.0),
    "no_speech_threshold": number(0.0, 1.0),
}
_TEMPERATURE = number(0.0, 100.0)
_SOUND: dict[str, Check] = {
    **{name: GENERATE[name] for name in ("max_new_tokens", "min_new_tokens", "do_sample", "top_k", "top_p")},
    "temperature": _TEMPERATURE,
    "guidance_scale": number(0.0, 100.0),
    "semantic_temperature": _TEMPERATURE,
    "coarse_temperature": _TEMPERATURE,
    "fine_temperature": _TEMPERATURE,
    "threshold": number(0.0, 1.0),
    "minlenratio": number(0.0, 1000.0),
    "maxlenratio": number(0.0, 1000.0),
}
"""Arguments of models that write sound step by step: MusicGen, Bark, SpeechT5."""
_VECTOR = list_of(number(-1e6, 1e6), 4096)
_VOICE: dict[str, Check] = {
    **_SOUND,
    "speaker_id": integer(0, 1_000_000),
    "speaking_rate": number(0.05, 20.0),
    "speaker_embeddings": either(_VECTOR, list_of(_VECTOR, 1)),
}
"""`speaker_embeddings` is one vector, with or without a list around it: JSON has no tensors."""

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
            "seed": integer(-(2**63), 2**63 - 1),
        },
        returns="{text, chunks?}",
        cost_unit=CostUnit.SECONDS,
        tuples=("timestamp",),
    ),
    TaskSpec(
        name="audio-classification",
        media=Media.AUDIO,
        parameters={
            "top_k": LABEL_COUNT,
            "function_to_apply": either(null, choice("sigmoid", "softmax", "none")),
        },
        returns="[{label, score}]",
        cost_unit=CostUnit.SECONDS,
    ),
    TaskSpec(
        name="zero-shot-audio-classification",
        media=Media.AUDIO,
        parameters={"candidate_labels": CANDIDATE_LABELS, "hypothesis_template": template(1000)},
        returns="[{label, score}]",
        cost_unit=CostUnit.SECONDS,
    ),
    TaskSpec(
        name="text-to-audio",
        aliases=("text-to-speech",),
        media=Media.TEXT,
        parameters={
            "forward_params": mapping_of(_VOICE),
            "generate_kwargs": mapping_of(_SOUND),
            "seed": integer(-(2**63), 2**63 - 1),
        },
        returns="{audio, sampling_rate}",
        cost_unit=CostUnit.TOKENS,
    ),
)
