"""Services that go away, are slow, lie, or lose everything."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from pipefleet.client import Client
from pipefleet.errors import JobError, PipefleetError, ServiceUnavailableError
from pipefleet.jobs.job import Job
from pipefleet.queues.keys import ledger_keys
from pipefleet.runs.run import Run
from pipefleet_workers.fleet.doctor.workers import check_access
from tests.chaos.checks import check_quiet, check_run, check_singles, start_run, texts
from tests.chaos.proxy import WELL, Mood, Proxy
from tests.chaos.saboteur import TASK
from tests.chaos.scenario import Finding, Scale, scenario
from tests.chaos.world import Worker, World, until

PATIENCE = 150.0


def through(world: World, scale: Scale, fault: Callable[[], object], **settings: Any) -> Finding:
    """Bulk and single work goes on through a fault, which returns when it is over."""
    with world.scene(workers=2, **settings) as client:
        for index in range(8):
            client.store.put(f"s3://pipefleet/chaos/in/{index}.txt", f"object {index}".encode())
        rows = [
            f"s3://pipefleet/chaos/in/{n % 8}.txt" if n % 5 == 0 else f"SLOW:0.01 {n}" for n in range(scale.jobs * 3)
        ]
        run = start_run(client, rows, shard_size=20)
        jobs = [client.submit(TASK, text) for text in texts(50, "single")]
        until(lambda: len(world.ran) > 30, what="work has begun")
        fault()
        over = time.monotonic()
        jobs += [submitted(client, text) for text in texts(20, "later")]
        check_singles(jobs, PATIENCE)
        wait_patiently(run)
        recovery = time.monotonic() - over
        check_run(client, run, rows)
        check_quiet(world)
        restarts = sum(len(worker.codes) for worker in world.workers)
    return Finding(recovery, f"after the fault{f'; {restarts} workers started again' if restarts else ''}")


def submitted(client: Client, text: str) -> Job:
    """Submit, trying again while Redis is away; the key makes sure that it is one job."""
    key, jobs = f"chaos {text} {time.time_ns()}", list[Job]()

    def tried() -> bool:
        try:
            jobs.append(client.submit(TASK, text, idempotency_key=key))
        except ServiceUnavailableError:
            return False
        return True

    until(tried, PATIENCE, what="a job is submitted")
    return jobs[0]


def wait_patiently(run: Run, seconds: float = PATIENCE) -> None:
    """Wait for a run, whatever goes away meanwhile."""

    def ended() -> bool:
        try:
            return run.progress().ended
        except ServiceUnavailableError:
            return False

    until(ended, seconds, what="the run ends")


@scenario("redis-restarted")
def redis_restarted(world: World, scale: Scale) -> Finding:
    """Redis is killed and starts again with its data."""
    return through(world, scale, lambda: world.restart_redis(away=2.0))


@scenario("redis-paused")
def redis_paused(world: World, scale: Scale) -> Finding:
    """Redis hangs, for as long as half a lease."""
    return through(world, scale, lambda: world.pause_redis(scale.away))


@scenario("redis-paused-beyond-lease")
def redis_paused_long(world: World, scale: Scale) -> Finding:
    """Redis hangs for longer than a lease: everybody renews before anybody sweeps."""
    return through(world, scale, lambda: world.pause_redis(1.5 * world.lease_seconds))


@scenario("redis-emptied")
def redis_emptied(world: World, scale: Scale) -> Finding:
    """Redis starts again without any data in the middle of a run: `resume` finishes the run from object storage."""
    with world.scene(workers=2) as client:
        rows = [f"SLOW:0.01 {n}" for n in range(scale.jobs * 4)]
        run = start_run(client, rows, shard_size=20)
        jobs = [client.submit(TASK, f"SLOW:0.05 {text}") for text in texts(50, "single")]
        until(lambda: len(world.ran) > 200, what="work has begun")
        world.restart_redis(keep=False)
        began = time.monotonic()
        run.join_planner()
        again = client.run(run.uri)
        again.resume()
        wait_patiently(again)
        recovery = time.monotonic() - began
        check_run(client, again, rows)
        later = submitted(client, "later")
        check_singles([later], PATIENCE)
        lost = sum(not survived(job) for job in jobs)
        check_quiet(world)
    return Finding(recovery, f"from the restart; {lost} of 50 single jobs were lost, as they are without AOF")


def survived(job: Job) -> bool:
    """Whether a job ended; False where nothing is known of it any more. Never in between for long."""

    def settled() -> str:
        try:
            return "ended" if job.status().final else ""
        except JobError:
            return "unknown"

    return bool(until(settled, 30, what=f"job {job.id} is ended or unknown") == "ended")


@scenario("s3-stopped")
def s3_stopped(world: World, scale: Scale) -> Finding:
    """The object store's process ends and starts again."""
    return through(world, scale, lambda: world.stop_s3(scale.away))


