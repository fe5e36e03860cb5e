"""The adapter of decoders that write text: prompts and chats of different requests in one generate() call.

Prompts are padded on the left, where the attention mask and the positions hide it; the warm-up proves that for each model.
What may differ between requests moves into rows (`rows.py`), the rest is the key (`plan.py`).
"""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.utils.chat_template_utils import Chat

from pipefleet.contract.records import JobFailure
from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.continuous import JOINS
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.long_texts import LONG, LongTexts
from pipefleet_workers.adapters.writing.parameters import without_stops
from pipefleet_workers.adapters.writing.plan import GenerationPlanner, Plan
from pipefleet_workers.adapters.writing.rows import Row, RowPenalty, RowSampler, RowStops, default_seed, row_seed
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

PROBED_TOKENS = 3
"""Steps of the proof of exactness: the first step reads the prompts, later steps continue from the cache."""
KEPT_STOPS = 64
"""Number of lists of stop strings whose tables are kept; a table has a row for each token."""
_CUTTING = ("truncation", "handle_long_generation", "tokenizer_encode_kwargs")
"""Arguments that may cut a prompt; such a prompt must be tokenised whole."""
_CLEANS = "clean_up_tokenization_spaces"
_UNSETTLED = re.compile(r" (?:n ?)?(?:' ?[vr]?)?$")
"""The end of a text whose spaces a tokenizer may take out with the next token, as in `don ' t`, `we 've` and `yes !`."""
_SENSES = ("vision", "visual", "image", "audio")
"""Parts of the names of encoders whose positions are not tokens."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and its arguments; `ids` are its tokens."""

    arguments: Arguments
    plan: Plan
    prompt: str | Any
    ids: torch.Tensor
    max_new_tokens: int
    stop: Any
    seed: int


