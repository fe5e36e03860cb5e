"""Many faults at random over one long run, with single jobs beside it."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable

from pipefleet.jobs import Job
from tests.chaos.checks import check_quiet, check_run, check_singles, start_run, texts
from tests.chaos.outages import submitted, wait_patiently
from tests.chaos.proxy import WELL, Mood
from tests.chaos.saboteur import TASK
from tests.chaos.scenario import Finding, Scale, scenario
from tests.chaos.world import World, until

MOODS = (Mood(status=500), Mood(status=503), Mood(cut=True), Mood(delay=0.2), Mood(status=503, share=0.3))


@scenario("storm")
def storm(world: World, scale: Scale) -> Finding:
    """Kills, SIGTERMs, pauses and restarts of Redis, faults of the object store; every item and job ends once."""
    random_ = random.Random(world.seed)
    with world.scene(workers=2) as client:
        rows = texts(scale.items)
        run = start_run(client, [f"SLOW:0.002 {text}" for text in rows])
        jobs: list[Job] = []
        done: Counter[str] = Counter()
        longest = 0.0
        for number in range(scale.faults):
            before = len(world.ran)
            jobs += [submitted(client, text) for text in texts(10, f"single {number}")]
            name, fault = random_.choice(faults(world, random_))
            fault()
            done[name] += 1
            begin = time.monotonic()
            until(lambda: len(world.ran) > before + 20 or run_ended(run), 120, what=f"work goes on after {name}")
            longest = max(longest, time.monotonic() - begin)
        check_singles(jobs, 180)
        wait_patiently(run, 600)
        check_run(client, run, rows)
        check_quiet(world, seconds=60)
        again = len(world.ran) - len(rows) - len(jobs)
    told = ", ".join(f"{name} {times}" for name, times in sorted(done.items()))
    return Finding(longest, f"the longest until work went on; {told}; {100 * again / len(rows):.1f} % forwarded again")


def run_ended(run: object) -> bool:
    from pipefleet.errors import ServiceUnavailableError

    try:
        return bool(run.progress().ended)  # type: ignore[attr-defined]
    except ServiceUnavailableError:
        return False


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


_ = TASK
