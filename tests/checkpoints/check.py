"""Run the pipeline of transformers over every checkpoint and print a table of what came out."""

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import transformers as hf
from PIL import Image

from tests.checkpoints.cache import build
from tests.checkpoints.registry import CHECKPOINTS, Checkpoint

#: Tasks that transformers 5 has no pipeline for; image-to-text it hands on to image-text-to-text.
REMOVED = frozenset(
    {
        "image-to-image",
        "question-answering",
        "summarization",
        "text2text-generation",
        "translation",
        "translation_xx_to_yy",
        "visual-question-answering",
    }
)
SKIPPED = {"image-to-text:vit-gpt2": "transformers 5 wants a processor file for this task"}

#: Tasks whose pipelines take a chat by name only.
_CHAT_TASKS = frozenset({"image-text-to-text", "any-to-any"})


def check(keys: Sequence[str]) -> int:
    """Build and run the checkpoints `keys`, print a row each, and return how many failed."""
    print(f"{'checkpoint':<38} {'KiB':>5} {'build':>6} {'load':>6} {'input':>6} {'differ':>6}  output")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as folder:
        for key in keys:
            if reason := why_skipped(key):
                print(f"{key:<38} skipped: {reason}", flush=True)
                continue
            failed += not _print_row(CHECKPOINTS[key], Path(folder) / key.replace(":", "--"))
    print(f"{failed} of {len(keys)} failed" if failed else "no failure")
    return failed


def why_skipped(key: str) -> str:
    """Why the pipeline of transformers cannot run `key`; empty when it can."""
    if CHECKPOINTS[key].task in REMOVED:
        return "transformers 5 has no pipeline for this task"
    return SKIPPED.get(key, "")


def _print_row(checkpoint: Checkpoint, directory: Path) -> bool:
    try:
        figures, outputs = run(checkpoint, directory)
    except Exception as error:  # noqa: BLE001 - a row of the report, whatever a model raised
        reason = (str(error).strip() or "no message").splitlines()[-1]
        print(f"{checkpoint.key:<38} FAILED {type(error).__name__}: {reason[:200]}", flush=True)
        return False
    answers = {fingerprint(output) for output in outputs}
    row = f"{checkpoint.key:<38} {figures} {len(answers):>4}/{len(outputs)}"
    print(f"{row}  {describe(outputs[0])[:160]}", flush=True)
    if len(answers) == 1:
        print(f"{checkpoint.key:<38} FAILED: one answer to all inputs, so no test could see a wrong batch")
    return len(answers) > 1


def run(checkpoint: Checkpoint, directory: Path) -> tuple[str, list[Any]]:
    """Size and seconds of building, loading and one input as text, and the output for every input."""
    started = time.perf_counter()
    build(checkpoint.key, directory)
    built = time.perf_counter()
    pipe = hf.pipeline(checkpoint.task, model=str(directory), device="cpu")
    loaded = time.perf_counter()
    samples = checkpoint.inputs(directory)
    begun = time.perf_counter()
    with mask_suppression():
        outputs = [_call(pipe, checkpoint, sample) for sample in samples]
    each = (time.perf_counter() - begun) / len(samples)
    size = sum(file.stat().st_size for file in directory.iterdir()) // 1024
    return f"{size:>5} {built - started:>6.2f} {loaded - built:>6.2f} {each:>6.3f}", outputs


def _call(pipe: Any, checkpoint: Checkpoint, sample: Any) -> Any:
    if checkpoint.task in _CHAT_TASKS:
        return pipe(text=sample, **checkpoint.parameters)
    return pipe(sample, **checkpoint.parameters)


@contextlib.contextmanager
def mask_suppression() -> Iterator[None]:
    """Let SAM drop overlapping masks without torchvision, of which it needs nothing else."""
    if hf.utils.is_torchvision_available():
        yield
        return
    from transformers.models.sam import image_processing_pil_sam as sam

    def post_process(_self: Any, masks: Any, scores: Any, boxes: Any, limit: float) -> Any:
        kept = suppress(boxes.float(), scores, limit)
        runs = [masks[i] for i in kept]
        return [sam._rle_to_mask(lengths) for lengths in runs], scores[kept], runs, boxes[kept]

    with mock.patch.object(sam.SamImageProcessorPil, "post_process_for_mask_generation", post_process):
        yield


def suppress(boxes: Any, scores: Any, limit: float) -> list[int]:
    """Indices of the boxes that overlap no better one by more than `limit` (intersection over union)."""
    kept: list[int] = []
    for candidate in scores.argsort(descending=True, stable=True).tolist():
        if all(_overlap(boxes[candidate], boxes[other]) <= limit for other in kept):
            kept.append(candidate)
    return kept


def _overlap(one: Any, other: Any) -> float:
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[2], other[2]), min(one[3], other[3])
    common = max(right - left, 0) * max(bottom - top, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return float(common / (sum(areas) - common))


def fingerprint(value: Any) -> str:
    """A text that is equal for equal outputs; the echo of the input is left out."""
    if isinstance(value, dict):
        return str({name: fingerprint(part) for name, part in value.items() if name != "input_text"})
    if isinstance(value, list | tuple):
        return str([fingerprint(part) for part in value])
    if isinstance(value, Image.Image | np.ndarray) or type(value).__name__ == "Tensor":
        return hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
    return repr(value)


def describe(value: Any) -> str:
    """The types, keys and shapes of a pipeline's output, in one line."""
    if isinstance(value, Image.Image):
        return f"Image[{value.mode},{value.size[0]}x{value.size[1]}]"
    if isinstance(value, np.ndarray) or type(value).__name__ == "Tensor":
        return f"{type(value).__name__}[{'x'.join(map(str, value.shape))},{value.dtype}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}:{describe(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        kinds = list(dict.fromkeys(describe(part) for part in value[:4]))
        return f"{type(value).__name__}[{len(value)} x {' | '.join(kinds[:2])}]"
    return type(value).__name__
