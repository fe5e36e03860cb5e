"""A worker that S3 refuses gives its jobs back and takes none until it is allowed again; a refused object is its job's fault."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pipefleet.client import Client
from pipefleet.contract.messages import JobMessage, JobState
from pipefleet.errors import AccessDeniedError, ObjectRefusedError, PipefleetError, ServiceUnavailableError
from pipefleet.fleet.announcements import MOST_PLACES, announce_worker
from pipefleet.storage.store import renewals
from pipefleet_workers.consume.health import Health
from pipefleet_workers.consume.places import ASK_SECONDS, NOTED_SECONDS, PASS_ON_SECONDS, Others, Places
from pipefleet_workers.delivery.leases import GivenBack
from pipefleet_workers.ending import Ending
from pipefleet_workers.fleet.doctor.workers import check_access
from pipefleet_workers.storage.store import BarredError, RefusedHereError
from tests.unit.conftest import eventually
from tests.unit.worker.consume.fakes import BARRED, Bench, FakeDelivery, FakeShards, shard, single

DENIED = AccessDeniedError("S3 refuses access to this object")
DONE = Ending(JobState.SUCCEEDED, "done")


def raising(error: Exception) -> FakeShards:
    def run(message: JobMessage) -> Ending:
        raise error

    return FakeShards(run)


class Access:
    """The access of one worker: `error` is what its probe meets."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked = 0
        self.look = threading.Semaphore(0)
        self.on_probe: Callable[[], None] = lambda: None
        self.health = Health(self._probe, sleep=lambda _: self.look.acquire(timeout=20))
        self.told: list[str | None] = []
        self.health.watchers.append(self.told.append)

    def _probe(self) -> None:
        self.asked += 1
        self.on_probe()
        if self.error is not None:
            raise self.error


def test_a_refusal_where_the_worker_is_allowed_is_the_objects_own() -> None:
    access = Access()
    access.health.accuse(DENIED, renewals())
    assert (access.health.barred, access.asked, access.told) == (None, 1, [])


def test_a_refusal_where_the_probe_is_refused_is_the_workers() -> None:
    access = Access(BARRED)
    with pytest.raises(BarredError, match="InvalidAccessKeyId"):
        access.health.accuse(DENIED, renewals())
    assert access.told == [str(BARRED)]
    asked = access.asked
    with pytest.raises(BarredError):
        access.health.accuse(DENIED, renewals())
    assert access.asked == asked, "what is known is not asked again for each object"


def test_a_refusal_while_a_service_is_away_is_nobodys() -> None:
    access = Access(ServiceUnavailableError("S3 does not answer"))
    with pytest.raises(ServiceUnavailableError) as caught:
        access.health.accuse(DENIED, renewals())
    assert not isinstance(caught.value, BarredError)
    assert access.health.barred is None


def test_credentials_that_were_replaced_are_tried_before_anybody_is_blamed() -> None:
    access, seen = Access(BARRED), renewals()

    def replaced() -> None:
        if renewals() > seen:
            access.error = None

    access.on_probe = replaced
    with pytest.raises(ServiceUnavailableError) as caught:
        access.health.accuse(DENIED, seen)
    assert not isinstance(caught.value, BarredError), "the next try has the new ones"
    assert (access.health.well, access.told) == (True, [])
    access.health.accuse(DENIED, renewals())


def test_a_worker_takes_again_by_itself_when_it_is_allowed() -> None:
    access = Access(BARRED)
    assert not access.health.check()
    assert not access.health.wait(), "nobody waits for it: others may have the jobs"
    access.error = None
    access.look.release()
    assert eventually(lambda: access.health.well)
    assert access.told == [str(BARRED), None]


def test_one_reason_after_another_is_told() -> None:
    access = Access(ServiceUnavailableError("away"))
    access.health.check()
    access.error = BARRED
    access.look.release()
    assert eventually(lambda: access.health.barred == str(BARRED))
    access.error = ServiceUnavailableError("away")
    access.look.release()
    assert eventually(lambda: access.health.barred is None)
    assert not access.health.well


