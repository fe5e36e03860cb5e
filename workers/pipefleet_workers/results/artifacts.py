"""Artifacts: pictures, sound and long arrays of a result become objects of their own; references take their places.

    PIL image  → PNG, kind "image"       Audio → WAV of float32, kind "audio"
    array      → .npy, kind "array"; an array of booleans is packed eight to a byte, kind "mask"
                                     a list of such arrays of one shape, kind "mask_list"

`ResultWriter.take_apart` calls it, and stores the artifacts later. A number that is not finite raises ItemError (bad_output) when
its artifact is encoded. A result that cannot be read raises an error of any kind.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from pipefleet.contract.references import join_uri
from pipefleet_workers.items import Artifact, Audio, ItemError
from pipefleet_workers.process.sizes import bytes_of

STAGE = "write"
INLINE_NUMBERS = 16_384
"""Arrays of at most so many numbers stay in the JSON."""


class TakenApart:
    """A result taken apart: `value` holds a reference for every artifact; `artifacts` will lie under `prefix()`.

    Tensors always become artifacts; arrays of numbers do so if they are longer than `INLINE_NUMBERS`. The same result always gives
    the same objects.
    Raises any error of reading the result.
    """

    def __init__(self, output: Any, prefix: Callable[[], str]) -> None:
        self._prefix = prefix
        self.artifacts: list[Artifact] = []
        self.value = output if _is_plain(output) else self._walk(output, "output")

    def _walk(self, value: Any, name: str) -> Any:
        if isinstance(value, str | int | float | None):
            return value
        if isinstance(value, Mapping):
            inner = "" if name == "output" else f"{name}-"
            return {key: self._walk(item, f"{inner}{_plain(key)}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return self._walk_list(value, name)
        return self._stored(value, name)

    def _walk_list(self, values: list[Any] | tuple[Any, ...], name: str) -> Any:
        if not values or isinstance(values[0], float | int | str):  # the quick way, since most lists hold numbers
            return values
        # The masks of one picture, hundreds of them, become one object.
        if (
            isinstance(values[0], np.ndarray)
            and values[0].dtype == np.bool_
            and len({one.shape for one in values}) == 1
        ):
            facts = {"kind": "mask_list", "shape": [len(values), *values[0].shape]}
            return self._refer(lambda: _npy(np.packbits(np.stack(values))), values, f"{name}.npy", **facts)
        inner = "" if name == "output" else f"{name}-"
        return [self._walk(item, f"{inner}{index}") for index, item in enumerate(values)]

    def _stored(self, value: Any, name: str) -> Any:
        facts: dict[str, Any]
        if isinstance(value, Image.Image):
            facts = {"kind": "image", "size": list(value.size), "mode": value.mode}
            return self._refer(lambda: _png(value), value, f"{name}.png", **facts)
        if isinstance(value, Audio):
            facts = {"kind": "audio", "sampling_rate": value.rate, "shape": list(value.samples.shape)}
            return self._refer(lambda: _wav(value), value.samples, f"{name}.wav", **facts)
        if isinstance(value, torch.Tensor):
            facts = {"kind": "array", "shape": list(value.shape), "dtype": "int64" if _is_whole(value) else "float32"}
            return self._refer(lambda: _numbers(_as_array(value)), value, f"{name}.npy", **facts)
        if isinstance(value, np.ndarray) and value.dtype == np.bool_:
            facts = {"kind": "mask", "shape": list(value.shape)}
            return self._refer(lambda: _npy(np.packbits(value)), value, f"{name}.npy", **facts)
        if isinstance(value, np.ndarray) and value.size > INLINE_NUMBERS and value.dtype.kind in "biuf":
            facts = {"kind": "array", "shape": list(value.shape), "dtype": str(value.dtype)}
            return self._refer(lambda: _numbers(value), value, f"{name}.npy", **facts)
        return value

    def _refer(self, encode: Callable[[], bytes], value: Any, name: str, **facts: Any) -> dict[str, Any]:
        uri = join_uri(self._prefix(), name)
        self.artifacts.append(Artifact(uri, _TYPES[name.rsplit(".", 1)[1]], encode, bytes_of(value)))
        return {"$artifact": uri, **facts}


_SCALARS, _FIRST, _LISTS = (str, int, float, type(None)), (str, int, float), (list, tuple)


def _is_plain(value: Any) -> bool:
    """Whether a value surely holds no artifact. This spares most results the walk through their parts, which is slow."""
    if isinstance(value, _SCALARS):
        return True
    if isinstance(value, dict):
        return all([_is_plain(item) for item in value.values()])
    if isinstance(value, _LISTS):  # the quick way, since most lists hold numbers
        return not value or isinstance(value[0], _FIRST) or all([_is_plain(item) for item in value])
    return False


_TYPES = {"png": "image/png", "wav": "audio/wav", "npy": "application/x-npy"}


def _plain(key: Any) -> str:
    """A key, made safe as part of an object's name."""
    return "".join(one if one.isalnum() or one in "_-" else "_" for one in str(key))[:60]


def _require_finite(array: np.ndarray[Any, Any]) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ItemError("bad_output", "the result holds NaN or infinity", STAGE)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _wav(audio: Audio) -> bytes:
    _require_finite(audio.samples)
    buffer = io.BytesIO()
    soundfile.write(buffer, audio.samples.astype(np.float32).T, audio.rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _is_whole(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype != torch.bool


def _as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu()
    return (tensor.long() if _is_whole(tensor) else tensor.float()).numpy()


def _numbers(array: np.ndarray[Any, Any]) -> bytes:
    _require_finite(array)
    return _npy(array)


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