class TextGenerator(Adapter):
    """text-generation: strings and chats. A sampled result depends on its seed and prompt, never on its neighbours."""

    typical_size = 0  # not measured at warm-up, since made-up prompts give no typical answer; the table's cost is used

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.pads = True
        self._planner = GenerationPlanner(pipe)
        self._stops = _StopStrings(pipe)
        self._positions = learnt_positions(pipe.model, pipe.model)

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Token ids and attention mask, padded on the left; a row for each sampled sequence."""
        return self._inputs([unit for unit in units for _ in range(request_of(unit).plan.copies)])

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """For each unit its sequences, each a list of new tokens, or why it has none."""
        if len(units) > 1 and not self._within_positions(units):
            return [output for unit in units for output in self.run(self.collate([unit]), [unit], progress)]
        plan, prompt = request_of(units[0]).plan, self.prompt_length(inputs)
        rows = [row for unit in units for row in _rows(request_of(unit), unit, prompt)]
        release = _Release(units, progress)
        stops = RowStops(rows, prompt, progress, look=lambda tokens: release.look(tokens, stops))
        arguments = {**copy.deepcopy(dict(plan.shared)), "max_new_tokens": max(row.max_new_tokens for row in rows)}
        arguments["logits_processor"] = self._processors(plan, rows, prompt)
        if plan.min_length:  # `min_length` counts the prompt too; plans with it batch only prompts of one length
            arguments["min_new_tokens"] = max(0, plan.min_length - prompt)
        with self._randomness(units):
            sequences = self._generate(inputs, stopping_criteria=StoppingCriteriaList([stops]), **arguments)
        return _outputs(sequences[:, prompt:].tolist(), stops, units)

    def _processors(self, plan: Plan, rows: Sequence[Row], prompt: int) -> LogitsProcessorList:
        """The processors for the scores of each row, in transformers' order."""
        processors: list[LogitsProcessor] = [] if plan.penalty == 1.0 else [RowPenalty(plan.penalty, rows)]
        if plan.sampling is not None:
            processors.append(RowSampler(rows, prompt, first=plan.first, last=plan.last))
        return LogitsProcessorList(processors)

    def prompt_length(self, inputs: dict[str, Any]) -> int:
        """How many tokens of generate()'s result existed before it began."""
        return int(inputs["input_ids"].shape[1])

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The outputs themselves: `run` has split them already."""
        return list(outputs)

    def numbers(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """Logits after each prompt, after its last token repeated once, and after its last token repeated twice."""
        probed = self._generate(
            self._inputs(units),
            max_new_tokens=PROBED_TOKENS,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            pad_token_id=self._pad,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([_Repeat()]),
        )
        logits = torch.stack(probed.logits, 1).float().cpu().numpy()
        return [np.where(np.isfinite(row), row, 0.0) for row in logits]

    def finish(self, assembly: Assembly) -> Any:
        """`[{"generated_text": …}]`, one for each sequence."""
        request: Request = assembly.context
        pipe, prompt = self.copies.get(), self._given(request)
        records: list[Any] = []
        for tokens in filled(assembly.outputs[0], request, self.hidden):
            sequence = torch.cat([request.ids, torch.tensor(tokens, dtype=torch.long)])
            outputs = {"generated_sequence": sequence[None, None], "input_ids": prompt, "prompt_text": request.prompt}
            records += pipe.postprocess(outputs, **request.arguments.fresh().postprocess)
        return records

    def text_so_far(self, unit: Unit, tokens: Sequence[int]) -> str | None:
        """The text that a request would have if its first `tokens` were all, without an end that later tokens may change."""
        request = request_of(unit)
        so_far = Assembly(unit.assembly.work, expected=1, context=request, outputs={0: [list(tokens)]})
        text = self.finish(so_far)[0].get("generated_text")
        cleans = request.arguments.postprocess.get(_CLEANS)
        if cleans is None:
            cleans = getattr(self.pipe.tokenizer, _CLEANS, False)
        return (_UNSETTLED.sub("", text) if cleans else text) if isinstance(text, str) else None

    def _given(self, request: Request) -> torch.Tensor | None:
        """The tokens of the prompt as postprocess takes them; None for an empty one: its first token belongs to the answer."""
        if len(request.ids) == 1:
            encoded = self.copies.get().preprocess(request.prompt, **request.arguments.fresh().preprocess)
            if not encoded["input_ids"].shape[1]:
                return None
        return request.ids[None]

    @cached_property
    def hidden(self) -> frozenset[int]:
        """Tokens that do not show in a text."""
        return frozenset(self.pipe.tokenizer.all_special_ids)

    @property
    def _pad(self) -> int:
        """The padding token. Any token will do, since padding is hidden."""
        known = self.pipe.tokenizer.pad_token_id
        return 0 if known is None else int(known)

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        request, features = self._request(decoded)
        plan = request.plan
        assembly = Assembly(decoded.work, expected=1, context=request)
        exact = not self.pads or self._hears_padding(plan)
        key = (
            plan.key,
            self._shape(features) if exact else None,
            request.max_new_tokens if plan.equal_bounds else None,
            getattr(request.stop, "stop_strings", None) if plan.beams > 1 else None,
            id(assembly) if plan.alone else None,
        )
        length = self._prompt_cost(request, features) + request.max_new_tokens
        joins = self.continuous is not None and self.continuous.takes(request)
        return [Unit(assembly, 0, JOINS if joins else key, length * plan.rows, features)]

    def _hears_padding(self, plan: Plan) -> bool:
        """Whether hidden padding would still change the text of this plan."""
        return plan.equal_lengths or plan.reads_encoder or bool(plan.min_length)

    def _prompt_cost(self, request: Request, features: Any) -> int:
        """Tokens that the model reads before it writes the first."""
        return len(request.ids)

    def _request(self, decoded: Decoded) -> tuple[Request, Any]:
        parameters, stop = without_stops(decoded.work.parameters)
        seed = parameters.pop("seed", None)
        arguments = self.parser.parse(self._nested(parameters))
        plan = self._planner.plan(arguments.forward_key, self._generation(arguments))
        prompt, ids, features = self._read(decoded.value, arguments)
        seed = default_seed(decoded.work) if seed is None else seed
        bound = self._bounded(plan.new_tokens(len(ids)), len(ids))
        return Request(arguments, plan, prompt, ids, bound, self._stops.get(stop), seed), features

    def _nested(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters in the form that the pipeline reads."""
        return parameters

    def _generation(self, arguments: Arguments) -> Mapping[str, Any]:
        """The arguments of generate(), taken from the arguments of the pipeline's forward."""
        return arguments.forward

    def _read(self, value: Any, arguments: Arguments) -> tuple[Any, torch.Tensor, Any]:
        """The prompt in the form for the pipeline's postprocess, its tokens, and the features of its unit (here: the tokens)."""
        if isinstance(value, str):
            if not any(arguments.preprocess.get(name) for name in _CUTTING):
                self.long_texts().require(value, self._longest_prompt)
            ids = self._ids(value, arguments)
            return value, ids, ids
        final = arguments.preprocess.get("continue_final_message")
        continued = value[-1]["role"] == "assistant" if final is None else final
        if continued:  # postprocess appends to the last message, which must be a text
            value = [*value[:-1], _in_one_text(value[-1])]
        shown = value if self._knows_parts else [_in_one_text(one) for one in value]
        require_chat(self.pipe.tokenizer, shown, self.long_texts(), self._longest_prompt)
        ids = self._ids(Chat(shown), arguments)
        return Chat(value), ids, ids

    @cached_property
    def _knows_parts(self) -> bool:
        """Whether the chat template reads contents that are lists of parts; other templates would print such a list."""
        text = "pipefleet"
        part = {"type": "text", "text": text}
        try:
            said = self.pipe.tokenizer.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False)
        except Exception:  # noqa: BLE001 - a template raises whatever it likes
            return False
        return text in said and "'type'" not in said and '"type"' not in said

    def _ids(self, prompt: Any, arguments: Arguments) -> torch.Tensor:
        encoded = self.copies.get().preprocess(prompt, **arguments.fresh().preprocess)
        ids: torch.Tensor = encoded["input_ids"][0].long()
        begin = self.pipe.model.generation_config.bos_token_id
        if len(ids):
            return ids
        if begin is None:
            raise ItemError("bad_input", "the prompt is empty, and the model has no token to begin with", STAGE)
        return torch.tensor([begin])

    @property
    def _longest_prompt(self) -> int:
        return self._positions or context_length(self.pipe.model) or self.max_tokens

    def _bounded(self, new_tokens: int, prompt: int) -> int:
        """`new_tokens`, but at most the room in a table of positions; the very last token needs no position."""
        longest = self._longest_prompt
        if prompt > longest:
            # Refuse it here: on a GPU an index beyond a table breaks the device for every later input. Without a table, one such
            # prompt takes the time and memory of all others.
            raise ItemError("too_long", f"the prompt has {prompt} tokens, the model takes {longest}", STAGE)
        return new_tokens if self._positions is None else min(new_tokens, self._positions - prompt + 1)

    def _within_positions(self, units: Sequence[Unit]) -> bool:
        """Whether ended rows stay inside the table of positions while the other rows go on."""
        steps = max(request_of(unit).max_new_tokens for unit in units)
        longest = max(len(request_of(unit).ids) for unit in units)
        return self._positions is None or longest + steps - 1 <= self._positions

    def _inputs(self, units: Sequence[Unit]) -> dict[str, Any]:
        """The model's inputs, a row for each of `units`."""
        return self._padded([request_of(unit).ids for unit in units])

    def _shape(self, features: Any) -> Any:
        """A key that must be equal when units may not be padded."""
        return len(features)

    def _padded(self, rows: Sequence[torch.Tensor]) -> dict[str, Any]:
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = row
            mask[index, longest - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _generate(self, inputs: dict[str, Any], **arguments: Any) -> Any:
        device = self.pipe.device
        with torch.inference_mode():
            return self.pipe.model.generate(**on_device(inputs, device), **arguments)

    @contextlib.contextmanager
    def _randomness(self, units: Sequence[Unit]) -> Iterator[None]:
        """A context that seeds torch's random numbers for a request with a call of its own; it does nothing for other requests."""
        if not request_of(units[0]).plan.alone:
            yield
            return
        device = self.pipe.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(request_of(units[0]).seed)
            yield


class _Release:
    """Hands on the sequences of a unit as soon as all of them have ended, while the batch still runs."""

    def __init__(self, units: Sequence[Unit], progress: Progress) -> None:
        self._units = units
        self._progress = progress
        self._plan = request_of(units[0]).plan
        self._ended = _Ended(self._plan)

    def look(self, tokens: torch.Tensor, stops: RowStops) -> None:
        """Look at the new tokens `[rows, steps]` of all rows. `stops` knows the bounds of each row."""
        if self._plan.beams > 1:
            return  # only the end of the call shows the best beam
        copies, ends, ended = self._plan.copies, stops.ends(), self._ended.look(tokens)
        for index, unit in enumerate(self._units):
            own = range(index * copies, (index + 1) * copies)
            if own.start in stops.stopped or not self._progress.remains(unit):
                continue
            if unit.assembly.work.job.streams:
                self._progress.wrote(unit, _cut(tokens[own.start].tolist(), ends[own.start], self._plan)[0])
            if all(ends[row] or ended[row] for row in own):
                sequences = tokens[own.start : own.stop].tolist()
                cut = [_cut(one, ends[row], self._plan)[0] for one, row in zip(sequences, own, strict=True)]
                self._progress.release(unit, cut)


class _Ended:
    """Knows the rows of one call that have written an end token. It reads each token once, so long answers slow no look."""

    def __init__(self, plan: Plan) -> None:
        self._tokens = torch.tensor(sorted(plan.ends), dtype=torch.long)
        self._rows: list[bool] = []
        self._seen = 0

    def look(self, tokens: torch.Tensor) -> list[bool]:
        """For each row whether it has ended. `tokens` `[rows, steps]` holds the tokens of the last look, and newer tokens."""
        self._tokens = self._tokens.to(tokens.device)
        new = torch.isin(tokens[:, self._seen :], self._tokens).any(1).tolist()
        self._rows = [before or now for before, now in zip(self._rows or [False] * len(new), new, strict=True)]
        self._seen = tokens.shape[1]
        return self._rows


class _StopStrings:
    """Makes criteria for lists of stop strings, and keeps them: making one reads the whole vocabulary. Thread-safe."""

    def __init__(self, pipe: Any) -> None:
        self._tokenizer = copy.deepcopy(pipe.tokenizer)
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, ...], Any] = OrderedDict()

    def get(self, strings: Sequence[str]) -> Any:
        """The criterion; None without strings. Raises ItemError (bad_parameter) for strings that no tokens can form."""
        key = tuple(strings)
        if not key:
            return None
        with self._lock:
            if key not in self._known:
                self._known[key] = self._made(key)
                if len(self._known) > KEPT_STOPS:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return self._known[key]

    def _made(self, strings: tuple[str, ...]) -> Any:
        try:
            return StopStringCriteria(self._tokenizer, list(strings))
        except ValueError as error:
            raise ItemError("bad_parameter", f"stop holds a text that cannot be looked for: {error}", STAGE) from None


