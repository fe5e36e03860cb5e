"""Many faults at random over one long run, with single jobs beside it."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable

from pipefleet.errors import ServiceUnavailableError
from pipefleet.jobs.job import Job
from pipefleet.runs.run import Run
from tests.chaos.checks import check_quiet, check_run, check_singles, start_run, texts
from tests.chaos.outages import submitted, wait_patiently
from tests.chaos.proxy import WELL, Mood
from tests.chaos.scenario import Finding, Scale, scenario
from tests.chaos.world import World, until

MOODS = (Mood(status=500), Mood(status=503), Mood(cut=True), Mood(delay=0.2), Mood(status=503, share=0.3))


@scenario("storm")
def storm(world: World, scale: Scale) -> Finding:
    """Kills, SIGTERMs, pauses and restarts of Redis, faults of the object store; every item and job ends once."""
    random_ = random.Random(world.seed)
    with world.scene(workers=2) as client:
        run = start_run(client, rows := [f"SLOW:0.002 {text}" for text in texts(scale.items)])
        jobs: list[Job] = []
        done: Counter[str] = Counter()
        longest = 0.0
        for number in range(scale.faults):
            jobs += [submitted(client, text) for text in texts(10, f"single {number}")]
            name, fault = random_.choice(faults(world, random_))
            fault()
            done[name] += 1
            longest = max(longest, until_work_goes_on(world, run, after=name))
        check_singles(jobs, 180)
        wait_patiently(run, 600)
        check_run(client, run, rows)
        check_quiet(world, seconds=60)
        again = len(world.ran) - len(rows) - len(jobs)
    told = ", ".join(f"{name} {times}" for name, times in sorted(done.items()))
    return Finding(longest, f"the longest until work went on; {told}; {100 * again / len(rows):.1f} % forwarded again")


def until_work_goes_on(world: World, run: Run, *, after: str) -> float:
    """Seconds until more items have been forwarded, or the run is over."""
    before, begin = len(world.ran), time.monotonic()

    def more() -> bool:
        if len(world.ran) > before + 20:
            return True
        try:
            return run.progress().ended
        except ServiceUnavailableError:
            return False

    until(more, 120, what=f"work goes on after {after}")
    return time.monotonic() - begin


def faults(world: World, random_: random.Random) -> list[tuple[str, Callable[[], object]]]:
    """What may happen next."""
    worker = random_.choice(world.workers)
    seconds = random_.uniform(0.5, 4.0)

    def s3() -> None:
        world.proxy.behave(random_.choice(MOODS))
        time.sleep(seconds)
        world.proxy.behave(WELL)

    return [
        ("kill", lambda: worker.send(signal.SIGKILL)),
        ("term", lambda: worker.send(signal.SIGTERM)),
        ("redis paused", lambda: world.pause_redis(seconds)),
        ("redis restarted", lambda: world.restart_redis(away=seconds / 4)),
        ("s3", s3),
    ]
