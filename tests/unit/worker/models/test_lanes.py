"""The number of lanes: measured, proved with forwards that run at once, and one where a proof fails."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipefleet.fleet.pools import Pool
from pipefleet.tasks import TASKS
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.build import _asked_lanes
from pipefleet_workers.items import Unit
from pipefleet_workers.models import lanes as module
from pipefleet_workers.models.lanes import Lanes, choose_lanes, enough_for_one, in_lanes, lanes_of
from pipefleet_workers.models.warmup import warm_up
from pipefleet_workers.observe.service_fit import ServiceFit
from pipefleet_workers.process.torch_threads import torch_threads, use_torch_threads
from pipefleet_workers.process.watchdog import listen
from pipefleet_workers.settings import WorkerSettings
from tests.parity.harness import load

TASK = "text-classification"
CPU = torch.device("cpu")
NOT_COMPARED = {"keypoint-matching"}
"""Tasks whose raw outputs are no arrays: nothing can be proved of them."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load(TASK)


def lanes(adapter: Adapter, asked: int, task: str = TASK) -> Lanes:
    return warm_up(adapter, TASKS[task], {}, ServiceFit(), 512, lanes=asked).lanes


def test_a_fixed_number_of_lanes_shares_the_torch_threads(pipe: Any) -> None:
    before = torch_threads()
    found = lanes(TextClassifier(pipe), 3)
    assert (found.count, found.alone) == (3, before)
    assert found.threads == max(1, before // 3)
    assert torch_threads() == before, "the warm-up leaves the number of threads as it was"


@pytest.mark.parametrize(
    ("times", "count"),
    [
        ({1: 1.0, 2: 1.1}, 1),
        ({1: 1.0, 2: 1.0, 4: 1.0}, 2),
        ({1: 1.0, 2: 0.8, 4: 0.5, 8: 0.49}, 4),
    ],
)
def test_lanes_are_doubled_while_that_pays(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, times: dict[int, float], count: int
) -> None:
    monkeypatch.setattr(module, "_seconds", lambda adapter, batch, lanes: (times[lanes.count], 1.0))
    found = chosen(pipe, monkeypatch, threads=8)
    assert (found.count, found.threads, found.alone) == (count, 8 // count, 8)
    assert found.gain == pytest.approx(times[1] / times[count])


@pytest.mark.parametrize(("cores", "count"), [({1: 1.0, 2: 0.9}, 2), ({1: 1.0, 2: 1.1}, 1)])
def test_beside_other_processes_the_time_of_the_cores_decides(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, cores: dict[int, float], count: int
) -> None:
    clock = {1: iter([1.0, 1.5] * 10_000), 2: iter([3.0, 0.5] * 10_000)}
    monkeypatch.setattr(
        module, "_seconds", lambda adapter, batch, lanes: (next(clock[lanes.count]), cores[lanes.count])
    )
    assert chosen(pipe, monkeypatch, threads=2).count == count


def chosen(pipe: Any, monkeypatch: pytest.MonkeyPatch, *, threads: int) -> Lanes:
    """The lanes of a CPU with so many torch threads; what is measured is made up by the caller."""
    monkeypatch.setattr(module, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(module, "torch_threads", lambda: threads)
    monkeypatch.setattr(module, "use_torch_threads", lambda count: None)
    monkeypatch.setattr(module, "_difference", lambda *_: "")
    return choose_lanes(TextClassifier(pipe), [], [], asked=0, tolerance=1e-4)


def test_lanes_are_really_measured(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    seconds = module._seconds

    def noted(adapter: Adapter, batch: Sequence[Unit], lanes: Lanes) -> tuple[float, float]:
        measured.append(lanes.count)
        found = seconds(adapter, batch, lanes)
        assert all(one > 0 for one in found)
        return found

    monkeypatch.setattr(module, "_seconds", noted)
    monkeypatch.setattr(module, "torch_threads", lambda: 2)
    found = warm_up(TextClassifier(pipe), TASKS[TASK], {}, ServiceFit(), 512, lanes=0)
    assert measured[:4] == [1, 2, 1, 2]
    assert found.lanes.count in (1, 2)
    assert "lane" in found.describe()


def test_a_model_whose_rows_mix_between_threads_gets_one_lane(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Mixed(TextClassifier):
        """Keeps its inputs where the next forward overwrites them."""

        inputs: Any = None
        meeting = threading.Barrier(2)

        def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
            self.inputs = inputs
            if threading.current_thread() is not threading.main_thread():
                with contextlib.suppress(threading.BrokenBarrierError):  # the last forward has no other beside it
                    self.meeting.wait(1.0)
            return super().run(self.inputs, units, progress)

    assert lanes(Mixed(pipe), 2).count == 1
    assert "1 lane: " in caplog.text


def test_a_model_that_keeps_data_between_forwards_gets_one_lane(caplog: pytest.LogCaptureFixture) -> None:
    pipe = load(TASK)
    last: dict[str, Any] = {}

    def keep(model: Any, arguments: Any, named: Any) -> None:
        last["length"] = model.cached_length = named["input_ids"].shape[1] * 1000

    handle = pipe.model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        assert lanes(TextClassifier(pipe), 2).count == 1
    finally:
        handle.remove()
    assert "keeps data between forwards, in cached_length" in caplog.text


@pytest.mark.parametrize(
    "task", ["text-generation", "summarization", "text-to-audio", "zero-shot-image-classification", "mask-generation"]
)
def test_tasks_whose_forwards_share_something_get_one_lane(task: str, caplog: pytest.LogCaptureFixture) -> None:
    adapter = RUNTIME[task].adapter(load(task))
    assert not adapter.parallel
    with caplog.at_level(logging.WARNING):
        found = choose_lanes(adapter, [], [], asked=2, tolerance=1e-4)
    assert found.count == 1
    assert "1 lane instead of 2" in caplog.text


@pytest.mark.parametrize("task", sorted(RUNTIME))
def test_every_task_is_proved_in_two_lanes_or_gets_one(task: str) -> None:
    checkpoint = "automatic-speech-recognition:whisper" if task == "automatic-speech-recognition" else task
    row = RUNTIME[task]
    adapter = row.adapter(load(checkpoint))
    found = warm_up(adapter, TASKS[task], dict(row.example_parameters), ServiceFit(), 256, lanes=2).lanes
    assert found.count == (2 if adapter.parallel and task not in NOT_COMPARED else 1)


def test_an_error_in_a_lane_gives_one_lane(pipe: Any) -> None:
    class Picky(TextClassifier):
        def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("only the main thread")
            return super().run(inputs, units, progress)

    assert lanes(Picky(pipe), 2).count == 1


def test_results_of_lanes_come_in_order_and_errors_are_raised() -> None:
    assert in_lanes(CPU, Lanes(3), 20, lambda number: number * 2) == [number * 2 for number in range(20)]
    with pytest.raises(ZeroDivisionError):
        in_lanes(CPU, Lanes(2), 4, lambda number: 1 // number)


def test_one_lane_has_all_threads() -> None:
    assert lanes_of(CPU) == Lanes(1, torch_threads(), torch_threads())
    assert lanes_of(torch.device("cuda", 0), 2) == Lanes(2)


@pytest.mark.parametrize(
    ("seconds", "cost"),
    [
        (lambda count, threads: 1.0, 64),
        (lambda count, threads: count / threads, 0),
        (lambda count, threads: 1.0 + 0.1 * count / threads, 16),
    ],
)
def test_one_torch_thread_is_enough_up_to_the_cost_at_which_more_are_faster(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, int], float], cost: int
) -> None:
    before = torch_threads()
    use_torch_threads(4)
    unit = SimpleNamespace(cost=8)
    try:
        found = enough_for_one(
            lambda batch: seconds(len(batch), torch_threads()) * 1e-6,
            unit,
            seconds=1e-6,
            most=64,  # type: ignore[arg-type]
        )
        assert torch_threads() == 4, "the number of threads stays as it was"
    finally:
        use_torch_threads(before)
    assert found == cost


def test_a_model_whose_forward_takes_long_is_not_run_again_for_its_torch_threads() -> None:
    unit = SimpleNamespace(cost=8)
    assert enough_for_one(lambda batch: pytest.fail("it was run"), unit, seconds=1.0, most=64) == 0  # type: ignore[arg-type]


def test_the_words_for_people() -> None:
    assert Lanes().describe() == "1 lane"
    assert Lanes(one_thread=9).describe() == "1 lane; batches up to a cost of 9 take one torch thread"
    assert Lanes(2, 1, 2, 1.125).describe() == "2 lanes of 1 torch thread (1.12 times one lane)"
    assert Lanes(2, 4, 8).describe() == "2 lanes of 4 torch threads"
    assert Lanes(2, gain=1.5).describe() == "2 lanes (1.50 times one lane)"


@pytest.mark.parametrize(
    ("pool", "simulated", "wanted"),
    [
        (Pool("p", TASK, "m"), "", 3),
        (Pool("p", TASK, "m", compile=True), "", 1),
        (Pool("p", TASK, "m", device_map="auto"), "", 1),
        (Pool("p", TASK, "m"), "0.01,0.001", 1),
    ],
)
def test_some_models_run_one_batch_at_a_time(pool: Pool, simulated: str, wanted: int) -> None:
    assert _asked_lanes(pool, WorkerSettings(lanes=3, simulated_device=simulated)) == wanted


class Hearing:
    """Counts the signs of life of the warm-up, and the forwards between two of them."""

    def __init__(self) -> None:
        self.signs = 0
        self.forwards: list[int] = []
        self._lock = threading.Lock()

    def begin(self, work: Any, others: int = 0) -> None:
        with self._lock:
            self.signs += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        yield

    def forward(self, *_: Any) -> None:
        with self._lock:
            self.forwards.append(self.signs)

    def silence(self, together: int) -> bool:
        """Whether so many forwards began without a sign between them."""
        return any(
            self.forwards[index] == self.forwards[index - together] for index in range(together, len(self.forwards))
        )


def test_a_warm_up_gives_a_sign_of_life_with_every_forward(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures dozens of forwards, which together may take longer than one forward may."""
    monkeypatch.setattr(module, "torch_threads", lambda: 2)
    heard = Hearing()
    hook = pipe.model.register_forward_pre_hook(heard.forward)
    listen(heard)
    try:
        lanes(TextClassifier(pipe), 0)
    finally:
        listen(None)
        hook.remove()
    assert len(heard.forwards) > 20
    assert not heard.silence(2), "two lanes ran, and nobody heard of them"
