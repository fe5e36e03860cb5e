"""Checks of the arguments of `generate()`: all of transformers' GenerationConfig that run no code and take bounded memory.

Rows of tasks whose models write take these beside their pipeline's own parameters. None means the same as in transformers.
"""

from __future__ import annotations

from pipefleet.tasks.checks import (
    Check,
    boolean,
    choice,
    either,
    integer,
    list_of,
    mapping_of,
    number,
    optional,
    pair_of,
    text,
)

_TOKEN = integer(0, 10_000_000)
"""A worker refuses tokens beyond its vocabulary."""
_TOKENS = list_of(_TOKEN, 10_000)
_END = integer(-1, 10_000_000)
"""-1 is no token, so that nothing ends a text but its length."""
_STOP = text(200, least=1)
"""An empty text stands behind every token: nothing could be written."""
_STRINGS = either(_STOP, list_of(_STOP, 16))
_SEQUENCE = list_of(_TOKEN, 100)
_WATERMARK = mapping_of(
    {
        "greenlist_ratio": number(0.0, 1.0),
        "bias": number(-1000.0, 1000.0),
        "hashing_key": integer(0, 2**63 - 1),
        "seeding_scheme": choice("lefthash", "selfhash"),
        "context_width": integer(1, 64),
    }
)

_ALL: dict[str, Check] = {
    "max_new_tokens": integer(1, 32_768),
    "min_new_tokens": integer(0, 32_768),
    "max_length": integer(1, 1_000_000),
    "min_length": integer(0, 32_768),
    "do_sample": boolean,
    "temperature": number(0.0, 100.0),
    "top_k": integer(0, 1_000_000),
    "top_p": number(0.0, 1.0),
    "min_p": number(0.0, 1.0),
    "top_h": number(0.0001, 1.0),
    "typical_p": number(0.0001, 1.0),
    "epsilon_cutoff": number(0.0, 0.9999),
    "eta_cutoff": number(0.0, 0.9999),
    "num_beams": integer(1, 32),
    "num_return_sequences": integer(1, 64),
    "early_stopping": either(boolean, choice("never")),
    "length_penalty": number(-10.0, 10.0),
    "repetition_penalty": number(0.01, 100.0),
    "encoder_repetition_penalty": number(0.01, 100.0),
    "no_repeat_ngram_size": integer(0, 1000),
    "encoder_no_repeat_ngram_size": integer(0, 1000),
    "exponential_decay_length_penalty": pair_of(integer(0, 32_768), number(-100.0, 100.0)),
    "bad_words_ids": list_of(_SEQUENCE, 1000, least=1),
    "sequence_bias": list_of(pair_of(_SEQUENCE, number(-1e6, 1e6)), 1000, least=1),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "forced_bos_token_id": _TOKEN,
    "forced_eos_token_id": either(_TOKEN, list_of(_TOKEN, 100)),
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "eos_token_id": either(_END, list_of(_END, 100)),
    "decoder_start_token_id": _TOKEN,
    "renormalize_logits": boolean,
    "remove_invalid_values": boolean,
    "guidance_scale": number(0.0, 100.0),
    "watermarking_config": _WATERMARK,
    "use_cache": boolean,
    "stop_strings": _STRINGS,
}
GENERATION: dict[str, Check] = {name: optional(check) for name, check in _ALL.items()}
"""Every argument of `generate()` that some task takes."""
STOP: dict[str, Check] = {"stop": list_of(_STOP, 16), "stop_sequence": optional(_STRINGS)}
SEED: dict[str, Check] = {"seed": integer(-(2**63), 2**63 - 1)}
"""The seed of random draws. A parameter of pipefleet's own: transformers takes torch's global state."""


def generation_without(*names: str) -> dict[str, Check]:
    """GENERATION without some of its names."""
    return {name: check for name, check in GENERATION.items() if name not in names}


WHISPER: dict[str, Check] = {
    **generation_without(
        "num_return_sequences", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "decoder_start_token_id",
        "guidance_scale", "watermarking_config", "stop_strings",
    ),
    "temperature": optional(either(number(0.0, 100.0), list_of(number(0.0, 100.0), 10))),
    "language": optional(text(40)),
    "task": optional(choice("transcribe", "translate")),
    "is_multilingual": optional(boolean),
    "prompt_ids": optional(list_of(_TOKEN, 1000, least=1)),
    "prompt_condition_type": optional(choice("first-segment", "all-segments")),
    "condition_on_prev_tokens": optional(boolean),
    "compression_ratio_threshold": optional(number(0.0, 100.0)),
    "logprob_threshold": optional(number(-100.0, 0.0)),
    "no_speech_threshold": optional(number(0.0, 1.0)),
}  # fmt: skip
"""Arguments of speech models; the last ones are Whisper's own."""
