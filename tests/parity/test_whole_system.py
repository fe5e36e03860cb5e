"""Every task as its users call it: `pipefleet.pipeline(task)(x)` over Redis and S3 equals what transformers returns for `x`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import pipefleet
from pipefleet.client import Client
from pipefleet.tasks import TASKS
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.stack import Stack
from tests.checkpoints import cached
from tests.parity.cases import CASES, Case
from tests.parity.cases.multimodal import told, whole
from tests.parity.harness import assert_same, load
from tests.parity.in_process_worker import working

CALLS = 3
FIRST_CASES = {case.checkpoint: case for case in reversed(CASES)}
"""The first case of every checkpoint."""


def pool_name(checkpoint: str) -> str:
    return checkpoint.replace(":", "-").replace("_", "-")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis, S3, and a fleet file with a pool for every checkpoint; no workers."""
    folder = tmp_path_factory.mktemp("every-task")
    tables, served = [], set[str]()
    for checkpoint, case in FIRST_CASES.items():
        default = "" if case.task in served else "default = true\n"
        served.add(case.task)
        tables.append(
            f'[pools.{pool_name(checkpoint)}]\ntask = "{case.task}"\nmodel = "{cached(checkpoint)}"\n{default}'
        )
    fleet = folder / "fleet.toml"
    fleet.write_text("\n".join(tables))
    with Stack(folder / "data", fleet=fleet, pools=(), flower=False) as one, in_environment(one.environment()):
        yield one


@pytest.mark.parametrize("case", FIRST_CASES.values(), ids=lambda case: case.checkpoint)
def test_a_call_returns_what_transformers_returns(case: Case, stack: Stack, tmp_path: Path) -> None:
    pipe, calls = load(case.checkpoint), case.calls(tmp_path)[:CALLS]
    wanted = [(whole if case.expected is told else case.expected)(pipe, call) for call in calls]
    with Client() as client:
        pool = client.fleet.pools[pool_name(case.checkpoint)]
        with working(client.fleet, pool, client.settings):
            fleet = pipefleet.pipeline(case.task, model=pool.model, client=client)
            found = [fleet(call.inputs, **call.parameters) for call in calls]
    for index, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert_same(mine, theirs, f"call {index}")


def test_every_task_is_called() -> None:
    assert {case.task for case in FIRST_CASES.values()} == set(TASKS)
