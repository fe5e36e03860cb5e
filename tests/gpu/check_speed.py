"""What makes a fast device faster, proved on this device: pictures preprocessed there, compiled models, the warm-up."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image

from pipefleet.fleet.pools import Pool
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.vision.on_device import SERVED, on_device
from pipefleet_workers.models.compiled import compile_forward
from pipefleet_workers.models.warmup import warm_up
from pipefleet_workers.observe.service_fit import ServiceFit
from tests.checkpoints import CHECKPOINTS, cached
from tests.gpu.engines import engine, load, outputs, tolerance
from tests.gpu.plan import Check, Order, Skip
from tests.gpu.same import differences
from tests.parity.harness import Call

PICTURES = ("image-classification", "image-feature-extraction")
COMPILED = "text-classification"
WARMED = ("text-classification", "image-classification", "automatic-speech-recognition:whisper", "text-generation")
SIZES = ((640, 480), (480, 640), (1000, 333), (224, 224), (97, 61), (1280, 720))


def _pictures(task: str, order: Order) -> str:
    """JPEGs of many sizes: the same results as with the host's image processor, and the device did the work."""
    pipe = load(task, order.device)
    pictures = [_jpeg(size, seed) for seed, size in enumerate(SIZES)]
    wanted = [pipe(picture) for picture in pictures]
    adapter = on_device(RUNTIME[task].adapter(pipe))
    if type(adapter) in SERVED:
        raise AssertionError("the proof failed: pictures stay on the host; the log says why")
    with engine(pipe, task, adapter=lambda _: adapter, held=True) as running:
        found = outputs(running.together([Call(picture) for picture in pictures]))
        largest = max(len(batch.units) for batch in running.adapter.batches)
    if apart := differences(found, wanted, tolerance(order.device)):
        raise AssertionError(apart[0])
    return f"proved on {order.device}; {len(pictures)} sizes, {largest} in a batch, equal to the host's"


def _jpeg(size: tuple[int, int], seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).save(buffer, format="JPEG", quality=90)
    return Image.open(buffer).convert("RGB")


def _compiled(order: Order) -> str:
    """A pool with `compile = true`: the proof holds, results are those of the uncompiled model, nothing compiles later."""
    if shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("g++") is None:
        raise Skip("torch.compile needs a C compiler, and this machine has none")
    row, pipe = CHECKPOINTS[COMPILED], load(COMPILED, order.device)
    inputs = row.inputs(order.folder)
    wanted = [pipe(one, **row.parameters) for one in inputs]
    adapter = RUNTIME[COMPILED].adapter(pipe)
    pool = Pool("gpu", COMPILED, str(cached(COMPILED)), device=order.device, compile=True)
    if not compile_forward(adapter, pool, {}, max_cost=64, seconds=100.0):
        raise AssertionError("the model was not compiled; the log says why")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with engine(pipe, COMPILED, adapter=lambda _: adapter, held=True) as running:
        found = outputs(running.together([Call(one, row.parameters) for one in inputs]))
    if apart := differences(found, wanted, tolerance(order.device)):
        raise AssertionError(apart[0])
    after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if after != before:
        raise AssertionError(f"{after - before} graphs were compiled while jobs ran")
    return f"{before} graphs compiled before the first job, none after; results equal"


def _warmed(order: Order) -> str:
    """The worker's own warm-up on the device: padding is exact there too, and a budget is found."""
    said = []
    for checkpoint in WARMED[:1] if order.quick else WARMED:
        task = checkpoint.partition(":")[0]
        row, adapter = RUNTIME[task], RUNTIME[task].adapter(load(checkpoint, order.device))
        default = row.sizing.gpu_cost if order.on_gpu else row.sizing.cpu_cost
        pads = adapter.pads
        found = warm_up(adapter, task_spec(task), dict(row.example_parameters), ServiceFit(), default)
        if pads and not found.pads:
            raise AssertionError(f"{task}: padding differs by {found.difference:.1e}, above {found.tolerance:.0e}")
        said.append(f"{task} up to {found.max_cost:,}")
    return ", ".join(said)


def checks() -> Iterator[Check]:
    """All checks of this module."""
    for task in PICTURES:
        yield Check(
            f"pictures on the device: {task}", "check", partial(_pictures, task), 60.0, quick=task == PICTURES[0]
        )
    yield Check("compile = true", "check", _compiled, 150.0)
    yield Check("warm-up", "check", _warmed, 60.0, quick=True)
