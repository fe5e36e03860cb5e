"""The start of a bulk run. `Client.map` calls `plan_run` with checked arguments and gets a `Run`.

The source is checked, the plan written and the first shard queued; the rest is planned in a thread. Errors of the source, of Redis
and of S3 are raised, and a new run leaves nothing behind then.
"""

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
    from pipefleet.fleet.pools import Pool
    from pipefleet.session import Session


def plan_run(session: Session, layout: RunLayout, plan: RunPlan, source: Any, pool: Pool | None = None) -> Run:
    """Start a run: check the source, write the plan, queue the first shard, and plan the rest in a thread.

    When the first shard of a new run fails, nothing stays behind.
    """
    spec = task_spec(plan.task)
    preparer = session.preparer(spec, pool, plan.parameters)
    opened = open_source(source, spec, session.store, preparer, output=layout.uri, strict=plan.strict)
    opened.check()
    session.ping()
    asked = replace(plan, source=opened.describe())
    plan = write_plan(session, layout, asked)
    planner = Planner(session, layout, plan, opened)
    with ExitStack() as alive:
        try:
            alive.enter_context(planner.alive(claimed=claim_planning(session, plan)))
            more = planner.step()
        except BaseException as error:
            if plan.id == asked.id:
                planner.undo()
            elif isinstance(error, PipefleetError) and planner.alone:
                note_stopped(session.store, layout, error, at=session.clock.peek())
            raise
        if plan.id != asked.id:
            forget_stopped(session.store, layout)
        if not more and not planner.continued:
            return Run(session, layout, planner.plan, planner)
        run = Run(session, layout, plan, planner)
        run.start_planning(alive.pop_all())
    return run
