"""Fixtures of the unit tests: real Redis and S3 without workers, so that a test plays the worker's part itself."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.queues.looking import queued_ids
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.local.stack import Stack

FLEET = """
[pools.texts]
task = "text-classification"
model = "/models/texts"

[pools.speech]
task = "automatic-speech-recognition"
model = "/models/speech"
default = true

[pools.other-speech]
task = "automatic-speech-recognition"
model = "/models/other-speech"

[pools.pictures]
task = "image-classification"
model = "/models/pictures"
"""


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait until `condition` holds; False when it did not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


@pytest.fixture(scope="session")
def bare_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis and S3, nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    fleet = folder / "fleet.toml"
    fleet.write_text(FLEET)
    with Stack(folder / "data", fleet=fleet, pools=(), flower=False) as stack:
        yield stack


@pytest.fixture
def environment(bare_stack: Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The settings of a client of the bare stack, in the environment for one test; the test runs in an empty folder."""
    values = bare_stack.environment()
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return values


@pytest.fixture
def client(environment: dict[str, str]) -> Iterator[Client]:
    """A client of a fleet that is described but has no workers; Redis is empty."""
    with Client() as one:
        one.redis.flushall()
        yield one


@pytest.fixture
def redis(client: Client) -> Redis:
    """The client's connection to Redis."""
    return client.redis


@pytest.fixture
def store(environment: dict[str, str]) -> ObjectStore:
    """Object storage of the bare stack."""
    return ObjectStore()


@pytest.fixture
def prefix() -> str:
    """An empty `s3://` prefix of the test's own, with a slash at its end."""
    return f"s3://pipefleet/tests/{uuid.uuid4().hex}/"


@pytest.fixture
def queued(client: Client) -> Callable[[str], list[str]]:
    """A function that lists the ids of the jobs waiting in a queue, oldest first within a priority."""

    def ids(queue: str) -> list[str]:
        return list(queued_ids(client.redis, queue))[::-1]

    return ids


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of models, the one that this test uses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pipefleet"
