"""What is said of a worker that takes no jobs since S3 refuses it: by doctor, queues, top, and whoever waits."""

from __future__ import annotations

import json

import pytest
from redis import Redis

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.errors import PipefleetError
from pipefleet.fleet.announcements import announce_worker
from pipefleet.fleet.routing import revision_queue
from pipefleet.waiting.lookout import why_waiting
from pipefleet_workers.fleet.doctor.workers import check_access
from pipefleet_workers.fleet.top.read import read_fleet
from pipefleet_workers.fleet.top.view import plain
from tests.unit.worker.fleet.test_doctor import checks

QUEUE = revision_queue("pipefleet.text-classification", "/models/texts", None)
WHY = "S3 at http://s3 refuses access (InvalidAccessKeyId); check the AWS_* credentials"


def announce(redis: Redis, name: str, barred: str | None = None) -> None:
    facts = {"pool": "texts", "max_cost": 64, "pads": True, "batching": "measured", "queue": QUEUE}
    announce_worker(redis, name, facts | ({"barred": barred} if barred else {}), seconds=60.0)


def test_one_refused_worker_among_others_is_named_everywhere(
    client: Client, redis: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(redis, "texts@good-1")
    assert check_access(client.settings) == "S3 refuses none of 1"
    announce(redis, "texts@bad-1", WHY)
    with pytest.raises(PipefleetError) as caught:
        check_access(client.settings)
    assert str(caught.value) == f"texts@bad-1 takes no jobs: {WHY}"
    assert checks(client)["pool texts"].ok
    assert main(["queues"]) == 0
    assert f"texts: 1 of 2 workers take no jobs: {WHY}" in capsys.readouterr().out
    assert f"texts@bad-1 takes no jobs: {WHY}" in plain(read_fleet(client))
    assert why_waiting(redis, QUEUE) is None


def test_where_no_worker_is_allowed_who_waits_is_told(
    client: Client, redis: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(redis, "texts@bad-1", WHY + "\x1b[2J")
    job = client.submit("text-classification", "a")
    told = why_waiting(redis, QUEUE)
    assert told is not None
    assert told.startswith(f"no worker of {QUEUE} takes jobs: {WHY}")
    assert "\x1b" not in told
    assert main(["queues", "--json"]) == 0
    (row,) = (one for one in json.loads(capsys.readouterr().out) if one["pool"] == "texts")
    assert row["note"].startswith(f"no worker takes jobs: {WHY}")
    job.cancel()


def test_a_bucket_that_is_refused_to_one_worker_is_told_where_people_look(
    client: Client, redis: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(redis, "texts@good-1")
    facts = {"pool": "texts", "queue": QUEUE, "refused": ["inputs", "\x1b[2J"]}
    announce_worker(redis, "texts@bad-1", facts, seconds=60.0)
    assert main(["queues"]) == 0
    told = capsys.readouterr().out
    assert "texts: S3 refuses s3://" in told
    assert "s3://inputs/ to 1 of 2 workers; see what their policies allow" in told
    shown = plain(read_fleet(client))
    assert "texts@bad-1 gives jobs back whose bucket S3 refuses to it: s3://inputs/" in shown
    assert "\x1b" not in told + shown
