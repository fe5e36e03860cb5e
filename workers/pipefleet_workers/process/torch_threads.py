"""The number of torch threads of the calling thread. Stages and lanes set it, so that together they do not crowd the cores."""

from __future__ import annotations

import torch


def torch_threads() -> int:
    """Threads that the calling thread's work in torch takes: those that it set, else the number that was set last in any thread."""
    return torch.get_num_threads()


def use_torch_threads(count: int) -> None:
    """From now on let the calling thread's work in torch take `count` threads; other threads keep their number."""
    torch.get_num_threads()  # a thread's first work in torch takes over the number that was set last; this makes it happen now
    torch.set_num_threads(count)
