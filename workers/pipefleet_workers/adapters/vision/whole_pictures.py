"""Bounds the pixels of pictures that a model gets at their own size: memory and time of the forward grow with the pixels.

`Adapter.prepare` calls it for every input.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.items import ItemError
from pipefleet_workers.process.memory import available_bytes

_COPIES = 20
"""Memory of a block of a transformer over pixels, in copies of the hidden states: queries, keys, values, scores, a wider layer."""
_ALWAYS_PIXELS = 1 << 16
"""Pictures up to this size are not checked against the memory."""


def require_pixels(pipe: Any, value: Any, most: int) -> None:
    """Raise ItemError (too_large) for an unresized picture that has more than `most` pixels or needs more than the free memory.

    On a GPU the memory is not checked: a GPU without memory raises an error and goes on, but a worker without memory is killed.
    """
    if not isinstance(value, Image.Image) or _resizes(getattr(pipe, "image_processor", None)):
        return
    pixels, hint = value.width * value.height, "send a smaller picture, or parts of it"
    if pixels > most:
        text = f"the picture has {pixels} pixels, the model takes at most {most} at once"
        raise ItemError("too_large", f"{text} (PIPEFLEET_WORKER_MAX_WHOLE_PIXELS); {hint}", STAGE)
    width = getattr(pipe.model.config, "embed_dim", None)
    if pipe.model.device.type not in ("cpu", "meta") or not isinstance(width, int) or pixels <= _ALWAYS_PIXELS:
        return
    needed, room = pixels * width * _COPIES * 4, available_bytes()
    if room is not None and needed > room:
        text = f"the picture has {pixels} pixels, for which the model needs {needed >> 20} MB"
        raise ItemError("too_large", f"{text} and {room >> 20} MB are free; {hint}", STAGE)


def _resizes(processor: Any) -> bool:
    """Whether pictures of any size become inputs of a bounded size."""
    return processor is None or bool(getattr(processor, "do_resize", False)) or hasattr(processor, "max_patches")
