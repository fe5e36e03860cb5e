"""The lines that `pipefleet up` prints when its stack runs."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from pipefleet.fleet.file import parse_fleet
from pipefleet_workers.fleet.local.command import _tell
from pipefleet_workers.fleet.local.stack import Stack


class _Running:
    """A stack whose pools are all ready."""

    flower = scaler_url = None
    silent_pools: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        return {"PIPEFLEET_STORE": "s3://pipefleet/"}


def test_a_pool_with_devices_is_not_said_to_have_one_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = {"task": "text-classification", "model": str(tmp_path)}
    spread = {**pool, "default": True, "devices": ["cpu"], "workers_per_device": 2}
    _tell(cast(Stack, _Running()), parse_fleet({"pools": {"one": pool, "two": spread}}, base=tmp_path), tmp_path)
    assert "# one worker runs for each pool with min = 0 (one);" in capsys.readouterr().out
