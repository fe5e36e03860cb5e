"""Shards that no worker will run: their run ends without them, says why, and takes them up again."""

from __future__ import annotations

import contextlib
import io
import time

from pipefleet.cli import main as command
from pipefleet.contract.layout import RunLayout
from tests.chaos.checks import check_quiet, check_run, check_singles, start_run, texts
from tests.chaos.saboteur import TASK
from tests.chaos.scenario import Finding, Scale, scenario
from tests.chaos.world import World, until

PATIENCE = 120.0
REFUSED = (1, 3, 4)


@scenario("refused-shards")
def refused_shards(world: World, scale: Scale) -> Finding:
    """Shards whose list of items is away are refused while nobody looks; brought back, one is requeued, the others resumed."""
    with world.scene(workers=0) as client:
        rows = texts(120)
        run = start_run(client, rows, shard_size=20)
        run.join_planner()
        layout, store = RunLayout.at(run.uri), client.store
        kept = {index: store.get(layout.shard(index)) for index in REFUSED}
        for index in REFUSED:
            store.delete(layout.shard(index))
        world.add_worker()
        begin = time.monotonic()
        until(lambda: store.head(layout.success), PATIENCE, what="the run ends without anybody looking")
        ended = run.progress()
        assert (ended.state, ended.refused, ended.failed) == ("partial", 3, 60), ended
        assert ended.refused_reason, ended
        places = {place for index in REFUSED for place in range(20 * index, 20 * index + 20)}
        check_run(client, run, rows, dict.fromkeys(places, "refused"))
        check_quiet(world, dead=len(REFUSED))
        seconds = time.monotonic() - begin
        for index, body in kept.items():
            store.put(layout.shard(index), body)
        with contextlib.redirect_stdout(io.StringIO()):
            assert command(["dead-letters", "--requeue", "--id", f"{run.id}-{REFUSED[0]:05d}"]) == 0
        assert run.wait(timeout=PATIENCE).failed == 40
        assert client.run(run.uri).resume() == 2
        check_singles([client.submit(TASK, text) for text in texts(5, "single")], PATIENCE)
        assert run.wait(timeout=PATIENCE).state == "succeeded"
        check_run(client, run, rows)
        check_quiet(world)
    return Finding(note=f"ended {seconds:.1f} s after a worker came, of which it took most to start")
