"""The first two steps of `Run.resume`: to become the only client that plans the run, and to open its source once more.

RunError says that another client plans the run, or that the source was an iterable, which ended with its client.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pipefleet.errors import RunError
from pipefleet.inputs.sources import Source, open_source
from pipefleet.runs.planner import claim_planning
from pipefleet.runs.stopped import read_stopped
from pipefleet.runs.wait import POLL_SECONDS
from pipefleet.tasks import task_spec

if TYPE_CHECKING:
    from pipefleet.contract.layout import RunLayout, RunPlan
    from pipefleet.session import Session

TAKE_OVER_SECONDS = 30.0
"""How long `resume` waits for a planner that gives signs of life; one that died gives them for ten seconds more."""


def claim_when_alone(session: Session, plan: RunPlan, uri: str, *, moved: bool) -> bool:
    """Claim the planning of a run; False where another client plans a run that was `moved`.

    Raises RunError where another client plans a run that was not moved.
    """
    deadline = time.monotonic() + TAKE_OVER_SECONDS
    while not claim_planning(session, plan):  # another one may have died a moment ago
        if time.monotonic() >= deadline:
            if moved:
                return False
            raise RunError(
                f"another client plans the run at {uri} and queues again by itself what Redis lost; "
                f"see `pipefleet status {uri}`, or stop that client first"
            )
        time.sleep(POLL_SECONDS)
    return True


def reopened(session: Session, layout: RunLayout, plan: RunPlan) -> Source:
    """The source of a run once more. Raises RunError where it was an iterable, which ended with its client."""
    if plan.source is None:
        reason = read_stopped(session.store, layout)
        raise RunError(
            f"the source of the run at {layout.uri} was an iterable that ended with its client"
            f"{f' ({reason})' if reason else ''}; call map again with the same arguments to go on"
        )
    spec = task_spec(plan.task)
    preparer = session.preparer(spec, parameters=plan.parameters)
    return open_source(plan.source, spec, session.store, preparer, output=layout.uri)
