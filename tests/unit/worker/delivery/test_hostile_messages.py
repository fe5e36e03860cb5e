"""Properties of the functions that see a message first: whatever it is, they refuse it or take it, and nothing else happens."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings

from pipefleet.contract.messages import JobMessage, decode_message
from pipefleet.errors import ContractError
from pipefleet_workers.delivery.envelope import MalformedError
from tests.fuzz.messages import ID, TAG, filled
from tests.fuzz.oracle import job_in
from tests.fuzz.strategies import FAMILIES, Burst, bursts
from tests.fuzz.values import anything

LONGEST = 5.0
"""Seconds in which any message is taken or refused; milliseconds, but for one of megabytes on a busy machine."""
FIXED = settings(
    max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def taken(raw: bytes) -> JobMessage | None:
    """The job of a message; None for one that is refused. Any other error than those two is the test's failure."""
    began = time.monotonic()
    try:
        return job_in(filled(raw, {ID: "fuzz-1", TAG: "tag-1"}))
    except (MalformedError, ContractError):
        return None
    finally:
        assert time.monotonic() - began < LONGEST


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_message_is_refused_or_taken(family: str) -> None:
    found = []

    @FIXED
    @given(bursts([family]))
    def each(drawn: tuple[str, Burst]) -> None:
        found.extend(taken(entry.raw) for entry in drawn[1])

    each()
    if family in ("good", "shards", "tags"):
        assert any(found), "the fuzzer never gets past the first check"


@FIXED
@given(anything())
def test_no_value_is_a_job(value: object) -> None:
    with pytest.raises(ContractError):
        decode_message(value)
