"""Several forwards at once on the device, and requests that join and leave a generation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from pipefleet.fleet.pools import Pool
from pipefleet_workers.models.load import load_pipeline
from pipefleet_workers.settings import WorkerSettings
from tests.checkpoints import cached
from tests.gpu.bench_engine import InProcess
from tests.gpu.engines import exact, load, tolerance
from tests.gpu.plan import Check, Order
from tests.gpu.same import differences

LANE_TASKS = ("text-classification", "fill-mask")
ITEMS, QUICK_ITEMS = 400, 60
PROMPTS = ("The quick brown", "Yes", "A cat sleeps on the red couch in Paris.", "one two three four five six seven")


def _lanes(task: str, order: Order) -> str:
    """Two lanes under load: every result is the one that the pipeline gives alone."""
    ending = " [MASK]." if task == "fill-mask" else ""
    texts = [f"text {index} {'word ' * (index % 23)}{ending}" for index in range(QUICK_ITEMS if order.quick else ITEMS)]
    pipe, pool = load(task, order.device), Pool("gpu", task, str(cached(task)), device=order.device)
    wanted = [pipe(text) for text in texts]
    seconds = {}
    for lanes in (1, 2):
        engine = InProcess(pipe, pool, WorkerSettings(lanes=lanes))
        count = engine.found.lanes.count
        if count != lanes:
            raise AssertionError(f"the warm-up gave {count} lanes where {lanes} were asked; the log says why")
        begin = time.perf_counter()
        found = engine.run(texts, [{}] * len(texts))
        seconds[lanes] = time.perf_counter() - begin
        engine.stop()
        if apart := differences(found, wanted, tolerance(order.device)):
            raise AssertionError(f"with {lanes} lanes: {apart[0]}")
    return f"{len(texts)} results right with one lane and with two ({seconds[1] / seconds[2]:.2f} times as fast)"


def _continuous(order: Order) -> str:
    """Requests of unequal lengths, greedy ones and ones with a seed: each answer is the one that it gets alone."""
    exact()
    pool = Pool("gpu", "text-generation", str(cached("text-generation")), device=order.device)
    asked = [_request(index) for index in range(24 if order.quick else 96)]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(asked))]
    engine = InProcess(load_pipeline(pool), pool, WorkerSettings(continuous="on"))
    if not engine.joins:
        raise AssertionError("the model did not pass the proof; the log says why")
    together = engine.run(prompts, asked)
    alone = [engine.run([prompt], [own])[0] for prompt, own in zip(prompts, asked, strict=True)]
    engine.stop()
    if apart := differences(together, alone, tolerance(order.device)):
        raise AssertionError(apart[0])
    return f"{len(asked)} requests together and alone, equal"


def _request(index: int) -> dict[str, Any]:
    chosen: dict[str, Any] = {"do_sample": True, "seed": index} if index % 3 == 0 else {"do_sample": False}
    return {**chosen, "max_new_tokens": 4 + 5 * (index % 9)}


def checks() -> Iterator[Check]:
    """All checks of this module."""
    for task in LANE_TASKS:
        yield Check(f"lanes: {task}", "check", partial(_lanes, task), 60.0, quick=task == LANE_TASKS[0])
    yield Check("continuous batching", "check", _continuous, 90.0, quick=True)
