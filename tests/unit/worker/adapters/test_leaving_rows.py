"""Rows that have ended leave the batch of an encoder-decoder, and every text stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pipefleet.tasks import TASKS
from pipefleet_workers.adapters.audio.whisper_rows import WhisperRows, _EndsAt
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.adapters.writing.leaving import LeavingRows
from pipefleet_workers.adapters.writing.seq2seq import TextRewriter
from pipefleet_workers.models.warmup import example_units
from tests.parity.harness import load

WHISPER = "automatic-speech-recognition:whisper"
REWRITING = ["summarization", "translation", "text2text-generation"]


@contextmanager
def rows_of_steps(model: Any) -> Iterator[list[int]]:
    """The rows of each forward of the decoder."""
    rows: list[int] = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda _, given, named: rows.append(len(named["input_ids"] if "input_ids" in named else given[0])),
        with_kwargs=True,
    )
    yield rows
    hook.remove()


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function after whose call no row leaves."""
    return lambda: monkeypatch.setattr(LeavingRows, "possible", staticmethod(lambda *_: False))


@pytest.fixture(scope="module")
def whisper() -> Any:
    model = copy.deepcopy(load(WHISPER).model)
    WhisperRows(model)
    return model


@pytest.mark.parametrize("lengths", [[2, 9, 3, 12], [12, 3, 9, 2], [1, 1, 1, 9], [5, 5, 5, 5], [9, 1], [4]])
@pytest.mark.parametrize("asked", [{}, {"return_timestamps": True}])
def test_recordings_that_have_ended_leave(
    lengths: list[int], asked: dict[str, Any], whisper: Any, together: Any
) -> None:
    def write() -> tuple[Any, list[int]]:
        with rows_of_steps(whisper) as rows, torch.inference_mode():
            return whisper.generate(
                sounds,
                logits_processor=[_EndsAt(lengths, whisper.generation_config.eos_token_id)],
                num_beams=1,
                force_unique_generate_call=True,
                **asked,
            ), rows

    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), whisper.config.num_mel_bins, 2 * whisper.config.max_source_positions)
    sounds = torch.randn(shape, generator=generator)
    mine, rows = write()
    together()
    wanted, all_rows = write()
    assert mine.tolist() == wanted.tolist()
    assert len(rows) == len(all_rows)
    if len(set(lengths)) > 1:
        assert rows[-1] < rows[0] == len(lengths)


@pytest.mark.parametrize("asked", [{"num_beams": 3}, {"return_dict_in_generate": True, "output_scores": True}])
def test_beams_and_calls_that_return_more_than_tokens_keep_their_rows(asked: dict[str, Any], whisper: Any) -> None:
    sounds = torch.randn(3, whisper.config.num_mel_bins, 2 * whisper.config.max_source_positions)
    ends = [] if "num_beams" in asked else [_EndsAt([2, 9, 3], whisper.generation_config.eos_token_id)]
    with rows_of_steps(whisper) as rows, torch.inference_mode():
        whisper.generate(sounds, logits_processor=ends, max_new_tokens=12, force_unique_generate_call=True, **asked)
    assert set(rows[1:]) == {3 * asked.get("num_beams", 1)}


@pytest.mark.parametrize("task", REWRITING)
@pytest.mark.parametrize("how", [{}, {"do_sample": True, "temperature": 1.3}])
def test_texts_that_have_ended_leave(task: str, how: dict[str, Any], together: Any) -> None:
    adapter = TextRewriter(load(task))
    bounds = [3, 14, 5, 9]
    units = [
        unit
        for index, bound in enumerate(bounds)
        for unit in example_units(
            adapter, TASKS[task], {"num_beams": 1, "max_new_tokens": bound, "seed": index, **how}, 6 + 3 * index
        )
    ]

    def write() -> tuple[Any, list[int]]:
        with rows_of_steps(adapter.pipe.model) as rows:
            return adapter.run(adapter.collate(units), units, UNOBSERVED), rows

    mine, rows = write()
    together()
    wanted, all_rows = write()
    assert mine == wanted
    assert sum(rows) < sum(all_rows)


def test_batches_of_two_threads_go_through_one_model() -> None:
    adapter = TextRewriter(load(REWRITING[0]))

    def units(first: int) -> list[Any]:
        asked = [{"num_beams": 1, "max_new_tokens": first + 5 * index, "seed": 1} for index in range(4)]
        return [unit for one in asked for unit in example_units(adapter, TASKS[REWRITING[0]], one, 9 + first)]

    batches = [units(first) for first in (3, 4, 6, 7)]
    wanted = [adapter.run(adapter.collate(batch), batch, UNOBSERVED) for batch in batches]
    with ThreadPoolExecutor(len(batches)) as threads:
        found = list(threads.map(lambda batch: adapter.run(adapter.collate(batch), batch, UNOBSERVED), batches))
    assert found == wanted
