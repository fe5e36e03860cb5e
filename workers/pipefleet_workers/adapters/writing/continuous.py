"""The continuous writer of decoders: each sequence of a unit is a row of a paged cache, and has the tokens that generate() writes.

`models.continuous` makes it and proves it; the device's thread drives it through `adapters.continuous`. Scores go through the same
penalties and the same draws as in a batch (`rows.py`), so a result does not depend on the path. Requests that need more than that,
such as beams, are not taken. A request that cannot fit into all pages is not taken either.
"""

from __future__ import annotations

import gc
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipefleet_workers.adapters.continuous import Turn
from pipefleet_workers.adapters.writing.generate import PROBED_TOKENS, Request, TextGenerator, request_of
from pipefleet_workers.adapters.writing.paged import PagedDecoder, Pages
from pipefleet_workers.adapters.writing.plan import Plan
from pipefleet_workers.adapters.writing.rows import NO_TOKEN, Row, RowPenalty, RowSampler, row_seed
from pipefleet_workers.items import Unit
from pipefleet_workers.process.watchdog import working_on

_SHARED = frozenset({
    "do_sample", "num_beams", "num_return_sequences", "repetition_penalty", "pad_token_id", "eos_token_id", "bos_token_id",
    "temperature", "top_k", "top_p", "length_penalty", "early_stopping",
})  # fmt: skip
"""Arguments of generate() that this writer follows, or that change nothing without beams."""


@dataclass(slots=True)
class _Sequence:
    """One sequence of a unit. `name` is None while it is not in the cache."""

    unit: Unit
    request: Request
    number: int
    name: str | None = None
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    def looked_at(self, most: int) -> list[int]:
        """The last `most` tokens of prompt and answer."""
        lacking = most - len(self.tokens)
        before = self.request.ids[-lacking:].tolist() if lacking > 0 else []
        return [*before, *self.tokens[-most:]]


