"""Finds the arguments of generate() among the parameters of a request, and checks the tokens that they name.

Pipelines look for these arguments in different places. Wrong tokens raise ItemError (bad_parameter).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipefleet.tasks.generation import GENERATION
from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.items import ItemError

NESTED = "generate_kwargs"
FLOATS = frozenset({
    "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "guidance_scale",
})  # fmt: skip
"""Arguments that must be floats. JSON has one kind of number; transformers refuses a penalty of 2 and takes 2.0."""
_STOPS = ("stop", "stop_strings", "stop_sequence")
_TOKENS = (
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "prompt_ids",
)  # fmt: skip
NO_END = -1


def nested(parameters: Mapping[str, Any], *, but: Sequence[str] = ()) -> dict[str, Any]:
    """The parameters, with arguments of generate() moved into `generate_kwargs`, except the names in `but`.

    A keyword wins over the same argument inside `generate_kwargs`.
    """
    moved = {name: value for name, value in parameters.items() if name in GENERATION and name not in but}
    if not moved:
        return dict(parameters)
    rest = {name: value for name, value in parameters.items() if name not in moved}
    return {**rest, NESTED: {**(rest.get(NESTED) or {}), **moved}}


def apart(parameters: Mapping[str, Any], *, but: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters without the arguments of generate(), and these arguments. For pipelines that accept none of them in a call."""
    generation = {name: value for name, value in parameters.items() if name in GENERATION and name not in but}
    return {name: value for name, value in parameters.items() if name not in generation}, generation


def without_stops(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The parameters without their stop strings, and the stop strings.

    `stop_sequence` wins over `stop_strings`, as in transformers.
    """
    rest, found = dict(parameters), {name: parameters.get(name) for name in _STOPS}
    if isinstance(rest.get(NESTED), Mapping) and _STOPS[1] in rest[NESTED]:
        inner = dict(rest[NESTED])
        found[_STOPS[1]] = found[_STOPS[1]] or inner.pop(_STOPS[1])
        rest[NESTED] = {name: value for name, value in inner.items() if name != _STOPS[1]}
    for name in _STOPS:
        rest.pop(name, None)
        given = found[name]
        if given is not None:
            found["chosen"] = [given] if isinstance(given, str) else given
    return rest, tuple(found.get("chosen") or ())


def generation_of(arguments: Mapping[str, Any], vocabulary: int | None) -> dict[str, Any]:
    """Arguments in the form that generate() takes. Raises ItemError (bad_parameter) for tokens beyond the vocabulary.

    On a GPU an index beyond the table of embeddings breaks the device for every later input.
    """
    for name in _TOKENS:
        require_tokens(name, arguments.get(name), vocabulary)
    for sequence, _ in arguments.get("sequence_bias") or ():
        require_tokens("sequence_bias", sequence, vocabulary)
    # `use_cache` changes only the time, so it must not split batches.
    found = {name: value for name, value in arguments.items() if name != "use_cache"}
    for name in FLOATS & found.keys():
        if isinstance(found[name], int):
            found[name] = float(found[name])
    decay = found.get("exponential_decay_length_penalty")
    if decay is not None:
        found["exponential_decay_length_penalty"] = (decay[0], float(decay[1]))
    if found.get("sequence_bias") is not None:
        found["sequence_bias"] = [[tokens, float(bias)] for tokens, bias in found["sequence_bias"]]
    return found


def require_tokens(name: str, given: Any, vocabulary: int | None) -> None:
    """Raise ItemError (bad_parameter) for a token that the model does not have."""
    lowest = NO_END if name == "eos_token_id" else 0
    for token in _each(given):
        if token < lowest or (vocabulary is not None and token >= vocabulary):
            text = f"{name} holds the token {token}; the model's tokens are 0 to {(vocabulary or 1) - 1}"
            raise ItemError("bad_parameter", text, STAGE)


def vocabulary_of(model: Any) -> int | None:
    """How many tokens the model's decoder knows; None if its config does not say."""
    found: int | None = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return found


def _each(given: Any) -> Iterator[int]:
    if isinstance(given, list | tuple):
        for one in given:
            yield from _each(one)
    elif given is not None:
        yield given