def test_a_refused_worker_gives_back_whatever_it_has() -> None:
    bench = Bench(raising(BarredError("refused")))
    running, later = bench.take(single("running")), bench.take(single("later"), after=60.0)
    bench.engine.work("running")
    bench.is_refused()
    assert bench.take(shard()).wait() == "given back"
    assert not bench.health.check()
    assert (running.wait(), later.wait()) == ("given back", "given back")
    assert bench.take(single("new")).wait() == "given back"
    assert bench.take(single("delayed"), after=60.0).wait() == "given back"
    assert bench.take(shard("run-1"), deliveries=3).wait() == "given back"
    assert "pipefleet_takes_jobs" in {one.name for one in bench.metrics.registry.collect()}
    bench.comes_back()
    assert eventually(lambda: bench.health.well)
    bench.take(single("after"))
    bench.engine.end("after")


@pytest.mark.parametrize("error", [DENIED, BARRED])
def test_a_shard_that_is_refused_by_the_plain_client_too_asks_who_is_to_blame(error: Exception) -> None:
    bench = Bench(raising(error))
    bench.is_refused()
    assert bench.take(shard()).wait() == "given back"
    assert bench.consumer.barred == str(BARRED)


def test_a_job_whose_objects_are_refused_goes_to_other_workers_and_ends_in_the_dead_letters() -> None:
    bench = Bench(raising(DENIED))
    assert bench.take(shard()).wait() == "given back, counted"
    last = FakeDelivery(shard())
    last.lease.retries = 4
    bench.consumer.take(last)
    assert last.wait() == f"refused: refused on 5 tries, at last with: {DENIED}"
    assert bench.consumer.barred is None


def test_what_s3_refuses_for_good_is_not_tried_again() -> None:
    error = ObjectRefusedError("S3 refuses the part (KeyTooLongError): rename it")
    assert Bench(raising(error)).take(shard()).wait() == f"refused: {error}"


def test_a_job_whose_bucket_is_refused_here_alone_goes_to_others_uncounted() -> None:
    asked: list[str] = []
    allowed = [True]

    def others(bucket: str) -> bool:
        asked.append(bucket)
        return allowed[0]

    places = Places(others)
    bench = Bench(raising(DENIED), places=places)
    last = FakeDelivery(shard())
    last.lease.retries = 4
    bench.consumer.take(last)
    assert (last.wait(), last.settlements) == ("given back", [GivenBack(PASS_ON_SECONDS, retry=False)])
    assert (asked, places.told()) == (["bucket"], ["bucket"])
    allowed[0] = False
    assert bench.take(shard()).wait() == "given back, counted"


@pytest.mark.parametrize("kind", ["single", "shard"])
def test_a_job_that_may_not_read_an_input_here_alone_goes_to_others_uncounted(kind: str) -> None:
    error = RefusedHereError("S3 refuses the bucket 'inputs' to this worker, and not to others")
    bench = Bench(raising(error))
    delivery = FakeDelivery(shard() if kind == "shard" else single())
    delivery.retries = 100
    bench.consumer.take(delivery)
    if kind == "single":
        bench.engine.work("job").job.give_back(error)
    assert (delivery.wait(), delivery.settlements) == ("given back", [GivenBack(PASS_ON_SECONDS, retry=False)])


def test_the_others_are_asked_once_for_many_items_of_a_bucket() -> None:
    asked: list[str] = []
    now = [0.0]
    places = Places(lambda bucket: asked.append(bucket) is None and len(asked) == 1, clock=lambda: now[0])
    for _ in range(100):
        with pytest.raises(RefusedHereError):
            places.require("inputs")
    now[0] = ASK_SECONDS
    places.require("inputs")
    assert (asked, places.told()) == (["inputs", "inputs"], ["inputs"])


def test_a_refused_bucket_is_told_for_a_while() -> None:
    now = [0.0]
    places = Places(clock=lambda: now[0])
    for n in range(MOST_PLACES + 5):
        places.refused(single(output=f"s3://b{n:02}/out.json"))
    assert len(places.told()) == MOST_PLACES
    now[0] = NOTED_SECONDS
    assert places.told() == []


def test_others_are_live_workers_of_the_queue_that_were_not_refused_there(client: Client) -> None:
    others = Others(client.settings, "q", "me")
    told = [
        ("me", {"pool": "p", "queue": "q"}),
        ("elsewhere", {"pool": "p", "queue": "r"}),
        ("barred", {"pool": "p", "queue": "q", "barred": "keys"}),
        ("alike", {"pool": "p", "queue": "q", "refused": ["bucket"]}),
    ]
    for name, facts in told:
        announce_worker(client.redis, name, facts, seconds=60.0)
    assert (others("bucket"), others("another")) == (False, True)
    with pytest.raises(PipefleetError, match="alike gives jobs back whose bucket S3 refuses to it: s3://bucket/"):
        check_access(client.settings)
