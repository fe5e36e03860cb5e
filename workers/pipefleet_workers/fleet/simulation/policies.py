"""The compared ways to scale: each as its makers ship it (by our reading), and ours.

`run` makes one policy for each pool and run, since policies remember earlier ticks. At each tick `SimulatedPool` passes a `View` to
`replicas`, and gets the number of workers. No I/O, no errors.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from pipefleet_workers.fleet.scaling.decide import ScalingLimits, Signal, State, decide
from pipefleet_workers.fleet.simulation.knowledge import TICK_SECONDS
from pipefleet_workers.fleet.simulation.pool import View


@dataclass(slots=True)
class Hpa:
    """Kubernetes' HorizontalPodAutoscaler, which turns a wished number into replicas.

    10 % tolerance, at most doubling (or 4) a tick, down only to the largest wish in `down_window` seconds.
    """

    down_window: float = 300.0
    tolerance: float = 0.1
    _wishes: deque[tuple[float, int]] = field(default_factory=deque)

    def replicas(self, view: View, wish: float) -> int:
        """The number of replicas that the HPA sets when `wish` is asked for."""
        current, wanted = view.replicas, math.ceil(wish - 1e-9)
        if current and wanted and abs(wish / current - 1) <= self.tolerance:
            wanted = current
        self._wishes.append((view.now, wanted))
        while len(self._wishes) > 1 and self._wishes[0][0] <= view.now - self.down_window:
            self._wishes.popleft()
        if wanted > current:
            return min(wanted, current + max(4, current))
        return min(current, max(one for _, one in self._wishes))


@dataclass(slots=True)
class Ours:
    """`decide`, asked directly or through KEDA's metrics-api and the HPA."""

    limits: ScalingLimits
    through_hpa: bool = False
    state: State = field(default_factory=State)
    hpa: Hpa = field(default_factory=lambda: Hpa(down_window=0.0))

    def replicas(self, view: View) -> int:
        """The number of workers that `decide` asks for, passed through the HPA if `through_hpa`."""
        signal = Signal(
            now=view.now, queued=view.queued, leased=view.leased, arrived=view.arrived,
            oldest_age=view.oldest_age, ready=view.ready,
        )  # fmt: skip
        self.state, decision = decide(self.state, signal, limits=self.limits)
        return self.hpa.replicas(view, decision.desired) if self.through_hpa else decision.desired


@dataclass(slots=True)
class ListLength:
    """KEDA's Redis trigger: waiting messages divided by `target`; it does not see the messages that workers hold."""

    target: float
    hpa: Hpa = field(default_factory=Hpa)

    def replicas(self, view: View) -> int:
        """The waiting jobs over the target, passed through the HPA."""
        return self.hpa.replicas(view, view.queued_jobs / self.target)


@dataclass(slots=True)
class BacklogPerInstance:
    """SageMaker's target tracking on the backlog per instance, with readings of a minute.

    It scales out after 3 readings above the target, and in after 15 readings below 90 % of it.
    """

    target: float
    _above: int = 0
    _below: int = 0
    _next: float = 0.0

    def replicas(self, view: View) -> int:
        """The backlog over the target after an alarm; otherwise the present number."""
        if view.now < self._next:
            return view.replicas
        self._next = view.now + 60.0
        wanted = math.ceil((view.queued_jobs + view.leased_jobs) / self.target)
        self._above = self._above + 1 if wanted > view.replicas else 0
        self._below = self._below + 1 if wanted < 0.9 * view.replicas else 0
        if self._above >= 3 or (wanted and not view.replicas):
            return wanted
        return wanted if self._below >= 15 else view.replicas


@dataclass(slots=True)
class OngoingRequests:
    """Ray Serve: queued and running requests over the target per replica, averaged over 30 s; up after 30 s, down after 600 s."""

    target: float = 2.0
    _seen: deque[float] = field(default_factory=lambda: deque(maxlen=round(30 / TICK_SECONDS)))
    _up: float = 0.0
    _down: float = 0.0

    def replicas(self, view: View) -> int:
        """The average of the last half minute over the target, after the delay; otherwise the present number."""
        self._seen.append(view.queued_jobs + view.leased_jobs)
        wanted = math.ceil(sum(self._seen) / len(self._seen) / self.target)
        self._up = self._up + TICK_SECONDS if wanted > view.replicas else 0.0
        self._down = self._down + TICK_SECONDS if wanted < view.replicas else 0.0
        ripe = self._up >= 30 or self._down >= 600 or not view.replicas
        return wanted if ripe else view.replicas
