"""Gives each request random numbers of its own: the numbers that a pipeline draws if torch is seeded before its call.

A seed goes in; a context comes out, in which torch draws the numbers of this seed. Adapters that sample with torch's own generator
enter it around the forward, in the thread of the forward. Torch's global numbers are unchanged afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Draws:
    """The random numbers of one request, which go on from call to call."""

    def __init__(self, seed: int, device: torch.device, *, loads: bool = False) -> None:
        """`loads`: transformers' pipeline reads even a single input through a DataLoader, which draws one number first."""
        self._seed = seed
        self._loads = loads
        self._devices = [device] if device.type == "cuda" else []
        self._state: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """A context in which torch draws these numbers. Afterwards torch's own numbers go on as if none had been drawn."""
        with torch.random.fork_rng(devices=self._devices):
            if self._state is None:
                torch.manual_seed(self._seed)
                if self._loads:
                    torch.empty((), dtype=torch.int64).random_()
            else:
                torch.set_rng_state(self._state[0])
                for device, state in zip(self._devices, self._state[1], strict=True):
                    torch.cuda.set_rng_state(state, device)
            yield
            self._state = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._devices]


def drawing(seed: int | None, device: torch.device, *, loads: bool = False) -> contextlib.AbstractContextManager[None]:
    """A context for one call, in which torch draws the numbers of `seed`. Without a seed the context does nothing."""
    return contextlib.nullcontext() if seed is None else Draws(seed, device, loads=loads).current()
