"""The folder of the embedded S3 server may be emptied while the stack is down: the stack comes up again with the new store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipefleet.connection.connect import connect
from pipefleet.fleet.identity import Membership
from pipefleet.settings import load_settings
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.local.stack import Stack


def _prove(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a worker of the stack finds of its store; it raises where that is not the fleet's."""
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    with connect(settings) as redis:
        return Membership(redis, ObjectStore(), settings).prove(works=True)


def test_a_stack_whose_s3_folder_was_emptied_comes_up_with_the_new_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    with Stack(data, flower=False) as stack:
        assert "is the store of this Redis's fleet" in _prove(stack, monkeypatch)
    shutil.rmtree(data / "s3")
    with Stack(data, flower=False) as stack:
        assert "is the store of this Redis's fleet" in _prove(stack, monkeypatch)