class _Repeat(LogitsProcessor):  # type: ignore[misc]
    """Repeats the last token whatever the scores: the proof must not depend on which of two nearly equal scores is larger."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, input_ids[:, -1:], 0.0)


def request_of(unit: Unit) -> Request:
    """The request of a unit of a `TextGenerator`."""
    found = unit.assembly.context
    assert isinstance(found, Request)
    return found


def _rows(request: Request, unit: Unit, prompt: int) -> list[Row]:
    job, padding = unit.assembly.work.job, max(0, prompt - len(request.ids))
    return [
        Row(job, request.max_new_tokens, padding, request.stop, request.plan.sampling, row_seed(request.seed, sequence))
        for sequence in range(request.plan.copies)
    ]


def _outputs(sequences: list[list[int]], stops: RowStops, units: Sequence[Unit]) -> list[list[list[int]] | JobFailure]:
    """The sequences of each unit up to their ends; a failure for a unit whose job was stopped before all its sequences ended."""
    plan, ends = request_of(units[0]).plan, stops.ends()
    each, copies = len(sequences) // len(units), plan.copies
    outputs: list[list[list[int]] | JobFailure] = []
    for index in range(len(units)):
        own = sequences[index * each : (index + 1) * each]
        bounds = ends[index * copies : (index + 1) * copies] if plan.beams == 1 else [0] * each
        cut = [_cut(tokens, end, plan) for tokens, end in zip(own, bounds, strict=True)]
        stopped = stops.stopped.get(index * copies)
        if stopped is not None and not all(ended and len(tokens) <= stopped[0] for tokens, ended in cut):
            outputs.append(stopped[1])
        else:
            outputs.append([tokens for tokens, _ in cut])
    return outputs


def _cut(tokens: list[int], end: int, plan: Plan) -> tuple[list[int], bool]:
    """The tokens of one sequence, and whether the sequence ended."""
    tokens = tokens[:end] if end else tokens
    last = next((index for index, token in enumerate(tokens) if token in plan.ends), None)
    if last is not None:
        return tokens[: last + 1], True
    while plan.beams > 1 and tokens and tokens[-1] in plan.fills:
        tokens = tokens[:-1]
    return tokens, end > 0


def filled(
    sequences: Sequence[list[int]], request: Request, hidden: frozenset[int], *, all_shown: bool = False
) -> Sequence[list[int]]:
    """The sequences of one request, filled up to one length as generate() fills them, if the result shows the filling token.

    `hidden` tokens do not show in a result, unless `all_shown` is set or the request asks for tokens or special tokens.
    """
    if len(sequences) < 2:
        return sequences
    post = request.arguments.postprocess
    shown = all_shown or _is_tensors(post.get("return_type")) or post.get("skip_special_tokens") is False
    if not shown and request.plan.fill in hidden:
        return sequences
    longest = max(len(one) for one in sequences)
    return [[*one, *[request.plan.fill] * (longest - len(one))] for one in sequences]


def _is_tensors(kind: Any) -> bool:
    """Whether a ReturnType asks for tokens.

    Compared by name: each pipeline module has its own ReturnType, and these are unequal.
    """
    return getattr(kind, "name", None) == "TENSORS"


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Inputs of a model, with their tensors on its device."""
    return {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}