@scenario("s3-paused")
def s3_paused(world: World, scale: Scale) -> Finding:
    """The object store hangs."""
    return through(world, scale, lambda: world.pause_s3(scale.away))


def mooded(name: str, mood: Mood) -> None:
    """Register the scenario of an object store in a mood."""

    @scenario(name)
    def play(world: World, scale: Scale) -> Finding:
        def fault() -> None:
            world.proxy.behave(mood)
            time.sleep(scale.away)
            world.proxy.behave(WELL)

        return through(world, scale, fault)


mooded("s3-slow", Mood(delay=0.5))
mooded("s3-500", Mood(status=500))
mooded("s3-503", Mood(status=503))
mooded("s3-cut", Mood(cut=True))
mooded("s3-stalled", Mood(stall=True))
mooded("s3-flaky", Mood(status=503, share=0.3))


@scenario("s3-away-for-writing")
def s3_away_for_writing(world: World, scale: Scale) -> Finding:
    """The object store goes away while results wait to be written: they are written later, and no item fails."""
    with world.scene(workers=1, retries=2) as client:
        rows = [f"SLOW:0.2 {n}" for n in range(20)]
        run = start_run(client, rows, shard_size=5)
        until(lambda: len(world.ran) >= 3, what="work has begun")
        world.proxy.behave(Mood(status=503))
        timer = threading.Timer(scale.away, lambda: world.proxy.behave(WELL))
        timer.start()
        timer.join()
        back = time.monotonic()
        wait_patiently(run)
        recovery = time.monotonic() - back
        check_run(client, run, rows)
        check_quiet(world)
    return Finding(recovery, "after it was back")


@scenario("refused-worker")
def refused_worker(world: World, scale: Scale) -> Finding:
    """S3 refuses one worker of two in the middle of its work: the other one does it all, until the first is allowed again."""
    proxy = Proxy(int(world.s3_server.endpoint.rsplit(":", 1)[1]))
    with world.scene(workers=1) as client:
        other = world.add_worker(s3=proxy.endpoint)
        world.wait_ready()
        client.store.put("s3://pipefleet/chaos/in/0.txt", b"an object")
        rows = ["s3://pipefleet/chaos/in/0.txt" if n % 5 == 0 else f"SLOW:0.01 {n}" for n in range(scale.jobs * 5)]
        run = start_run(client, rows, shard_size=10)
        until(lambda: len(holders(world)) == 2, what="both workers hold shards")
        proxy.behave(Mood(status=403))
        jobs = [client.submit(TASK, rows[0]) for _ in range(20)]
        began = time.monotonic()
        until(lambda: named(client, other), what="doctor names the refused worker")
        until(lambda: not holders(world) - {holder(world.workers[0])}, what="the refused worker holds nothing")
        gave_back = time.monotonic() - began
        check_singles(jobs, PATIENCE)
        wait_patiently(run)
        check_run(client, run, rows)
        proxy.behave(WELL)
        until(lambda: not named(client, other), what="it takes jobs again by itself")
        world.workers[0].send(signal.SIGSTOP)
        check_singles([client.submit(TASK, rows[0]) for _ in range(20)], PATIENCE)
        world.workers[0].send(signal.SIGCONT)
        check_quiet(world)
        world.proxy.misbehaved = True  # items of the shards that went back were counted as they left the engine
    proxy.close()
    return Finding(gave_back, "until the refused worker held nothing")


def named(client: Client, worker: Worker) -> bool:
    """Whether doctor says of a worker that it takes no jobs."""
    try:
        check_access(client.settings)
    except PipefleetError as error:
        return f"-{worker.pid} takes no jobs: s3://" in str(error)
    return False


def holders(world: World) -> set[str]:
    """The processes that hold messages, as `holder` names them."""
    owners: Any = world.redis.hvals(ledger_keys("pipefleet.text-classification")["owners_key"])
    return {one.decode().split(":")[1] for one in owners}


def holder(worker: Worker) -> str:
    """The name of a worker's process in the owners of messages."""
    return str(worker.pid)
