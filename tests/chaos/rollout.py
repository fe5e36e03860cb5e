"""A new model on a pool that works: both revisions serve side by side, and nothing fails, is lost or is done twice."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipefleet.cli import main as command
from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, Priority
from pipefleet.fleet.revisions import waiting
from pipefleet.fleet.routing import revision_queue
from pipefleet.queues.revision_notes import queues_of
from pipefleet.runs.run import Run
from pipefleet.settings import load_settings
from tests.chaos.checks import check_quiet, check_run, start_run, texts
from tests.chaos.saboteur import TASK
from tests.chaos.scenario import Finding, Scale, scenario
from tests.chaos.world import POOL, QUEUE, Worker, World, until
from tests.checkpoints import cached

PATIENCE = 120.0


def write_fleet(path: Path, model: str, previous: str | None = None) -> None:
    """A fleet of one pool that serves `model`, and leaves `previous`. Written beside it and renamed, as a mount is."""
    table = f'[pools.{POOL}]\ntask = "{TASK}"\nmodel = {json.dumps(model)}\n'
    if previous is not None:
        table += f"previous = {{ model = {json.dumps(previous)} }}\n"
    beside = path.with_suffix(".new")
    beside.write_text(table)
    beside.replace(path)


@contextlib.contextmanager
def two_models(world: World) -> Iterator[tuple[str, str]]:
    """The world's model and a copy of it under another name; the fleet file is as before afterwards."""
    old, new = str(cached(TASK)), str(world.folder / "new-model")
    shutil.copytree(old, new, dirs_exist_ok=True)
    try:
        yield old, new
    finally:
        write_fleet(world.folder / "fleet.toml", old)


class Traffic:
    """Single jobs and runs that are started one after the other until it is told to stop, by one client."""

    def __init__(self, client: Client, name: str) -> None:
        self.client = client
        self.name = name
        self.jobs: list[Any] = []
        self.runs: list[tuple[Run, list[str]]] = []
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        try:
            while not self._stop.wait(0.05):
                count = len(self.jobs)
                self.jobs.append(self.client.submit(TASK, f"{self.name} {count}"))
                if count % 40 == 0:
                    rows = texts(60, f"{self.name} run {count}")
                    self.runs.append((start_run(self.client, rows, shard_size=10), rows))
        except BaseException as error:  # noqa: BLE001 - shown by `end`
            self.errors.append(error)

    def end(self) -> None:
        """Stop, and check that every job and every item succeeded, once, on the model that it was pinned to."""
        self._stop.set()
        self._thread.join(60)
        assert not self.errors, self.errors
        for job in self.jobs:
            assert job.result(timeout=PATIENCE)
        for run, rows in self.runs:
            run.wait(timeout=PATIENCE)
            check_run(self.client, run, rows)
            models = {row["provenance"]["model"] for row in run.results()}
            assert models == {run.plan.model}, f"planned for {run.plan.model}, done by {models}"


def served(world: World, model: str) -> int:
    """How many single jobs and shards a run of which is pinned to `model` wait, or are with its workers."""
    return waiting(world.redis, revision_queue(QUEUE, model, None))


