"""Starting a bulk run: what `Client.map` does after it has checked its arguments."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipefleet.contract.layout import RunLayout, RunPlan
from pipefleet.errors import PipefleetError
from pipefleet.inputs.sources import open_source
from pipefleet.runs.planner import Planner, claim_planning, write_plan
from pipefleet.runs.run import Run
from pipefleet.runs.stopped import forget_stopped, note_stopped
from pipefleet.tasks import task_spec

if TYPE_CHECKING:
    from pipefleet.client import Client
    from pipefleet.fleet.pools import Pool


def plan_run(client: Client, layout: RunLayout, plan: RunPlan, source: Any, pool: Pool | None = None) -> Run:
    """Start a run: check the source, write the plan, queue the first shard; the rest goes on in a thread.

    When the first shard fails, nothing stays behind.
    """
    spec = task_spec(plan.task)
    preparer = client.preparer(spec, pool, plan.parameters)
    opened = open_source(source, spec, client.store, preparer, output=layout.uri, strict=plan.strict)
    opened.check()
    client.ping()
    asked = replace(plan, source=opened.describe())
    plan = write_plan(client, layout, asked)
    planner = Planner(client, layout, plan, opened)
    with ExitStack() as alive:
        try:
            alive.enter_context(planner.alive(claimed=claim_planning(client, plan)))
            more = planner.step()
        except BaseException as error:
            if plan.id == asked.id:
                planner.undo()
            elif isinstance(error, PipefleetError) and planner.alone:
                note_stopped(client.store, layout, error, at=client.clock.peek())
            raise
        if plan.id != asked.id:
            forget_stopped(client.store, layout)
        if not more and not planner.continued:
            return Run(client, layout, planner.plan, planner)
        run = Run(client, layout, plan, planner)
        run.start_planning(alive.pop_all())
    return run