def learnt_positions(decoder: torch.nn.Module, model: Any) -> int | None:
    """How many positions the learnt tables of a model's decoder have; None if positions are computed."""
    tables = [
        module.num_embeddings
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and _names_positions(name.rsplit(".", 1)[-1])
        and not any(sense in name for sense in _SENSES)
    ]
    return min([*tables, context_length(model) or min(tables)]) if tables else None


def context_length(model: Any) -> int | None:
    """How many positions the model was made for; None if its config does not say."""
    known: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return known


def require_chat(template: Any, messages: Sequence[Mapping[str, Any]], texts: LongTexts, longest: int) -> None:
    """Raise ItemError (too_long) for a chat that has more than `longest` tokens in the form that `template` gives it."""
    if chat_characters(messages) <= LONG:
        return
    try:
        written = template.apply_chat_template([dict(one) for one in messages], tokenize=False)
    except Exception:  # noqa: BLE001 - a template raises whatever it likes, and will do so again
        return
    if isinstance(written, str):
        texts.require(written, longest)


def chat_characters(messages: Sequence[Mapping[str, Any]]) -> int:
    """Characters of all texts of a chat."""
    contents = [one["content"] for one in messages]
    parts = [part for one in contents if not isinstance(one, str) for part in one]
    return sum(len(one) for one in contents if isinstance(one, str)) + sum(len(one.get("text", "")) for one in parts)


def _in_one_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a chat, with the texts of its parts joined."""
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": "".join(part["text"] for part in content)}


def _names_positions(name: str) -> bool:
    return name == "wpe" or "pos" in name