def queues() -> list[dict[str, Any]]:
    """What `pipefleet queues --json` says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert command(["queues", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(said.getvalue())
    return rows


def retire(world: World, workers: list[Worker], model: str) -> None:
    """End the workers of a revision once nothing is left for it."""
    until(lambda: not served(world, model), PATIENCE, what=f"{model} is drained")
    for worker in workers:
        worker.supervised = False
        worker.send(signal.SIGTERM)
    until(lambda: not any(worker.pid for worker in workers), PATIENCE, what="the old workers have ended")
    world.workers = [worker for worker in world.workers if worker not in workers]


@scenario("roll-out")
def roll_out(world: World, scale: Scale) -> Finding:
    """A new model and back again under load, by a client with the fleet file and one without: each job on one of the two."""
    fleet = world.folder / "fleet.toml"
    bare = load_settings().model_copy(update={"fleet": None})
    with two_models(world) as (old, new), world.scene(workers=1) as client, Client(bare) as unaware:
        traffic = [Traffic(client, "with a file"), Traffic(unaware, "by announcements")]
        models = {one.name: set[str]() for one in traffic}

        def every_new_run_is_on(model: str) -> bool:
            for one in traffic:
                models[one.name] |= {run.plan.model for run, _ in one.runs}
            return all(one.runs and one.runs[-1][0].plan.model == model for one in traffic)

        until(lambda: every_new_run_is_on(old), PATIENCE, what="runs on the old model")
        for before, after in ((old, new), (new, old)):
            leaving = list(world.workers)
            write_fleet(fleet, after, previous=before)
            world.add_worker()
            world.wait_ready()
            until(lambda after=after: every_new_run_is_on(after), PATIENCE, what=f"new runs go to {after}")
            retire(world, leaving, before)
        for one in traffic:
            one.end()
        assert all(found == {old, new} for found in models.values()), models
        jobs, runs = sum(len(one.jobs) for one in traffic), sum(len(one.runs) for one in traffic)
        ran = world.ran
        assert len(ran) == len(set(ran)) == jobs + 60 * runs, f"{len(ran)} forwards of {jobs + 60 * runs} texts"
        check_quiet(world)
    return Finding(note=f"{jobs} jobs and {runs} runs of 60 items, none failed, none done twice")


@scenario("changed-under-a-run")
def changed_under_a_run(world: World, scale: Scale) -> Finding:
    """Workers start anew with another model in the middle of a run: it waits, `queues` says so, `resume --model` ends it."""
    fleet = world.folder / "fleet.toml"
    with two_models(world) as (old, new), world.scene(workers=1, shards=2, drain_seconds=1) as client:
        rows = texts(200)
        run = start_run(client, [f"SLOW:0.02 {row}" for row in rows], shard_size=10)
        until(lambda: run.progress().succeeded > 20, PATIENCE, what="work has begun")
        run.join_planner()
        write_fleet(fleet, new)
        world.workers[0].send(signal.SIGTERM)  # the same worker comes up again, with what the file says now
        until(lambda: len(world.workers[0].codes) == 1 and world.workers[0].ready, PATIENCE, what="the worker is back")
        with Client() as later:
            assert later.submit(TASK, "a job for the new model").result(timeout=PATIENCE)
            done = run.progress().succeeded
            assert 0 < done < 200, f"{done} of 200 items were done"
            waits = next(row for row in queues() if row["model"] == old)
            assert waits["low"] > 0, waits
            assert waits["workers"] == 0, waits
            assert "--model" in waits["note"], waits
            assert f"resume {run.uri} --model" in (later.run(run.uri).unserved() or "")
            again = later.run(run.uri)
            assert again.resume() == 0, "shards were counted as missing that wait in the old revision's queue"
            moved = again.resume(model=new)
            ended = again.wait(timeout=PATIENCE)
            assert (ended.state, ended.succeeded) == ("succeeded", 200), ended
            check_run(later, again, rows)
            models = {row["provenance"]["model"] for row in again.results()}
            assert models == {old, new}, models
            assert json.loads(later.store.get(f"{run.uri}_run/run.json"))["model"] == old, "run.json was changed"
        check_quiet(world)
    return Finding(note=f"{done} items on the old model, {moved} shards moved to the new one")


@scenario("old-producer")
def old_producer(world: World, scale: Scale) -> Finding:
    """Messages for two models in the pool's own queue, as producers of the release before send them: each reaches its worker."""
    fleet = world.folder / "fleet.toml"
    with two_models(world) as (old, new), world.scene(workers=1) as client:
        write_fleet(fleet, new, previous=old)
        world.add_worker()
        world.wait_ready()
        jobs = []
        for number in range(60):
            model = (old, new, None)[number % 3]
            message = JobMessage(f"job-{number}", TASK, model=model, items=(JobItem("0", f"text {number}"),))
            jobs.append(client.job(message.id))
            client.publish([message], QUEUE, tuple(Priority)[number // 3 % 3])
        for job in jobs:
            assert job.result(timeout=PATIENCE)
        assert len(set(world.ran)) == len(world.ran) == 60
        check_quiet(world)
        assert set(queues_of(world.redis, QUEUE)) >= {revision_queue(QUEUE, one, None) for one in (old, new)}
    return Finding(note="60 jobs in one queue, for two models and for any")
