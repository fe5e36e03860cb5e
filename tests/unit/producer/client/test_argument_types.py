"""Arguments of any type: what is none of ours is refused as a ValueError with a sentence, before anything is queued."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipefleet
from pipefleet.client import Client
from pipefleet.errors import UsageError

TEXTS = "text-classification"
OUT = "s3://pipefleet/tests/argument-types/"

WRONG: list[tuple[Callable[[Client], Any], str]] = [
    (lambda c: c.submit(5, "a"), "a task is named by a text, not by a value of type int"),  # type: ignore[arg-type]
    (lambda c: pipefleet.pipeline(5, client=c), "a task is named by a text"),  # type: ignore[arg-type]
    (lambda c: c.submit(TEXTS, "a", priority=5), "priority must be high, normal or low, not '5'"),  # type: ignore[arg-type]
    (lambda c: c.submit(TEXTS, "a", output=Path("/x")), "output must be a text, not PosixPath"),  # type: ignore[arg-type]
    (lambda c: c.submit(TEXTS, "a", expires=10**400), "expires must be above 0"),
    (lambda c: c.submit(TEXTS, "a", expires=True), "expires must be above 0"),
    (lambda c: c.map(TEXTS, ["a"], output=None), "must be a text, not NoneType"),  # type: ignore[arg-type]
    (lambda c: c.map(TEXTS, ["a"], output=OUT, format=5), "format must be a text, not int"),  # type: ignore[arg-type]
    (lambda c: c.map(TEXTS, ["a"], output=OUT, shard_size="x"), "shard_size must be a whole number"),  # type: ignore[arg-type]
    (lambda c: c.map(TEXTS, ["a"], output=OUT, shard_size=2.5), "shard_size must be a whole number"),  # type: ignore[arg-type]
    (lambda c: c.run(5), "the URI of a run must be a text, not int"),  # type: ignore[arg-type]
    (lambda c: pipefleet.pipeline(TEXTS, client=c, timeout=10**400), "timeout must be a number of seconds"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_a_wrong_type_is_a_value_error_with_a_sentence(
    client: Client, queued: Callable[[str], list[str]], call: Callable[[Client], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(client)
    assert isinstance(caught.value, UsageError)
    assert not client.redis.keys("*text-classification*")


def test_numbers_of_numpy_are_numbers(client: Client) -> None:
    job = client.submit(TEXTS, "a", expires=np.int64(60))  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match="within 0 s"):
        job.result(np.float32(0))  # type: ignore[arg-type]
    run = client.map(TEXTS, ["a"], output=OUT + job.id, shard_size=np.int64(3))  # type: ignore[arg-type]
    run.join_planner()
    with pytest.raises(TimeoutError, match="within 0 s"):
        run.wait(timeout=np.int64(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", ["x", float("nan"), [1]])
def test_a_timeout_that_is_no_number_is_told_as_such(client: Client, timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be a number of seconds or None"):
        client.submit(TEXTS, "a").result(timeout)


def test_what_holds_connections_says_so_when_it_is_pickled(client: Client) -> None:
    pipe = pipefleet.pipeline(TEXTS, client=client)
    for one in (client, pipe, client.job("a")):
        for take in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="make one in each process"):
                take(one)
