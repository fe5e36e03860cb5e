"""Recordings that are values: arrays, tensors, lists and dicts of samples become float32, by transformers' rules.

    array, tensor, list, dict, decoder → `recording_of` → `Recording`: samples, rate, stride, extra keys → `wav`

`prepare` and `uploads` call these functions. InputError names the fault. numpy and torch need not be installed: a caller with an
array has its library.
"""

from __future__ import annotations

import array
import math
import operator
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipefleet.contract.messages import encode_json
from pipefleet.contract.references import refs_in
from pipefleet.errors import ContractError, InputError

RATES = (1_000, 1_000_000)
"""Lowest and highest sampling rate in Hz that workers accept."""
LARGEST = (1 << 32) - 64
"""Most bytes of samples in a WAV file."""
_RESERVED = {
    "attention_mask", "chunks", "input_features", "input_values", "is_last", "lang_id", "logits", "text",
    "token_timestamps", "tokens",
}  # fmt: skip
"""Keys that would replace parts of a result, or of the model's input."""
_ARRAYS = ("astype", "detach", "get_all_samples", "sample_rate", "to_numpy")
"""Attributes of arrays, tensors, decoders and samples of torchcodec, and columns of tables."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Mono samples as little-endian float32. `rate` is in Hz; None stands for the model's own rate."""

    samples: bytes
    rate: int | None = None
    stride: tuple[float, float] | None = None
    """Numbers of samples at both ends that the model hears and whose text is left out."""
    extra: Mapping[str, Any] | None = None
    """The user's own keys, which go into the result unchanged."""


def is_samples(value: object) -> bool:
    """True for a value that holds samples as numbers, not a file. Open files have a `detach` too, numpy's texts an `astype`."""
    if isinstance(value, str | bytes) or hasattr(value, "read"):
        return False
    return isinstance(value, list | tuple) or any(hasattr(value, name) for name in _ARRAYS)


def has_samples(value: Mapping[Any, Any]) -> bool:
    """True for a dict of samples and their rate, with or without other keys."""
    return "sampling_rate" in value and ("raw" in value or "array" in value)


def recording_of(value: Any, *, extras: bool = False) -> Recording:
    """The recording in an array, a tensor, a list, a decoder of torchcodec, or a dict `{"raw" or "array", "sampling_rate"}`.

    With `extras` a dict may hold a stride and keys of the user's own, as for speech recognition. Raises InputError, which names
    the wrong key or the fault of the samples.
    """
    if hasattr(value, "get_all_samples"):
        value = value.get_all_samples()
    if isinstance(value, Mapping):
        return _of_dict(value, extras)
    if hasattr(value, "sample_rate") and hasattr(value, "data"):
        return Recording(_float32(value.data), rate_of(value.sample_rate))
    return Recording(_float32(value))


def wav(recording: Recording) -> bytes:
    """A RIFF file of mono IEEE-float samples (format 3), by the WAVE specification of 1991 and its update of 1994."""
    size, rate = len(recording.samples), recording.rate
    assert rate is not None
    fmt = struct.pack("<HHIIHH", 3, 1, rate, rate * 4, 4, 32)
    header = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<I", 16) + fmt
    return header + b"data" + struct.pack("<I", size) + recording.samples


def stride_of(value: Any) -> tuple[float, float] | None:
    """Two numbers of samples, or None. Raises InputError for any other value."""
    if value is None:
        return None
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError("`stride` is a pair of numbers of samples, one for each end of the recording")
    left, right = (_scalar(one) for one in value)
    for one in (left, right):
        if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < 2**53:
            raise InputError("`stride` is a pair of numbers of samples, finite and not below 0")
    return left, right


