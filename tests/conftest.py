"""Shared fixtures: one real stack (Redis, S3, workers with tiny models) for the whole session, and a bucket for each test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from pipefleet.client import Client
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.stack import Stack
from tests.checkpoints import cached

# A change is judged by the same examples each time; on a laptop every run looks at new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between processes as UTF-8, and hostile texts that tests log are none."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _fair_scheduling() -> Iterator[None]:
    """A test leaves the scheduling of its process alone: as a real-time process it would starve every worker.

    SVT-AV1, an encoder in PyAV, makes a process of root real-time (SCHED_FIFO), with all that this process starts later.
    """
    yield
    if hasattr(os, "sched_getscheduler") and (policy := os.sched_getscheduler(0)) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # the next tests are not to blame
        pytest.fail(f"the test changed the scheduling policy of its process to {policy}")


POOLS = {
    "embed": (
        "feature-extraction",
        "feature-extraction",
        "parameters = { truncation = true }\nworkers = { min = 2, max = 2 }",
    ),
    "classify": ("text-classification", "text-classification", ""),
    "speech": (
        "automatic-speech-recognition",
        "automatic-speech-recognition:whisper",
        # A random model never ends by itself; five beams of 256 tokens would be most of the suite's time.
        "default = true\nparameters = { generate_kwargs = { num_beams = 1, max_new_tokens = 12 } }",
    ),
    "ctc": ("automatic-speech-recognition", "automatic-speech-recognition", ""),
    "pictures": ("image-classification", "image-classification", ""),
}
"""pool: task, checkpoint, further lines of its table."""


@dataclass(frozen=True)
class Servers:
    """The running stack, and what a client needs to reach it."""

    stack: Stack
    fleet: Path
    environment: dict[str, str]


def write_fleet(path: Path, pools: dict[str, tuple[str, str, str]] = POOLS) -> Path:
    """A fleet file whose pools serve tiny checkpoints."""
    tables = [
        f'[pools.{name}]\ntask = "{task}"\nmodel = "{cached(checkpoint)}"\n{extra}\n'
        for name, (task, checkpoint, extra) in pools.items()
    ]
    path.write_text("\n".join(tables))
    return path


def pool_names(pools: dict[str, tuple[str, str, str]] = POOLS) -> list[str]:
    """One entry for each worker to start."""
    return [name for name, (_, _, extra) in pools.items() for _ in range(2 if "min = 2" in extra else 1)]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The session's stack with a worker for each pool; its settings are in this process's environment."""
    folder = tmp_path_factory.mktemp("stack")
    fleet = write_fleet(folder / "fleet.toml")
    with Stack(folder / "data", fleet=fleet, pools=pool_names(), flower=True) as stack:
        environment = stack.environment()
        with in_environment(environment):
            yield Servers(stack, fleet, environment)


@pytest.fixture
def client(servers: Servers) -> Iterator[Client]:
    """A client of the session's stack."""
    with Client() as one:
        yield one


@pytest.fixture
def store(servers: Servers) -> ObjectStore:
    """Object storage of the session's stack."""
    return ObjectStore()


@pytest.fixture
def prefix(store: ObjectStore) -> str:
    """An empty `s3://` prefix of the test's own, with a slash at its end."""
    return f"s3://pipefleet/tests/{uuid.uuid4().hex}/"
