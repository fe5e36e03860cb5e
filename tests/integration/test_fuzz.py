"""The fuzzer with a fixed seed: thousands of hostile messages against one worker process; see `tests.fuzz`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.campaign import BATCH, Campaign, draw, keep
from tests.fuzz.world import World

SEED, BATCHES = 11, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def campaign(folder: Path) -> Iterator[Campaign]:
    """One worker for all batches: it must live through them."""
    with World(folder / "world") as world:
        yield Campaign(world)


@pytest.mark.parametrize("number", range(BATCHES))
def test_a_thousand_hostile_messages_change_nothing(campaign: Campaign, folder: Path, number: int) -> None:
    batch = draw(BATCH, SEED + number)
    report = campaign.play(batch, last=number == BATCHES - 1)
    print(report.line())
    if report.wrong:
        keep(batch, folder / f"batch-{number}.pickle")
        wrong = "\n".join(report.wrong)
        pytest.fail(
            f"{wrong}\n`python -m tests.fuzz --minimise --replay {folder}/batch-{number}.pickle` finds the messages"
        )
