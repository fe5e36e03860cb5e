"""Lets requests with different parameters share one generate() call, each with the result of a call of its own.

`RowStops` ends every row by its own bounds, `RowSampler` draws every row's tokens from its own seed, and `RowPenalty` ignores the
row's padding. Other arguments, such as the number of beams, must be equal within a batch (see `plan.py`). The writing adapters pass
these objects to generate(); each is for one call, on one thread.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor, StoppingCriteria

from pipefleet.contract.records import JobFailure
from pipefleet_workers.adapters.progress import UNOBSERVED, Progress
from pipefleet_workers.items import JobContext, Work

LOOK_STEPS = 8
"""Steps between two looks at the sequences, unless somebody reads along. A look waits for the device, so not every step has one."""
NO_TOKEN = torch.iinfo(torch.int32).max
"""Stands for padding in the search for stop strings: it lies above every vocabulary, so no string contains it."""
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
"""Constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed numbers: torch has no unsigned arithmetic."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row samples: `temperature` above 0; `top_k` 0 and `top_p` 1.0 set no bound."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a generate() call, or the beams of one request. `padding` counts the tokens before its prompt."""

    job: JobContext
    max_new_tokens: int
    padding: int = 0
    stop: Any = None
    """A `StopStringCriteria`, the same object for rows with the same stop strings; None without stop strings."""
    sampling: Sampling | None = None
    seed: int = 0
    """From `row_seed`: signed, 64 bits."""


class RowStops(StoppingCriteria):  # type: ignore[misc]
    """Ends a row at its own `max_new_tokens`, at its stop strings, at its job's deadline, or when its job is cancelled.

    generate() fills ended rows with padding and returns when no row is left. For one call, on one thread.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        prompt: int,
        progress: Progress = UNOBSERVED,
        *,
        look: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """`prompt` is the padded length of the prompts. With beams, the rows of the call form equal groups.

        At every step, `progress` gets a tick and is asked for stopped jobs. Every `LOOK_STEPS` steps, or every step if a
        client reads along, `look` gets the new tokens of all rows `[rows, steps]`, on the device.
        """
        self._progress = progress
        self._look = look
        self._look_steps = 1 if any(row.job.streams for row in rows) else LOOK_STEPS
        self._rows = rows
        self._prompt = prompt
        self._limits = torch.tensor([row.max_new_tokens for row in rows])
        self._ended = torch.zeros(len(rows), dtype=torch.long)
        self._stops: dict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            if row.stop is not None:
                self._stops[id(row.stop)].append(index)
        self.stopped: dict[int, tuple[int, JobFailure]] = {}
        """Rows whose job was stopped, with their number of new tokens at that time, and the failure."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """A bool for each row of `input_ids`: whether it has ended."""
        self._progress.tick()
        device, step = input_ids.device, input_ids.shape[1] - self._prompt
        group = input_ids.shape[0] // len(self._rows)
        self._limits, self._ended = self._limits.to(device), self._ended.to(device)
        done = (self._limits <= step).repeat_interleave(group)
        for indices in self._stops.values():
            rows = [index * group + member for index in indices for member in range(group)]
            done[rows] |= self._stop_string_in(input_ids[rows], indices, group)
        if group == 1:
            self._ended = torch.where((self._ended == 0) & done, step, self._ended)
        if self._ask_jobs(step):
            stopped = [index in self.stopped for index in range(len(self._rows))]
            done |= torch.tensor(stopped, device=device).repeat_interleave(group)
        if self._look is not None and step % self._look_steps == 0:
            self._look(input_ids[:, self._prompt :])
        return done

    def ends(self) -> list[int]:
        """For each row the number of new tokens at which its own bounds ended it; 0 if they did not. Not known for beams."""
        return [int(end) for end in self._ended.tolist()]

    def _stop_string_in(self, ids: torch.Tensor, indices: Sequence[int], group: int) -> torch.Tensor:
        criterion = self._rows[indices[0]].stop
        first = max(0, ids.shape[1] - int(criterion.maximum_token_len))
        padding = torch.tensor([self._rows[index].padding for index in indices], device=ids.device)
        positions = torch.arange(first, ids.shape[1], device=ids.device)
        padded = positions < padding.repeat_interleave(group)[:, None]
        found: torch.Tensor = criterion(ids[:, first:].masked_fill(padded, NO_TOKEN), None)
        return found

    def _ask_jobs(self, step: int) -> bool:
        for index, row in enumerate(self._rows):
            failure = None if index in self.stopped else self._progress.stopped(row.job)
            if failure is not None:
                self.stopped[index] = step, failure
        return bool(self.stopped)


class RowPenalty(LogitsProcessor):  # type: ignore[misc]
    """The repetition penalty of transformers, without the padding before shorter prompts."""

    def __init__(self, penalty: float, rows: Sequence[Row]) -> None:
        self._inner = RepetitionPenaltyLogitsProcessor(penalty=penalty)
        self._padding = torch.tensor([row.padding for row in rows])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores, with the scores of each row's own tokens lowered. With beams, the rows of the call form equal groups."""
        self._padding = self._padding.to(input_ids.device)
        group = input_ids.shape[0] // len(self._padding)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        padded = positions < self._padding.repeat_interleave(group)[:, None]
        # The penalty does not count repetitions, so the row's last token may take the place of padding.
        lowered: torch.Tensor = self._inner(torch.where(padded, input_ids[:, -1:], input_ids), scores)
        return lowered


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """Samples each row with its own temperature, top_k, top_p and seed. It leaves one token possible, so `do_sample` is False.

    The largest score plus Gumbel noise is a draw from the softmax. The noise is a hash of seed, step and token, so it is the
    same beside any neighbours and on any device. Scores are bounded as in transformers, in the same order.
    """

    def __init__(
        self, rows: Sequence[Row], prompt: int, *, first: Sequence[Any] = (), last: Sequence[Any] = ()
    ) -> None:
        """All rows share the warpers `first`, applied after the temperature, and `last`, applied after top_p."""
        wanted = [row.sampling or Sampling() for row in rows]
        self._prompt = prompt
        self._first, self._last = first, last
        self._temperature = torch.tensor([one.temperature for one in wanted])
        self._top_k = [one.top_k for one in wanted]
        self._top_p = [one.top_p for one in wanted]
        self._seeds = torch.tensor([row.seed for row in rows])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores with 0 at the drawn token and minus infinity elsewhere."""
        return self.drawn(input_ids, scores, input_ids.shape[1] - self._prompt)

    def drawn(self, input_ids: torch.Tensor, scores: torch.Tensor, step: int | torch.Tensor) -> torch.Tensor:
        """The same scores at a `step`: the number of new tokens so far, one for all rows or one for each."""
        scores = scores / self._temperature.to(scores)[:, None]
        for warper in self._first:
            scores = warper(input_ids, scores)
        scores = _within_top_p(_within_top_k(scores, self._top_k), self._top_p)
        for warper in self._last:
            scores = warper(input_ids, scores)
        values, tokens = _possible(scores)
        noise = gumbel(self._seeds.to(scores.device), step, tokens)
        drawn = tokens.gather(1, (values.double() + noise).argmax(1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def gumbel(seeds: torch.Tensor, step: int | torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise in float64 for `tokens` `[rows, n]`; it depends only on the row's seed, the step and the token."""
    stream = _mixed(_mixed(seeds) + (torch.zeros_like(seeds) + step + 1) * _STEP)
    bits = _shifted(_mixed(stream[:, None] + (tokens + 1) * _STEP), 12)
    uniform = (bits.double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def default_seed(work: Work, chunk: int = 0) -> int:
    """The seed of a request without one: different for each item, the same whenever its job runs again."""
    return _digest(f"{work.job.run_id or work.job.id}/{work.item.id}/{chunk}")


def row_seed(seed: int, sequence: int) -> int:
    """The seed of one of a request's sequences."""
    return _digest(f"{seed}/{sequence}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64. Products wrap around, as its definition requires."""
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A shift to the right that fills with zeros; torch's own shift fills with the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _within_top_k(scores: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """The scores within each row's own `top_k`; as in transformers, tokens that tie with the last kept token stay."""
    width = scores.shape[-1]
    bounds = [min(bound, width) for bound in top_k]
    if not any(bounds):
        return scores
    highest = torch.topk(scores, max(bounds)).values
    places = torch.tensor([max(0, bound - 1) for bound in bounds], device=scores.device)[:, None]
    bounded = torch.tensor([bound > 0 for bound in bounds], device=scores.device)[:, None]
    return scores.masked_fill(bounded & (scores < highest.gather(1, places)), -torch.inf)


def _within_top_p(scores: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """The scores within each row's own `top_p`, for rows that have one."""
    rows = [index for index, bound in enumerate(top_p) if bound < 1.0]
    if not rows:
        return scores
    ordered, order = torch.sort(scores[rows], stable=True)
    missing = 1.0 - torch.tensor([top_p[row] for row in rows], dtype=torch.float64, device=scores.device)
    improbable = ordered.softmax(-1).cumsum(-1) <= missing.to(scores.dtype)[:, None]
    improbable[:, -1] = False
    scores = scores.clone()
    scores[rows] = scores[rows].masked_fill(improbable.scatter(1, order, improbable), -torch.inf)
    return scores


def _possible(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids of the tokens that are still possible: noise for a whole vocabulary costs more than this search."""
    width = scores.shape[-1]
    most = max(1, int((scores > -torch.inf).sum(1).max()))
    if 4 * most > width:
        return scores, torch.arange(width, device=scores.device).expand_as(scores)
    values, tokens = torch.topk(scores, most)
    return values, tokens
