"""Checks of parameters that several rows share."""

from __future__ import annotations

from pipefleet.tasks.checks import Check, boolean, choice, either, integer, list_of, null, number, some_text, text, word
from pipefleet.tasks.generation import GENERATION, SEED, STOP

STRICT_MEDIA: dict[str, Check] = {"strict_media": boolean}
"""A parameter of pipefleet's own, for tasks that take recordings or films: it refuses media that are damaged or lack their end."""
THRESHOLD = number(-1e9, 1e9)
"""A bound of scores. As in transformers one below 0 keeps everything, and one above 1 nothing."""
LABEL_COUNT = either(null, integer(1, 100_000))
ACTIVATION = either(null, word("default", "sigmoid", "softmax", "none"))
TRUNCATION = either(boolean, choice("longest_first", "only_first", "only_second", "do_not_truncate"))
TOKENIZE: dict[str, Check] = {
    "truncation": TRUNCATION,
    "max_length": integer(1, 1_000_000),
    "add_special_tokens": boolean,
}
_LABEL_LIST = list_of(text(1000), 1000, least=1)
_LABELS_OR_NUMBERS = list_of(either(text(1000), boolean, number(-1e300, 1e300)), 1000, least=1)
CANDIDATE_LABELS = either(_LABELS_OR_NUMBERS, some_text(text(100_000), commas=True))
"""Labels of zero-shot tasks that a template makes texts of: a list, whose numbers come back as numbers, or one text with commas."""
ANY_LABELS = either(_LABEL_LIST, text(100_000))
"""As CANDIDATE_LABELS, but a text is only cut at its commas, so an empty label counts too."""
SWITCHES: dict[str, Check] = {
    "enable_thinking": boolean,
    "thinking": boolean,
    "reasoning_effort": choice("minimal", "low", "medium", "high", "none"),
}
"""Switches of chat templates."""
PADDING = either(boolean, choice("longest", "do_not_pad"))
"""Padding of one input. It changes nothing: workers pad inputs to their batches for any value."""
_SAID = frozenset({"name", "reasoning_content", "thinking", "refusal", "tool_call_id"})
_UNSAID = _SAID | {"tool_calls", "function_call", "audio", "annotations"}


def may_stand_in_a_message(name: object, value: object) -> bool:
    """Whether a message of a chat may hold this field beside role and content: a known text, or a None that clients add."""
    return name in (_UNSAID if value is None else _SAID) and isinstance(value, str | None)


WRITE: dict[str, Check] = {**GENERATION, **STOP, **SEED}
"""Arguments of `generate()`, and the stop strings and seed that workers apply to each row."""
SHOWN: dict[str, Check] = {
    "return_full_text": boolean,
    "return_tensors": boolean,
    "return_text": boolean,
    "return_type": integer(0, 2),
    "clean_up_tokenization_spaces": boolean,
    "skip_special_tokens": boolean,
    "continue_final_message": boolean,
}
"""The form of a written text. `return_type` is a ReturnType of transformers."""
