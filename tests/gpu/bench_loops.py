"""The contenders beside pipefleet: the best loop by hand, transformers' pipeline, and vLLM where it is installed.

Each takes a pipeline and the items of a load, and returns an output for each item, in order. The raw loops overlap what they can:
threads prepare batches while the device runs, and classes are read from the device at the end. Sizes are tried out first.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipefleet_workers.inputs.sound.recordings import decode_audio
from pipefleet_workers.items import Blob
from tests.gpu.bench_models import Load, new_tokens
from tests.gpu.plan import Order, Skip

PIPELINE_BATCH = 64
CHUNK = 4096
"""Texts that are tokenised and sorted together."""
SIZES = {
    "text-classification": {"cpu": (2048,), "cuda": (16_384, 65_536, 131_072)},
    "image-classification": {"cpu": (8,), "cuda": (64, 128, 256)},
    "automatic-speech-recognition": {"cpu": (4,), "cuda": (32, 64, 128)},
    "text-generation": {"cpu": (16,), "cuda": (128, 512)},
}
"""The batches that are tried: padded tokens of texts, else items."""
Outputs = list[Any]


def sizes(load: Load, order: Order) -> Sequence[int]:
    """The sizes of a batch that the raw loop tries out."""
    return SIZES[load.task][order.device.partition(":")[0]]


def raw(pipe: Any, load: Load, items: Sequence[Any], order: Order, size: int) -> Outputs:
    """The loop by hand with batches of one size."""
    loops: dict[str, Callable[..., Outputs]] = {
        "text-classification": _texts,
        "image-classification": _pictures,
        "automatic-speech-recognition": _speech,
        "text-generation": _prompts,
    }
    with torch.inference_mode():
        return loops[load.task](pipe, load, items, order, size)


def by_pipeline(pipe: Any, load: Load, items: Sequence[Any], order: Order) -> Outputs:
    """`pipeline(generator, batch_size=64)`; prompts in groups of one length, since a call has one `max_new_tokens`."""
    if load.task == "text-generation":
        return _pipeline_in_groups(pipe, load, items, order)
    stream = (decoded(load, one) for one in items)
    return list(pipe(stream, batch_size=min(PIPELINE_BATCH, len(items)), **load.parameters))


def one_by_one(pipe: Any, load: Load, items: Sequence[Any], order: Order) -> Outputs:
    """`pipeline(x)` for each item: what every contender is compared with."""
    found = []
    for index, one in enumerate(items):
        parameters = dict(load.parameters)
        if load.task == "text-generation":
            parameters["max_new_tokens"] = new_tokens(index, order)
        found.append(pipe(decoded(load, one), **parameters))
    return found


def by_vllm(folder: Path, load: Load, items: Sequence[Any], order: Order) -> Callable[[], Outputs]:
    """vLLM with the same weights, ready to run. Raises Skip where it is not installed or does not start."""
    try:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams
    except ImportError:
        raise Skip("vLLM is not installed") from None
    try:
        engine = LLM(model=str(folder), dtype=load.dtype, gpu_memory_utilization=0.4, max_model_len=1024, seed=0)
    except Exception as error:  # noqa: BLE001 - a peer that does not start is a row without figures
        raise Skip(f"vLLM does not start: {type(error).__name__}: {str(error)[:200]}") from None

    def run() -> Outputs:
        asked = [SamplingParams(temperature=0.0, max_tokens=new_tokens(i, order)) for i in range(len(items))]
        return [[{"generated_text": one.outputs[0].text}] for one in engine.generate(list(items), asked)]

    return run


def decoded(load: Load, item: Any) -> Any:
    """An item as a pipeline takes it: a text, a picture or samples."""
    if isinstance(item, str):
        return item
    if load.task == "automatic-speech-recognition":
        return decode_audio(Blob("", item, None), rate=16_000, max_seconds=3600)
    from PIL import Image

    return Image.open(io.BytesIO(item)).convert("RGB")


def threads(load: Load) -> int:
    """The threads that decode and preprocess."""
    return max(1, min(load.cpu_threads, len(os.sched_getaffinity(0))))


def _texts(pipe: Any, load: Load, items: Sequence[str], order: Order, size: int) -> Outputs:
    """Tokenise in chunks on a thread of their own, sort each, cut by padded tokens."""
    outputs: Outputs = [None] * len(items)
    rows: list[tuple[list[int], torch.Tensor]] = []
    with ThreadPoolExecutor(2) as pool:
        chunks = [range(start, min(start + CHUNK, len(items))) for start in range(0, len(items), CHUNK)]
        for batches in pool.map(lambda chunk: list(_token_batches(pipe, items, chunk, size)), chunks):
            for indices, inputs in batches:
                there = {name: tensor.to(pipe.device, non_blocking=True) for name, tensor in inputs.items()}
                rows.append((indices, pipe.model(**there).logits))
    _classes(pipe, rows, outputs)
    return outputs


def _token_batches(pipe: Any, items: Sequence[str], chunk: range, size: int) -> Iterator[tuple[list[int], Any]]:
    ids = pipe.tokenizer([items[index] for index in chunk], truncation=True)["input_ids"]
    order, batch = sorted(range(len(ids)), key=lambda index: -len(ids[index])), list[int]()
    for index in [*order, None]:
        full = batch and (index is None or len(ids[batch[0]]) * (len(batch) + 1) > size)
        if full:
            padded = pipe.tokenizer.pad({"input_ids": [ids[one] for one in batch]}, return_tensors="pt")
            yield [chunk[one] for one in batch], _pinned(pipe, padded)
            batch = []
        if index is not None:
            batch.append(index)


def _pictures(pipe: Any, load: Load, items: Sequence[bytes], order: Order, size: int) -> Outputs:
    """Decode and preprocess in threads, stack, run; what the processor computes is what the model gets."""
    outputs: Outputs = [None] * len(items)
    rows: list[tuple[list[int], torch.Tensor]] = []

    def prepared(item: bytes) -> torch.Tensor:
        pixels: torch.Tensor = pipe.image_processor(decoded(load, item), return_tensors="pt")["pixel_values"]
        return pixels.to(pipe.model.dtype)

    with ThreadPoolExecutor(threads(load)) as pool:
        ready = pool.map(prepared, items)
        for start in range(0, len(items), size):
            indices = list(range(start, min(start + size, len(items))))
            pixels = _pinned(pipe, {"pixel_values": torch.cat([next(ready) for _ in indices])})["pixel_values"]
            rows.append((indices, pipe.model(pixel_values=pixels.to(pipe.device, non_blocking=True)).logits))
    _classes(pipe, rows, outputs)
    return outputs


def _speech(pipe: Any, load: Load, items: Sequence[bytes], order: Order, size: int) -> Outputs:
    """Spectrograms in threads, generate() in batches; every row writes the same number of tokens."""
    outputs: Outputs = []

    def prepared(item: bytes) -> torch.Tensor:
        found = pipe.feature_extractor(decoded(load, item), sampling_rate=16_000, return_tensors="pt")
        return found["input_features"].to(pipe.model.dtype)

    with ThreadPoolExecutor(threads(load)) as pool:
        ready = pool.map(prepared, items)
        for start in range(0, len(items), size):
            batch = torch.cat([next(ready) for _ in items[start : start + size]]).to(pipe.device)
            written = pipe.model.generate(batch, **load.parameters["generate_kwargs"])
            outputs += [{"text": text} for text in pipe.tokenizer.batch_decode(written, skip_special_tokens=True)]
    return outputs


def _prompts(pipe: Any, load: Load, items: Sequence[str], order: Order, size: int) -> Outputs:
    """Prompts that ask for like numbers of tokens share a batch, long ones first; each row is cut at its own number."""
    outputs: Outputs = [None] * len(items)
    asked = [new_tokens(index, order) for index in range(len(items))]
    queue = sorted(range(len(items)), key=lambda index: (-asked[index], -len(items[index])))
    for start in range(0, len(queue), size):
        batch = queue[start : start + size]
        inputs = pipe.tokenizer([items[index] for index in batch], padding=True, return_tensors="pt").to(pipe.device)
        written = pipe.model.generate(**inputs, do_sample=False, max_new_tokens=asked[batch[0]]).cpu()
        for index, row in zip(batch, written[:, inputs["input_ids"].shape[1] :], strict=True):
            text = pipe.tokenizer.decode(row[: asked[index]], skip_special_tokens=True)
            outputs[index] = [{"generated_text": text}]
    return outputs


def _pipeline_in_groups(pipe: Any, load: Load, items: Sequence[str], order: Order) -> Outputs:
    outputs: Outputs = [None] * len(items)
    groups: dict[int, list[int]] = {}
    for index in range(len(items)):
        groups.setdefault(new_tokens(index, order), []).append(index)
    for count, indices in groups.items():
        stream = (items[index] for index in indices)
        found = pipe(stream, batch_size=min(PIPELINE_BATCH, len(indices)), max_new_tokens=count, **load.parameters)
        for index, one in zip(indices, found, strict=True):
            outputs[index] = one
    return outputs


def _pinned(pipe: Any, inputs: Any) -> dict[str, torch.Tensor]:
    gpu = pipe.device.type == "cuda"
    return {name: tensor.pin_memory() if gpu else tensor for name, tensor in inputs.items()}


def _classes(pipe: Any, rows: list[tuple[list[int], torch.Tensor]], outputs: Outputs) -> None:
    """Labels and scores, copied from the device only now."""
    names = pipe.model.config.id2label
    for indices, logits in rows:
        score, best = logits.float().softmax(-1).max(-1)
        for index, one, label in zip(indices, score.tolist(), best.tolist(), strict=True):
            outputs[index] = {"label": names[label], "score": one}
