"""Artifacts: pictures, sound and long arrays in a result are stored as objects of their own; references stand in their place.

PIL image  → PNG, kind "image"       Audio → WAV of float32, kind "audio"
array      → .npy, kind "array"; one of booleans packed eight to a byte, kind "mask"
                                         a list of those of one shape, kind "mask_list"
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from pipefleet.storage import join_uri
from pipefleet_workers.items import ItemError
from pipefleet_workers.objects import WorkerStore

STAGE = "write"
INLINE_NUMBERS = 16_384
"""Longest array of numbers that stands in the JSON itself."""


@dataclass(frozen=True, slots=True)
class Audio:
    """Sound in a result: float32 samples `[frames]` or `[channels, frames]` at `rate` Hz."""

    samples: np.ndarray[Any, Any]
    rate: int


class ArtifactWriter:
    """Stores the artifacts of results. Thread-safe. Writing the same result again stores the same objects again."""

    def __init__(self, store: WorkerStore) -> None:
        self._store = store

    def store(self, output: Any, prefix: str) -> Any:
        """`output` with a reference in the place of every artifact, which lie under `prefix`.

        Tensors are always stored, arrays of numbers from `INLINE_NUMBERS` up. Raises ItemError (bad_output) for NaN and infinity in
        an array, and what the store raises.
        """
        return self._walk(output, prefix, "output")

    def _walk(self, value: Any, prefix: str, name: str) -> Any:
        if isinstance(value, str | int | float | None):
            return value
        if isinstance(value, Mapping):
            inner = "" if name == "output" else f"{name}-"
            return {key: self._walk(item, prefix, f"{inner}{_plain(key)}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return self._walk_list(value, prefix, name)
        return self._stored(value, prefix, name)

    def _walk_list(self, values: list[Any] | tuple[Any, ...], prefix: str, name: str) -> Any:
        if not values or isinstance(values[0], float | int | str):  # lists of numbers are most of what there is
            return values
        if (
            isinstance(values[0], np.ndarray)
            and values[0].dtype == np.bool_
            and len({one.shape for one in values}) == 1
        ):
            masks = np.stack(values)  # hundreds of masks of one picture are one object
            facts = {"kind": "mask_list", "shape": list(masks.shape)}
            return self._put(_npy(np.packbits(masks)), prefix, f"{name}.npy", **facts)
        inner = "" if name == "output" else f"{name}-"
        return [self._walk(item, prefix, f"{inner}{index}") for index, item in enumerate(values)]

    def _stored(self, value: Any, prefix: str, name: str) -> Any:
        if isinstance(value, Image.Image):
            return self._put(_png(value), prefix, f"{name}.png", kind="image", size=list(value.size), mode=value.mode)
        if isinstance(value, Audio):
            _require_finite(value.samples)
            facts = {"kind": "audio", "sampling_rate": value.rate, "shape": list(value.samples.shape)}
            return self._put(_wav(value), prefix, f"{name}.wav", **facts)
        if isinstance(value, torch.Tensor):
            return self._array(value.detach().float().cpu().numpy(), prefix, name)
        if isinstance(value, np.ndarray) and value.dtype == np.bool_:
            shape = list(value.shape)
            return self._put(_npy(np.packbits(value)), prefix, f"{name}.npy", kind="mask", shape=shape)
        if isinstance(value, np.ndarray) and value.size > INLINE_NUMBERS and value.dtype.kind in "biuf":
            return self._array(value, prefix, name)
        return value

    def _array(self, array: np.ndarray[Any, Any], prefix: str, name: str) -> dict[str, Any]:
        _require_finite(array)
        facts = {"kind": "array", "shape": list(array.shape), "dtype": str(array.dtype)}
        return self._put(_npy(array), prefix, f"{name}.npy", **facts)

    def _put(self, content: bytes, prefix: str, name: str, **facts: Any) -> dict[str, Any]:
        uri = join_uri(prefix, name)
        self._store.put(uri, content, content_type=_TYPES[name.rsplit(".", 1)[1]])
        return {"$artifact": uri, **facts}


_TYPES = {"png": "image/png", "wav": "audio/wav", "npy": "application/x-npy"}


def _plain(key: Any) -> str:
    """A key as part of an object's name."""
    return "".join(one if one.isalnum() or one in "_-" else "_" for one in str(key))[:60]


def _require_finite(array: np.ndarray[Any, Any]) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ItemError("bad_output", "the result holds NaN or infinity", STAGE)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _wav(audio: Audio) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio.samples.astype(np.float32).T, audio.rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
