"""The rows of tasks whose input or result is sound."""

from __future__ import annotations

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
    optional,
    template,
)
from pipefleet.tasks.generation import SEED, WHISPER, generation_without
from pipefleet.tasks.requirements import labels_given, pieces_longer_than_strides
from pipefleet.tasks.shared import CANDIDATE_LABELS, LABEL_COUNT, STRICT_MEDIA
from pipefleet.tasks.spec import Media, TaskSpec

_TEMPERATURE = number(0.0, 100.0)
_WRITE = {
    **generation_without(
        "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "decoder_start_token_id", "watermarking_config",
        "stop_strings",
    ),
    "num_return_sequences": optional(integer(1, 16)),
}  # fmt: skip
_SOUND: dict[str, Check] = {
    **_WRITE,
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
            "ignore_warning": boolean,
            **WHISPER,
            **SEED,
            # The model heeds timestamps that are asked for here; the result shows none.
            "generate_kwargs": mapping_of({**WHISPER, "return_timestamps": either(boolean, choice("word"))}),
            **STRICT_MEDIA,
        },
        returns="{text, chunks?}",
        carried={"audio": Media.AUDIO, "stride": Media.DATA, "sampling_rate": Media.DATA, "extra": Media.DATA},
        nones=frozenset(WHISPER),
        merges=frozenset({"generate_kwargs"}),
        requires=(pieces_longer_than_strides,),
        tuples=("timestamp",),
    ),
    TaskSpec(
        name="audio-classification",
        media=Media.AUDIO,
        parameters={
            "top_k": LABEL_COUNT,
            "function_to_apply": either(null, choice("sigmoid", "softmax", "none")),
            **STRICT_MEDIA,
        },
        nones=frozenset({"top_k"}),
        returns="[{label, score}]",
    ),
    TaskSpec(
        name="zero-shot-audio-classification",
        media=Media.AUDIO,
        parameters={"candidate_labels": CANDIDATE_LABELS, "hypothesis_template": template(1000), **STRICT_MEDIA},
        returns="[{label, score}]",
        requires=(labels_given,),
    ),
    TaskSpec(
        name="text-to-audio",
        aliases=("text-to-speech",),
        media=Media.TEXT,
        parameters={
            "forward_params": mapping_of(_VOICE),
            "generate_kwargs": mapping_of(_SOUND),
            **_WRITE,
            **SEED,
        },
        nones=frozenset(_WRITE),
        returns="{audio, sampling_rate}",
    ),
)
