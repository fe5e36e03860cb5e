"""Decides at start whether a pool of text-generation serves its requests continuously, and proves it for its model.

    paged cache → the same logits as alone? → the same tokens, greedy and drawn? → as fast as batches? → `adapter.continuous`

`build` calls `begin_continuous` after the warm-up. Where a step fails, the worker goes on with ordinary batches, and its log says
why; nothing is raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipefleet.fleet.pools import Pool
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.base import TOLERANCE, Adapter, brief
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.adapters.writing.continuous import DecoderWriter
from pipefleet_workers.adapters.writing.generate import TextGenerator
from pipefleet_workers.adapters.writing.paged import Pages, UnsuitedError
from pipefleet_workers.items import ItemError, Unit
from pipefleet_workers.models.difference import relative
from pipefleet_workers.models.warmup import example_units
from pipefleet_workers.process.memory import available_bytes
from pipefleet_workers.process.watchdog import working_on
from pipefleet_workers.settings import WorkerSettings

log = logging.getLogger(__name__)

TASK = "text-generation"
PAGE = 32
"""Tokens of a page: half of it is empty at the end of each sequence."""
CHUNKS = {"cpu": 256, "cuda": 2048}
"""Tokens that one step reads. Every sequence waits for them, so a long prompt comes in pieces."""
TYPICAL = 512
"""Tokens of a request, prompt and answer; without a setting the cache has room for as many of them as a batch has items."""
GPU_SHARE, CPU_SHARE = 0.5, 0.125
"""Shares of the free memory for the cache. Batches of requests that do not join need memory too."""
SLOWER = 0.9
"""`auto` goes on with batches where steps reach less than this share of their speed."""
SECONDS = 5.0
"""Seconds after which speed is not measured again."""
_SIZES = (5, 23, 61)
_PIECE = 16
"""Tokens of a piece in the proof, so that its prompts come in pieces."""
_TIMED_TOKENS = (32, 4, 20, 8, 28, 12, 16, 24)
"""New tokens of the requests that are timed. Answers differ in length, as in use."""


def begin_continuous(adapter: Adapter, pool: Pool, parameters: Mapping[str, Any], settings: WorkerSettings) -> bool:
    """Give `adapter` a continuous writer if its model passes the proof; whether it has one now."""
    asked = settings.continuous == "on" or (settings.continuous == "auto" and settings.warm_up)
    wanted = asked and not settings.simulated_device
    if not wanted or pool.task != TASK or not isinstance(adapter, TextGenerator) or pool.device_map is not None:
        return False
    working_on(None)
    begin = time.perf_counter()
    try:
        writer = DecoderWriter(adapter, pages_of(adapter, pool, settings))
        refusal = _refusal(adapter, writer, parameters, timed=settings.continuous == "auto")
    except UnsuitedError as error:
        refusal = str(error)
    except Exception as error:
        log.exception("the proof of continuous batches failed to run")
        refusal = brief(error)
    if refusal:
        log.info("requests of text-generation run in batches: %s", refusal)
        return False
    adapter.continuous = writer
    size, seconds = writer.bytes / 2**20, time.perf_counter() - begin
    log.info("requests join and leave at every step, with a cache of %.0f MiB; proved in %.1f s", size, seconds)
    return True


def pages_of(adapter: TextGenerator, pool: Pool, settings: WorkerSettings) -> Pages:
    """The size of the cache: the setting's, or enough for typical requests and for one of the longest, within the free memory.

    Raises UnsuitedError for a model whose shape cannot be read.
    """
    model, device = adapter.pipe.model, adapter.pipe.device
    config = model.config.get_text_config()
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        a_token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    except (AttributeError, TypeError) as error:
        raise UnsuitedError(f"the size of its cache is unknown ({brief(error)})") from None
    longest = min(getattr(config, "max_position_embeddings", None) or settings.max_tokens, settings.max_tokens)
    enough = max(_pages(longest), pool.max_batch_items * _pages(min(longest, TYPICAL)))
    count = (settings.cache_bytes or min(_free_share(device), enough * PAGE * a_token)) // (PAGE * a_token)
    if count < 1:
        raise UnsuitedError("the memory for its cache holds no page")
    return Pages(count, PAGE, CHUNKS.get(device.type, 256), pool.max_batch_items)


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def _free_share(device: torch.device) -> int:
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(CPU_SHARE * (available_bytes() or 0))


def _refusal(adapter: TextGenerator, writer: DecoderWriter, parameters: Mapping[str, Any], *, timed: bool) -> str:
    """Why the writer must not be used; an empty text if it may."""
    tolerance = TOLERANCE.get(adapter.pipe.model.dtype, 1e-4)
    examples = _units(adapter, [({**parameters}, size) for size in _SIZES])
    if len(examples) < 2:
        return "the model has too few positions for a proof"
    if not any(writer.takes(unit.assembly.context) for unit in examples):
        return "the pool's own parameters need batches, or more than all pages"
    difference = _difference(adapter, writer, examples)
    if not difference <= tolerance:
        return f"its logits differ by {difference:.1e} from those of a request alone, above {tolerance:.0e}"
    sampled: list[Mapping[str, Any]] = [
        {"do_sample": False, "max_new_tokens": 6},
        {"do_sample": True, "seed": 7, "top_k": 20, "max_new_tokens": 6},
    ]
    units = _units(adapter, [({**parameters, **own}, size) for size in _SIZES for own in sampled])
    if adapter.pipe.model.dtype == torch.float32 and not _same_tokens(adapter, writer, units):
        return "its tokens differ from those of a request alone"
    working_on(None)
    rate = _relative_speed(adapter, writer, parameters) if timed else 1.0
    if rate < SLOWER:
        return f"steps reach {rate:.0%} of their speed"
    return ""


def _difference(adapter: TextGenerator, writer: DecoderWriter, units: Sequence[Unit]) -> float:
    """The largest relative difference of logits between units together in pages and each alone."""
    together = writer.numbers(units, pieces=_PIECE)
    alone = []
    for unit in units:
        working_on(None)
        alone.append(adapter.numbers([unit])[0])
    return max(relative(mine, other) for mine, other in zip(together, alone, strict=True))


def _same_tokens(adapter: TextGenerator, writer: DecoderWriter, units: Sequence[Unit]) -> bool:
    units = [unit for unit in units if writer.takes(unit.assembly.context)]
    found = outputs_together(writer, units)
    return all(found[id(unit)] == adapter.run(adapter.collate([unit]), [unit], UNOBSERVED)[0] for unit in units)


def _relative_speed(adapter: TextGenerator, writer: DecoderWriter, parameters: Mapping[str, Any]) -> float:
    """The speed of steps, relative to one batch of the same requests."""
    asked = [{**parameters, "do_sample": False, "max_new_tokens": most} for most in _TIMED_TOKENS]
    units = _units(adapter, [(own, 4 + 3 * index) for index, own in enumerate(asked)])
    if not all(writer.takes(unit.assembly.context) for unit in units):
        return 1.0
    inputs, steps, batch = adapter.collate(units), list[float](), list[float]()
    # On a CPU other processes take turns with this one; the seconds that it had itself hear less of them.
    clock = time.process_time if adapter.pipe.device.type == "cpu" else time.perf_counter
    while len(steps) < 3 and sum(steps) < SECONDS:
        begin = clock()
        outputs_together(writer, units)
        middle = clock()
        adapter.run(inputs, units, UNOBSERVED)
        steps.append(middle - begin)
        batch.append(clock() - middle)
    return min(batch) / min(steps)


def outputs_together(writer: DecoderWriter, units: Sequence[Unit]) -> dict[int, Any]:
    """The output of each unit by its identity, of units that are written together."""
    waiting, found = list(units), dict[int, Any]()
    try:
        while len(found) < len(units):
            while waiting and writer.fits(waiting[0]):
                writer.join(waiting.pop(0))
            working_on(None)
            found.update({id(unit): output for unit, output in writer.step().ended})
    finally:
        writer.clear()
        for unit in units:
            writer.forget(unit)
    return found


def _units(adapter: TextGenerator, asked: Sequence[tuple[dict[str, Any], int]]) -> list[Unit]:
    """Examples with these parameters and sizes, without those that are too long for the model."""
    units: list[Unit] = []
    for parameters, size in asked:
        try:
            units += example_units(adapter, task_spec(TASK), parameters, size)
        except ItemError as error:
            if error.failure.code != "too_long":
                raise
    return units