class DecoderWriter:
    """A `ContinuousWriter` for the units of a `TextGenerator`."""

    def __init__(self, generator: TextGenerator, pages: Pages) -> None:
        """Raises UnsuitedError where the model cannot be served so."""
        self._generator = generator
        self._pages = pages
        self._most_rows = pages.rows
        self._decoder = PagedDecoder(generator.pipe.model, pages, self._choose)
        self._known: dict[str, bool] = {}
        self._names = itertools.count()
        self._units: dict[int, list[_Sequence]] = {}
        self._inside: dict[str, _Sequence] = {}
        self._taken = 0
        self._probed: dict[str, list[np.ndarray[Any, Any]]] | None = None
        self._repeated: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the cache."""
        return self._decoder.bytes

    def takes(self, context: Any) -> bool:
        """Whether the request asks for nothing beyond this writer, and fits into the cache."""
        assert isinstance(context, Request)
        plan = context.plan
        served = self._known.get(plan.key)
        if served is None:
            if len(self._known) > 1000:
                self._known.clear()
            served = self._known[plan.key] = self._serves(plan)
        fits = plan.copies <= self._pages.rows and self._need(context) <= self._pages.count
        return served and fits and context.max_new_tokens > 0

    def fits(self, unit: Unit, *, without: Sequence[Unit] = ()) -> bool:
        """Whether its pages and rows are free up to its end, and the prompts before it are nearly read."""
        if not self._inside:
            return True
        request = request_of(unit)
        gone = [one for other in without for one in self._units[id(other)] if one.name is not None]
        pages = self._taken - sum(self._need(one.request) // one.request.plan.copies for one in gone)
        if len(self._inside) - len(gone) + request.plan.copies > self._most_rows:
            return False
        if pages + self._need(request) > self._pages.count:
            return False
        return self._decoder.unread(without={str(one.name) for one in gone}) < self._pages.chunk

    def join(self, unit: Unit) -> None:
        """Take a unit in."""
        request = request_of(unit)
        sequences = self._units.get(id(unit))
        if sequences is None:
            sequences = [_Sequence(unit, request, number) for number in range(request.plan.copies)]
            self._units[id(unit)] = sequences
        for one in sequences:
            if not one.ended:
                self._enter(one, request.max_new_tokens - len(one.tokens), request.plan.ends)

    def park(self, unit: Unit) -> None:
        """Free the pages of a unit, and keep its tokens."""
        for one in self._units[id(unit)]:
            if one.name is not None:
                self._decoder.leave(one.name)
                self._exit(one)

    def forget(self, unit: Unit) -> None:
        """Drop a unit."""
        if id(unit) in self._units:
            self.park(unit)
            del self._units[id(unit)]

    def step(self) -> Turn:
        """A token for each sequence that has read its prompt."""
        stepped: list[_Sequence] = []
        for name, token in self._decoder.step():
            one = self._inside[name]
            one.tokens.append(token)
            stepped.append(one)
        try:
            self._end(stepped)
        except Exception:
            # This step never was: otherwise a sequence could end with nobody told, or run past its stop.
            for one in stepped:
                one.tokens.pop()
                one.ended = False
            raise
        first = [one for one in stepped if one.number == 0 and one.unit.assembly.work.job.streams]
        return Turn([(one.unit, one.tokens) for one in first], self._ended(stepped))

    def clear(self) -> None:
        """Park all units."""
        self._decoder.clear()
        for one in list(self._inside.values()):
            self._exit(one)

    def shrink(self) -> None:
        """Halve the number of rows."""
        self._most_rows = max(1, self._most_rows // 2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def numbers(self, units: Sequence[Unit], *, pieces: int) -> list[np.ndarray[Any, Any]]:
        """As `TextGenerator.numbers`: the logits while the last token of each prompt is repeated. Prompts are read in `pieces`."""
        self._probed = {}
        try:
            with self._decoder.pieces_of(pieces):
                for index, unit in enumerate(units):
                    ids = request_of(unit).ids.tolist()
                    self._decoder.join(f"probe-{index}", ids, PROBED_TOKENS, ())
                    self._probed[f"probe-{index}"], self._repeated[f"probe-{index}"] = [], ids[-1]
                while any(len(one) < PROBED_TOKENS for one in self._probed.values()):
                    working_on(None)
                    self._decoder.step()
            return [np.stack(self._probed[f"probe-{index}"]) for index in range(len(units))]
        finally:
            self._probed = None
            self._decoder.clear()

    def _enter(self, one: _Sequence, most: int, ends: frozenset[int]) -> None:
        one.name = f"row-{next(self._names)}"
        self._inside[one.name] = one
        self._taken += self._need(one.request) // one.request.plan.copies
        self._decoder.join(one.name, [*one.request.ids.tolist(), *one.tokens], most, ends)

    def _exit(self, one: _Sequence) -> None:
        assert one.name is not None
        del self._inside[one.name]
        one.name = None
        self._taken -= self._need(one.request) // one.request.plan.copies

    def _need(self, request: Request) -> int:
        """Pages of a request at its end."""
        return request.plan.copies * -(-(len(request.ids) + request.max_new_tokens) // self._pages.size)

    def _end(self, stepped: Sequence[_Sequence]) -> None:
        """Find the sequences that end here: by a token, by their length, or by a stop string."""
        asked: dict[int, list[_Sequence]] = defaultdict(list)
        for one in stepped:
            request = one.request
            one.ended = one.tokens[-1] in request.plan.ends or len(one.tokens) >= request.max_new_tokens
            if one.ended:
                self._exit(one)  # the decoder has ended it by the same rule
            elif request.stop is not None:
                asked[id(request.stop)].append(one)
        for group in asked.values():
            for one in _stopped(group):
                one.ended = True
                assert one.name is not None
                self._decoder.leave(one.name)
                self._exit(one)

    def _ended(self, stepped: Sequence[_Sequence]) -> list[tuple[Unit, Any]]:
        """The units whose sequences have all ended, with their tokens."""
        ended: list[tuple[Unit, Any]] = []
        for one in stepped:
            sequences = self._units.get(id(one.unit)) if one.ended else None
            if sequences is not None and all(each.ended for each in sequences):
                del self._units[id(one.unit)]
                ended.append((one.unit, [each.tokens for each in sequences]))
        return ended

    def _choose(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        """The scores after each row's own penalty and draw; called inside of a step."""
        if self._probed is not None:
            return self._noted(names, scores)
        groups: dict[str, list[int]] = defaultdict(list)
        rows = [self._inside[name] for name in names]
        for index, one in enumerate(rows):
            plan = one.request.plan
            if plan.penalty != 1.0 or plan.sampling is not None:
                groups[plan.key].append(index)
        for places in groups.values():
            own = [rows[index] for index in places]
            if len(own) == len(rows):
                return _processed(own, scores)
            scores[places] = _processed(own, scores[places])
        return scores

    def _noted(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        """Note the scores for the proof, and repeat the last token of each prompt."""
        assert self._probed is not None
        chosen = torch.full_like(scores, -torch.inf)
        for index, name in enumerate(names):
            row = scores[index].float().cpu().numpy()
            self._probed[name].append(np.where(np.isfinite(row), row, 0.0))
            chosen[index, self._repeated[name]] = 0.0
        return chosen

    def _serves(self, plan: Plan) -> bool:
        """Whether a plan asks for nothing but penalties, draws and bounds, as seen by generate() itself."""
        unusual = plan.beams > 1 or plan.alone or plan.min_length or plan.equal_lengths or plan.equal_bounds
        if unusual or set(plan.shared) - _SHARED:
            return False
        model = self._generator.pipe.model
        config = model._prepare_generation_config(None, **plan.shared)[0]
        bounded: Mapping[str, Any] = {
            name: getattr(config, name, None) for name in ("max_time", "stop_strings", "min_new_tokens")
        }
        return not any(bounded.values()) and not len(model._get_logits_processor(config, input_ids_seq_length=1))


def _processed(rows: Sequence[_Sequence], scores: torch.Tensor) -> torch.Tensor:
    """The scores of rows of one plan, processed as in a batch."""
    plan = rows[0].request.plan
    ids = torch.zeros(len(rows), 1, dtype=torch.long, device=scores.device)
    if plan.penalty != 1.0:
        ids, padding = _left(rows, scores.device)
        scores = RowPenalty(plan.penalty, [_row(one, own) for one, own in zip(rows, padding, strict=True)])(ids, scores)
    if plan.sampling is not None:
        sampler = RowSampler([_row(one, 0) for one in rows], 0, first=plan.first, last=plan.last)
        steps = torch.tensor([len(one.tokens) for one in rows], device=scores.device)
        scores = sampler.drawn(ids, scores, steps)
    return scores


def _row(one: _Sequence, padding: int) -> Row:
    request = one.request
    job, seed = one.unit.assembly.work.job, row_seed(request.seed, one.number)
    return Row(job, request.max_new_tokens, padding, request.stop, request.plan.sampling, seed)


def _left(rows: Sequence[_Sequence], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """The tokens of each row, padded on the left, and the lengths of the padding."""
    whole = [torch.cat([one.request.ids, torch.tensor(one.tokens, dtype=torch.long)]) for one in rows]
    longest = max(len(one) for one in whole)
    padding = [longest - len(one) for one in whole]
    ids = torch.stack([torch.nn.functional.pad(one, (lack, 0)) for one, lack in zip(whole, padding, strict=True)])
    return ids.to(device), padding


def _stopped(group: Sequence[_Sequence]) -> list[_Sequence]:
    """The rows of one list of stop strings that end with one of them."""
    criterion = group[0].request.stop
    most = int(criterion.maximum_token_len)
    tails = [one.looked_at(most) for one in group]
    ids = torch.tensor([[NO_TOKEN] * (most - len(tail)) + tail for tail in tails])
    found = criterion(ids, None).tolist()
    return [one for one, ended in zip(group, found, strict=True) if ended]