def extra_of(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The user's own keys that go into the result. Raises InputError, which names a key that cannot go there."""
    return {_free_key(key): _json(key, value) for key, value in values.items()}


def _of_dict(value: Mapping[Any, Any], extras: bool) -> Recording:
    given = dict(value)
    samples = given.pop("raw", None)
    if samples is None:
        given.pop("path", None)  # a field of `datasets` that nobody reads
        samples = given.pop("array", None)
    if samples is None or "sampling_rate" not in given:
        raise InputError("an audio dict needs `raw` (or `array`) with samples and a whole `sampling_rate`")
    if "array" in given:
        raise InputError("an audio dict holds its samples as `raw` or as `array`, not as both")
    rate = rate_of(given.pop("sampling_rate"))
    content = _float32(samples)
    if not extras:
        given.pop("path", None)
        for name in given:
            raise InputError(f"this task makes nothing of the key {str(name)[:40]!r} of an audio dict; leave it out")
        return Recording(content, rate)
    stride = stride_of(given.pop("stride", None))
    if "num_frames" in given and stride is not None:
        raise InputError("an audio dict has `num_frames` or a `stride`, not both")
    given.pop("num_frames", None)  # transformers only checks that it does not stand beside a stride
    return Recording(content, rate, stride, extra_of(given) or None)


def _free_key(key: Any) -> str:
    if not isinstance(key, str):
        raise InputError(f"the keys of an audio dict are texts, not {str(key)[:40]!r}")
    if key in _RESERVED:
        raise InputError(f"the key {key!r} of an audio dict would replace a part of the result; give it another name")
    return key


def _json(key: str, value: Any) -> Any:
    value = _scalar(value)
    try:
        encode_json(value)
        if refs_in(value):
            raise ContractError("a reference is none of the user's own values")
    except ContractError:
        kind = type(value).__name__
        raise InputError(
            f"the key {key[:40]!r} of an audio dict goes into the result and must be JSON, not a value of type {kind}"
        ) from None
    return value


def _scalar(value: Any) -> Any:
    """A number of numpy or torch, or an array without an axis, as a number of Python."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def rate_of(value: Any) -> int:
    """A whole rate in Hz from a number of Python, numpy or torch. Raises InputError."""
    value = _scalar(value)
    try:
        whole = isinstance(value, float) and value.is_integer()
        rate = int(value) if whole else operator.index(value)
    except TypeError:
        rate = 0
    if isinstance(value, bool) or rate <= 0:
        raise InputError(f"a whole `sampling_rate` in Hz is needed, not {str(value)[:40]!r}")
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"a `sampling_rate` lies between {RATES[0]} and {RATES[1]} Hz, not at {rate}")
    return rate


def _float32(samples: Any) -> bytes:
    content = _of_list(samples) if isinstance(samples, list | tuple) else _of_array(samples)
    if len(content) > LARGEST:
        raise InputError(f"a recording has at most {LARGEST} bytes of samples; cut it into pieces")
    return content


def _of_array(samples: Any) -> bytes:
    found = _as_numpy(samples)
    if getattr(found.dtype, "kind", "") not in "biuf":
        raise InputError(f"audio samples are numbers, not of type {found.dtype}")
    found = _mono(found)
    if not found.size:
        raise InputError("the recording has no samples")
    content = _narrow(found)
    if not math.isfinite(float(content.max()) - float(content.min())):
        raise InputError("audio samples must be finite numbers that float32 can hold")
    return bytes(content.tobytes())


def _narrow(samples: Any) -> Any:
    import numpy

    with numpy.errstate(over="ignore"):  # the caller refuses infinite samples
        return samples.astype("<f4")


def _as_numpy(samples: Any) -> Any:
    """A numpy array of the same numbers, which may lie on another device."""
    try:
        import numpy

        if hasattr(samples, "detach"):
            samples = samples.detach().cpu()
            if str(samples.dtype) == "torch.bfloat16":  # numpy has no such type
                samples = samples.float()
            return samples.resolve_conj().resolve_neg().numpy() if hasattr(samples, "resolve_neg") else samples.numpy()
        return numpy.asarray(samples)
    except ImportError:
        raise InputError("samples in a tensor need numpy: pip install numpy") from None
    except Exception as error:  # noqa: BLE001 - an array of another library may raise anything
        kind = type(samples).__name__
        raise InputError(f"audio samples cannot be read from a value of type {kind}: {error}") from None


def _mono(samples: Any) -> Any:
    if samples.ndim == 1:
        return samples
    shape = tuple(samples.shape)
    if samples.ndim != 2:
        raise InputError(f"audio samples have the shape (samples,) or (channels, samples), not {shape}")
    if shape[0] > 2:
        raise InputError(
            f"the first axis of samples of shape {shape} would be channels, of which there are at most 2: transpose "
            "(samples, channels), and mix more channels down yourself"
        )
    return samples.mean(axis=0) if samples.size else samples[:1].reshape(-1)


def _of_list(samples: list[Any] | tuple[Any, ...]) -> bytes:
    if samples and all(isinstance(one, list | tuple) for one in samples):
        if len(samples) > 2 or len({len(one) for one in samples}) > 1:
            raise InputError("lists of samples are one list, or one for each of two channels, of one length")
        samples = [math.fsum(column) / len(column) for column in zip(*_numbers(samples), strict=True)]
    elif samples and any(getattr(one, "ndim", 0) for one in samples):
        return _of_array(samples)  # a list of arrays or tensors: one for each channel
    found = array.array("f", _numbers([samples])[0])
    if not found:
        raise InputError("the recording has no samples")
    if not all(map(math.isfinite, found)):
        raise InputError("audio samples must be finite numbers that float32 can hold")
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def _numbers(rows: Any) -> list[list[float]]:
    try:
        return [[_number(one) for one in row] for row in rows]
    except (TypeError, ValueError, OverflowError):
        raise InputError("audio samples in a list are numbers") from None


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError
    return float(value)
