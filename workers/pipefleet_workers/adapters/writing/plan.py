"""Turns the parameters of a request into a `Plan`: the part that all requests of a generate() call share, and its own part.

Defaults come from three places: the call, the model's generation config, the pipeline. transformers merges the three;
this module only reads the result. `TextGenerator` asks for a plan for each request. Arguments that generate() refuses raise
ItemError (bad_parameter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import generation

from pipefleet.contract.messages import encode_json
from pipefleet_workers.adapters.arguments import REMEMBERED, STAGE, generate_arguments
from pipefleet_workers.adapters.writing.parameters import NO_END, generation_of, vocabulary_of
from pipefleet_workers.adapters.writing.rows import Sampling
from pipefleet_workers.items import ItemError

_Mode = generation.GenerationMode
_OWN_BOUNDS = {"max_new_tokens", "max_length"}
_LAST_WARPERS = {
    "min_p": generation.MinPLogitsWarper,
    "typical_p": generation.TypicalLogitsWarper,
    "epsilon_cutoff": generation.EpsilonLogitsWarper,
    "eta_cutoff": generation.EtaLogitsWarper,
}
_OWN_CHOICE = {"do_sample", "temperature", "top_k", "top_p", "num_return_sequences", "top_h", *_LAST_WARPERS}
_AFTER_PENALTY = ("sequence_bias", "bad_words_ids", "exponential_decay_length_penalty")
_PROMPT_READERS = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "watermarking_config",
)  # fmt: skip
_OFF = {"min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one set of parameters."""

    shared: Mapping[str, Any]
    """Arguments of generate() that must be equal within a batch; plans with equal arguments have an equal `key`."""
    key: str
    max_new_tokens: int | None
    max_length: int | None
    """Bound of prompt and answer together, in tokens; used if `max_new_tokens` is None."""
    default_length: int | None
    """Number of new tokens if the request sets neither bound: transformers' default length does not count the prompt."""
    min_length: int
    sequences: int
    beams: int
    sampling: Sampling | None
    """None if generate() itself chooses the tokens: greedy search and beams."""
    equal_bounds: bool
    """Whether the number of new tokens must be equal in a batch too."""
    equal_lengths: bool
    """Whether hidden padding would still change the result."""
    alone: bool
    """Whether the request must have its own call, with torch's own random numbers seeded."""
    ends: frozenset[int]
    """Tokens that end a sequence."""
    fills: frozenset[int]
    """Tokens that stand behind an end."""
    fill: int
    """The token with which generate() makes the sequences of one input equally long."""
    penalty: float = 1.0
    """The repetition penalty that `RowPenalty` applies, since transformers' own counts padding as tokens; 1.0 for none."""
    reads_encoder: bool = False
    """Whether arguments look at the tokens of the encoder, or of a decoder's prompt: padding there would change the result."""
    first: tuple[Any, ...] = ()
    """Warpers of sampled scores, applied after the temperature."""
    last: tuple[Any, ...] = ()
    """Warpers of sampled scores, applied after top_p."""

    @property
    def copies(self) -> int:
        """Rows of a request in the call. Each sampled sequence is a row; beams are not, since generate() makes them."""
        return self.sequences if self.sampling is not None else 1

    @property
    def rows(self) -> int:
        """Rows of a request on the device."""
        return max(self.copies, self.beams)

    def new_tokens(self, prompt: int) -> int:
        """How many tokens may follow a prompt of `prompt` tokens. Raises ItemError (too_long) if `max_length` leaves none."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.default_length is not None:
            return self.default_length
        assert self.max_length is not None, "the pipeline sets one of the two"
        if self.max_length <= prompt:
            text = f"the prompt has {prompt} tokens and max_length is {self.max_length}; pass max_new_tokens instead"
            raise ItemError("too_long", text, STAGE)
        return self.max_length - prompt


class GenerationPlanner:
    """Makes plans for one pipeline, once for each set of forward arguments. Thread-safe."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._known: dict[str, Plan] = {}
        self._vocabulary = vocabulary_of(pipe.model)

    def plan(self, key: str, forward: Mapping[str, Any]) -> Plan:
        """The plan for the forward arguments of this `key`. Raises ItemError (bad_parameter)."""
        plan = self._known.get(key)
        if plan is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            plan = self._known[key] = self._plan(dict(forward))
        return plan

    def _config(self, arguments: Mapping[str, Any]) -> Any:
        return self._pipe.model._prepare_generation_config(None, **arguments)[0]

    def _plan(self, forward: dict[str, Any]) -> Plan:
        prefix = forward.pop("prefix_length", 0)
        arguments, config = self.merged(forward)
        mode, marked = config.get_generation_mode(), config.watermarking_config is not None
        # A watermark changes the scores, and `RowSampler` would leave only one score of each row.
        sampled = mode == _Mode.SAMPLE and not marked
        beams, sequences = config.num_beams or 1, config.num_return_sequences or 1
        if mode != _Mode.SAMPLE and sequences > beams:
            text = f"num_return_sequences is {sequences}, but without sampling it is at most num_beams, {beams}"
            raise ItemError("bad_parameter", text, STAGE)
        _require_temperature(config)
        shared, defaults = _shared(arguments, sampled=sampled), self._has_default_length(arguments)
        penalty = _penalty(config)
        if penalty != 1.0:
            shared["repetition_penalty"] = 1.0
        first, last = _warpers(config) if sampled else ((), ())
        own = [penalty, _warped(config) if sampled else None]
        return Plan(
            shared=shared,
            key=encode_json([sorted((name, repr(value)) for name, value in shared.items()), sampled, sequences, own]),
            max_new_tokens=config.max_new_tokens,
            max_length=None if config.max_length is None else config.max_length + prefix,
            default_length=config.max_length if defaults else None,
            min_length=0 if config.min_new_tokens is not None else config.min_length or 0,
            sequences=sequences,
            beams=beams,
            sampling=_sampling(config) if sampled else None,
            equal_bounds=beams > 1 or config.forced_eos_token_id is not None,
            equal_lengths=_hears_padding(config, penalty),
            alone=mode not in (_Mode.SAMPLE, _Mode.GREEDY_SEARCH, _Mode.BEAM_SEARCH) or _is_unusual(config),
            ends=frozenset(_ids(config.eos_token_id)),
            fills=frozenset({*_ids(config.pad_token_id), -1}),
            fill=_fill(config, beams),
            penalty=penalty,
            reads_encoder=_reads_encoder(config),
            first=first,
            last=last,
        )

    def _has_default_length(self, arguments: Mapping[str, Any]) -> bool:
        """Whether neither the call nor the model sets a length, as generate() checks it."""
        return arguments.get("max_length") is None and self._pipe.model.generation_config.max_length is None

    def merged(self, forward: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """The arguments that the pipeline passes to generate(), and the config that generate() makes of them.

        Raises ItemError (bad_parameter) for arguments that generate() refuses.
        """
        given = generation_of(forward, self._vocabulary)
        try:
            arguments = generate_arguments(self._pipe, given)
            config = self._config(arguments)
        except (TypeError, ValueError) as error:
            raise ItemError("bad_parameter", f"generate() refuses the parameters: {error}", STAGE) from None
        if NO_END in _ids(config.eos_token_id) and (config.pad_token_id is None or config.pad_token_id < 0):
            arguments = {**arguments, "pad_token_id": 0}  # fills ended rows; the model needs an embedding for it
        return arguments, config


def _shared(arguments: Mapping[str, Any], *, sampled: bool) -> dict[str, Any]:
    """Arguments without each row's own arguments; a call whose rows sample runs as greedy search."""
    own = _OWN_BOUNDS | _OWN_CHOICE if sampled else _OWN_BOUNDS
    shared = {name: value for name, value in arguments.items() if name not in own}
    return {**shared, "do_sample": False, "num_return_sequences": 1} if sampled else shared


def _sampling(config: Any) -> Sampling:
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    return Sampling(temperature, config.top_k or 0, 1.0 if config.top_p is None else float(config.top_p))


def _require_temperature(config: Any) -> None:
    """Raise ItemError (bad_parameter) for a temperature of 0 when tokens are drawn; otherwise the temperature is not used."""
    if config.do_sample and config.temperature == 0:
        text = "temperature must be above 0; pass do_sample=false for the most probable tokens"
        raise ItemError("bad_parameter", text, STAGE)


def _penalty(config: Any) -> float:
    """The repetition penalty, if `RowPenalty` gives the result that transformers' penalty gives without padding.

    `RowPenalty` runs after the processors of `_AFTER_PENALTY`; transformers runs them after its penalty. With one of them,
    transformers' own penalty stays.
    """
    asked = config.repetition_penalty
    later = any(getattr(config, name, None) for name in _AFTER_PENALTY) or _is_unusual(config)
    return 1.0 if asked is None or later else float(asked)


def _hears_padding(config: Any, penalty: float) -> bool:
    """Whether arguments look at the tokens of the prompt, padding among them."""
    penalised = penalty == 1.0 and config.repetition_penalty not in (None, 1.0)
    named = any(getattr(config, name, None) for name in _PROMPT_READERS)
    return bool(named or penalised or config.forced_bos_token_id is not None)


def _reads_encoder(config: Any) -> bool:
    penalised = config.encoder_repetition_penalty not in (None, 1.0)
    return bool(penalised or config.encoder_no_repeat_ngram_size)


def _warpers(config: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The warpers after the temperature and the warpers after top_p, of the call or of the model's generation config."""
    top_h = getattr(config, "top_h", None)
    first = () if top_h is None else (generation.TopHLogitsWarper(top_h=top_h),)
    last = tuple(
        warper(getattr(config, name))
        for name, warper in _LAST_WARPERS.items()
        if getattr(config, name, None) not in (None, _OFF[name])
    )
    return first, last


def _warped(config: Any) -> list[Any]:
    """The values that two plans must share in order to share their warpers."""
    return [getattr(config, name, None) for name in ("top_h", *_LAST_WARPERS)]


def _is_unusual(config: Any) -> bool:
    """Whether the config asks for something that may change the neighbours of a row."""
    guided = getattr(config, "guidance_scale", None) not in (None, 1, 1.0)
    return guided or getattr(config, "watermarking_config", None) is not None


def _fill(config: Any, beams: int) -> int:
    """The padding, or the first token that ends a sequence; for beams also where the padding is token 0."""
    padding, ends = _ids(config.pad_token_id), [one for one in _ids(config.eos_token_id) if one >= 0]
    known = [one for one in padding if one or beams == 1] + ends + padding
    return known[0] if known else 0


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
