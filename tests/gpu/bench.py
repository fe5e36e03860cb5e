"""The benchmark: each load's contenders in turns on one loaded model; rates, shares of the raw loop, busy share, agreement.

A row is noted as soon as it is measured. A contender that fails has a row that says so, and the check fails at its end.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from pipefleet.fleet.pools import Pool
from pipefleet_workers.models.load import load_pipeline
from pipefleet_workers.settings import WorkerSettings
from tests.gpu import bench_loops
from tests.gpu.bench_engine import InProcess
from tests.gpu.bench_models import LOADS, SPOKEN_TOKENS, Load, new_tokens
from tests.gpu.busy import busy_share
from tests.gpu.plan import Check, Order, Skip

ROUND_SECONDS = 3.0
"""About as long as a round of the raw loop takes; fewer items where they would take longer."""
PROBE = 0.1
"""Share of the items that sizes of batches are tried out on."""
ROUNDS, REHEARSED_ITEMS, COMPARED = 3, 24, 32
RAW, ENGINE, PIPELINE, VLLM = "raw loop, by hand", "pipefleet, in process", "pipeline(batch_size=64)", "vLLM"
JOINING = "pipefleet, requests join and leave"
SETTINGS = {"window_units": 4096, "in_flight_items": 16_384, "in_flight_bytes": 4 << 30, "finish_threads": 2}
"""For a GPU. A variable PIPEFLEET_WORKER_… goes before them."""

Run = Callable[[], list[Any]]


class Bench:
    """One load on a device."""

    def __init__(self, load: Load, order: Order) -> None:
        self._load, self._order = load, order
        folder = order.folder / "model"
        load.write(folder, order)
        dtype = load.dtype if order.on_gpu else "float32"
        parameters = dict(load.parameters)
        self.pool = Pool(
            "gpu", load.task, str(folder), device=order.device, dtype=dtype, parameters=parameters,
            max_batch_items=load.batch_items if order.on_gpu else 64,
        )  # fmt: skip
        self.pipe = load_pipeline(self.pool)
        self._probed = 0.0
        self._sizing = self._best_size(load.items(self._tried(), order))
        self.items = load.items(self._counted(), order)
        self._own = [self._parameters(index) for index in range(len(self.items))]
        self.wanted = bench_loops.one_by_one(self.pipe, load, self.items[:COMPARED], order)
        self._raw = 0.0
        self.wrong: list[str] = []

    def measure(self) -> str:
        """All rows. Raises AssertionError when a contender's outputs differ or one has failed."""
        contenders: dict[str, Run] = {RAW: self.hand}
        said = f"{len(self.items):,} items"
        for name, further in self._engines().items():
            try:
                engine = InProcess(self.pipe, self.pool, settings(self._load, self._order, **further))
            except Exception as error:  # noqa: BLE001 - the other contenders go on
                self._failed(name, error)
                continue
            if name == JOINING and not engine.joins:
                self._failed(name, RuntimeError("the model did not pass the proof; the log says why"))
                continue
            said += f"; {engine.found.describe()}"
            contenders[name] = partial(engine.run, self.items, self._own)
        self._in_turns({**contenders, PIPELINE: self._pipeline})
        self._vllm()
        if self.wrong:
            raise AssertionError("; ".join(self.wrong))
        return said

    def _engines(self) -> dict[str, dict[str, Any]]:
        """pipefleet's rows, and the settings that each has of its own."""
        if self._load.task == "text-generation":
            return {ENGINE: {"continuous": "off"}, JOINING: {"continuous": "on"}}
        return {ENGINE: {}}

    def workload(self) -> Any:
        """The items as a workload of the system's benchmark, with names that sort like the items."""
        from tests.benchmarks.workloads import Workload

        suffix = {"image-classification": ".jpg", "automatic-speech-recognition": ".wav"}.get(self._load.task, "")
        items = {f"{index:06d}{suffix}": one for index, one in enumerate(self.items)}
        name = self._load.name.partition(",")[0]
        return Workload(name, self._load.task, self.pool.model, items, dict(self._load.parameters))

    def _in_turns(self, contenders: dict[str, Run]) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        outputs: dict[str, list[Any]] = {}
        for round in range(ROUNDS if self._order.on_gpu else 1):
            for name, run in contenders.items():
                if name == PIPELINE and round:
                    continue  # several times slower than the others, so once must do
                try:
                    begin = time.perf_counter()
                    outputs[name] = run()
                    seconds[name].append(time.perf_counter() - begin)
                except Exception as error:  # noqa: BLE001 - the other contenders go on
                    self._failed(name, error)
                    seconds[name] = []
        for name, run in contenders.items():
            if seconds[name]:
                again = run if name != PIPELINE else None
                self._row(name, statistics.median(seconds[name]), outputs[name], again)

    def _row(self, name: str, seconds: float, outputs: Sequence[Any], again: Run | None) -> None:
        rate = len(outputs) / seconds
        self._raw = rate if name == RAW else self._raw
        figures: dict[str, Any] = {"items": len(outputs), "per_second": rate}
        if written := sum(self._tokens(index) for index in range(len(outputs))):
            figures["tokens_per_second"] = written / seconds
        figures["of_raw"] = rate / self._raw if self._raw else None
        note = f"batches of {self._sizing}" if name == RAW else ""
        if again is not None:
            try:
                figures["busy"] = busy_share(self.pipe.model, self._order.device, again)
            except Exception as error:  # noqa: BLE001 - a profiler that fails takes no rate away
                note += f"; its busy share was not measured ({type(error).__name__}: {str(error)[:100]})"
        if self._order.on_gpu:
            figures["peak_gib"] = torch.cuda.max_memory_allocated(self._order.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self._order.device)
        figures["agreement"] = agreement(outputs, self.wanted)
        if figures["agreement"] < self._load.least_agreement:
            self.wrong.append(f"{name} agrees in {figures['agreement']:.1%} only")
        self._order.note(name, **figures, **({"note": note} if note else {}))

    def _failed(self, name: str, error: Exception) -> None:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        self._order.note(name, note=f"failed: {said}")
        self.wrong.append(f"{name} failed: {said}")

    def hand(self) -> list[Any]:
        """The outputs of the raw loop."""
        return bench_loops.raw(self.pipe, self._load, self.items, self._order, self._sizing)

    def _pipeline(self) -> list[Any]:
        share = self.items[: max(COMPARED, len(self.items) // 4)]
        return bench_loops.by_pipeline(self.pipe, self._load, share, self._order)

    def _vllm(self) -> None:
        """With the model's memory given back first: vLLM takes its own."""
        if self._load.task != "text-generation":
            return
        try:
            run = bench_loops.by_vllm(self._order.folder / "model", self._load, self.items, self._order)
            run()
            begin = time.perf_counter()
            outputs = run()
            self._row(VLLM, time.perf_counter() - begin, outputs, None)
        except Skip as reason:
            self._order.note(VLLM, note=str(reason))

    def _best_size(self, items: Sequence[Any]) -> int:
        """The size of a batch with which the raw loop is fastest. Sizes that take all of the memory are left out."""
        found: dict[float, int] = {}
        for size in bench_loops.sizes(self._load, self._order):
            try:
                seconds = min(
                    self._seconds(items, size) for _ in range(2)
                )  # the first run of a size allocates its memory
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            found[seconds] = size
        self._probed = len(items) / min(found)
        return found[min(found)]

    def _seconds(self, items: Sequence[Any], size: int) -> float:
        begin = time.perf_counter()
        bench_loops.raw(self.pipe, self._load, items, self._order, size)
        return time.perf_counter() - begin

    def _tried(self) -> int:
        """The number of items that sizes are tried out on: at least one batch of the largest size."""
        if not self._order.on_gpu:
            return REHEARSED_ITEMS
        largest = 0 if self._load.task == "text-classification" else max(bench_loops.sizes(self._load, self._order))
        return max(largest, int(self._load.most * PROBE))

    def _counted(self) -> int:
        """As many items as a round has time for."""
        if not self._order.on_gpu:
            return REHEARSED_ITEMS
        return max(COMPARED, min(self._load.most, int(self._probed * ROUND_SECONDS)))

    def _parameters(self, index: int) -> dict[str, Any]:
        return {"max_new_tokens": self._tokens(index)} if self._load.task == "text-generation" else {}

    def _tokens(self, index: int) -> int:
        """Tokens that an item's output has; 0 for tasks that write none."""
        if self._load.task == "text-generation":
            return new_tokens(index, self._order)
        return SPOKEN_TOKENS if self._load.task == "automatic-speech-recognition" else 0


def settings(load: Load, order: Order, **further: Any) -> WorkerSettings:
    """A worker's settings for this load: as many threads as the raw loop has, and room for the batches of a GPU."""
    wanted: dict[str, Any] = {"cpu_threads": bench_loops.threads(load), **(SETTINGS if order.on_gpu else {})}
    unset = {name: value for name, value in wanted.items() if f"PIPEFLEET_WORKER_{name.upper()}" not in os.environ}
    return WorkerSettings(**unset, **further)


def agreement(outputs: Sequence[Any], wanted: Sequence[Any]) -> float:
    """How far outputs equal those of the pipeline one by one: the share of equal classes, or of equal beginnings of texts."""
    shares = [_agree(mine, other) for mine, other in zip(outputs, wanted, strict=False)]
    return statistics.fmean(shares) if shares else 0.0


def _agree(mine: Any, other: Any) -> float:
    mine, other = (one[0] if isinstance(one, list) else one for one in (mine, other))
    if "label" in other:
        return float(mine["label"] == other["label"] and abs(mine["score"] - other["score"]) < 0.02)
    name = "text" if "text" in other else "generated_text"
    words, wanted = mine[name].split(), other[name].split()
    same = next((at for at, pair in enumerate(zip(words, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
    return float(words == wanted) if not wanted else min(same, len(words)) / max(len(wanted), len(words))


def _bench(load: Load, order: Order) -> str:
    if order.device == "cpu":
        torch.set_num_threads(1)
    return Bench(load, order).measure()


def checks() -> Iterator[Check]:
    """A check for each load."""
    for load in LOADS:
        yield Check(f"bench {load.name}", "bench", partial(_bench, load), 120.0, alone=True)
