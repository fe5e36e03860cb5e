"""Times a model that writes: it takes a few steps of generate(), and the time of a typical answer follows from them.

A made-up input may end after one token. So the end tokens are impossible here, and the call is broken off when enough steps are
timed. `warmup` calls `seconds_to_write`; whatever the adapter raises passes through.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationMixin

from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.items import Unit

TIMED_STEPS = 6
"""Steps that are timed or compared: the first reads the input, the others are alike."""


class _EnoughError(Exception):
    """All wanted steps are timed."""


class _Stopwatch:
    """A forward hook for every part of a model that can write: notes when each step has ended, and lets no row end."""

    def __init__(self, ends: Sequence[int]) -> None:
        self._ends = list(ends)
        self._thread = threading.get_ident()  # other threads may time batches of the same model
        self._writer: Any = None
        """The part that gives the logits. A part around it gives the same logits, and may not count again."""
        self.steps: list[float] = []
        self.scores: list[torch.Tensor] | None = None
        """By step the scores of the next token, [rows, vocabulary]; None unless they are wanted."""

    def __call__(self, model: Any, arguments: Any, output: Any) -> None:
        logits: torch.Tensor | None = getattr(output, "logits", None)
        if logits is None or threading.get_ident() != self._thread or model is not (self._writer or model):
            return
        self._writer = model
        if self.scores is not None:
            self.scores.append(logits[:, -1].detach().float().cpu().clone())  # before the ends become impossible
        logits[..., self._ends] = -torch.inf
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.steps.append(time.perf_counter())
        if len(self.steps) == TIMED_STEPS:
            raise _EnoughError


def seconds_to_write(adapter: Adapter, units: Sequence[Unit]) -> float:
    """Seconds of a batch whose rows each write `adapter.typical_steps` tokens, or fewer if the arguments bound them."""
    watch, begin = _Stopwatch(_ends(adapter.pipe.model)), time.perf_counter()
    if _write(adapter, units, watch):
        return time.perf_counter() - begin  # the arguments ended it; the steps are all there
    first, *later = watch.steps
    return first - begin + (adapter.typical_steps - 1) * (later[-1] - first) / len(later)


def first_scores(adapter: Adapter, unit: Unit) -> np.ndarray[Any, Any]:
    """The scores of the first tokens that the model writes for a unit, [steps, vocabulary]."""
    watch = _Stopwatch(_ends(adapter.pipe.model))
    watch.scores = []
    _write(adapter, [unit], watch)
    return torch.cat(watch.scores).numpy()


def _write(adapter: Adapter, units: Sequence[Unit], watch: _Stopwatch) -> bool:
    """Let the model write for some steps; whether it ended before."""
    hooks = [
        part.register_forward_hook(watch) for part in adapter.pipe.model.modules() if isinstance(part, GenerationMixin)
    ]
    try:
        adapter.split(adapter.run(adapter.collate(units), units, UNOBSERVED), units)
    except _EnoughError:
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


def _ends(model: Any) -> list[int]:
    """The tokens that end a row."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
