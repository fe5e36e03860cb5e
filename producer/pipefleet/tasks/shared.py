"""Checks of parameters that several tasks take."""

from __future__ import annotations

from pipefleet.parameters import Check, boolean, choice, either, integer, list_of, null, number, some_text, text

LABEL_COUNT = either(null, integer(1, 100_000))
ACTIVATION = either(null, choice("default", "sigmoid", "softmax", "none"))
TOKENIZE: dict[str, Check] = {"truncation": boolean, "max_length": integer(1, 1_000_000)}
_LABEL_LIST = list_of(text(1000), 1000, least=1)
CANDIDATE_LABELS = either(_LABEL_LIST, some_text(text(100_000), commas=True))
"""Labels of zero-shot tasks: a list, or one text with commas."""
ANY_LABELS = either(_LABEL_LIST, text(100_000))
"""As those, where a text is cut at its commas and nothing else: an empty label is one too."""
GENERATE: dict[str, Check] = {
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
"""Arguments of `generate()` that neither run code nor render templates."""
WRITE: dict[str, Check] = {
    **GENERATE,
    "max_length": integer(1, 1_000_000),
    "num_return_sequences": integer(1, 64),
    "early_stopping": either(boolean, choice("never")),
    "stop": list_of(text(200), 16),
    "seed": integer(-(2**63), 2**63 - 1),
}
"""GENERATE, with what the worker's own generation adds or takes per row."""
