"""The hand loops: for each workload the fastest loop that we can think of, everything in memory, nothing in between.

A loop is called with transformers' pipeline, a workload and pieces of its item names. It gives the output of each name that it
drew, in the form of the task. One process draws one piece with everything; several processes draw from the same pieces. An output
must agree with the pipeline's, so approximations are no part of it: a JPEG that is decoded at an eighth of its size (PIL's draft
mode) saves half of the decoding, and moves the score of every seventh picture by more than the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tests.benchmarks.workloads import Workload

PIECES_PER_PROCESS = 16
"""Few enough for full batches, many enough that no process waits long for the last piece of another."""


def run(pipe: Any, workload: Workload, pieces: Iterable[list[str]]) -> dict[str, Any]:
    """The output of each name in `pieces`, which are drawn one after the other."""
    import torch

    from tests.benchmarks.by_hand import pictures, speech, texts

    loops = {
        "feature-extraction": texts.embed,
        "text-classification": texts.classify,
        "automatic-speech-recognition": speech.transcribe,
        "image-classification": pictures.classify,
    }
    with torch.inference_mode():
        return loops[workload.task](pipe, workload, pieces)


def pieces(workload: Workload, processes: int) -> list[list[str]]:
    """The names, largest item first; for several processes in pieces of like total size, a recording always alone.

    The largest first, so that the last pieces are short and the processes end together. Bytes and characters stand for the cost
    here; a loop sorts the items of a piece again by what it knows of them.
    """
    names = sorted(workload.items, key=lambda name: -len(workload.items[name]))
    if processes == 1:
        return [names]
    if workload.task == "automatic-speech-recognition":
        return [[name] for name in names]
    total = sum(len(workload.items[name]) for name in names)
    return list(_cut(names, workload, total / (processes * PIECES_PER_PROCESS)))


def _cut(names: list[str], workload: Workload, size: float) -> Iterator[list[str]]:
    piece: list[str] = []
    filled = 0
    for name in names:
        piece.append(name)
        filled += len(workload.items[name])
        if filled >= size:
            yield piece
            piece, filled = [], 0
    if piece:
        yield piece
