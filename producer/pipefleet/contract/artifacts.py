"""Artifacts: pictures, sound and long arrays that lie in objects beside a result's JSON, and how they become values again.

The JSON refers to an artifact as `{"$artifact": "s3://…/output.npy", "kind": "array", …}`. `Job.result` and `Run.results` call
`resolve`. It imports numpy or pillow only when an artifact of that kind is read; UsageError says that the library is missing,
ContractError that the kind is unknown. Workers write artifacts in `pipefleet_workers.results.artifacts`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from pipefleet.errors import ContractError, UsageError

ARTIFACT_KEY = "$artifact"
_PLAIN = (str, int, float)


def is_artifact(value: object) -> bool:
    """True for the JSON that stands for an artifact."""
    return isinstance(value, Mapping) and ARTIFACT_KEY in value


def resolve(value: Any, read: Callable[[str], bytes]) -> Any:
    """`value` with every artifact replaced by its content. `read` returns the bytes of a URI.

    An array for the kinds array, mask (booleans; mask_list: a list of them) and audio (float32 `[frames]` or
    `[channels, frames]`), a PIL image for the kind image. Raises UsageError when the library for a kind is not installed,
    ContractError for a kind this version does not know.
    """
    if value is None or isinstance(value, _PLAIN):
        return value  # the quick way of most values
    if is_artifact(value):
        return _load(value, read)
    if isinstance(value, Mapping):
        return {name: resolve(item, read) for name, item in value.items()}
    if isinstance(value, list):
        # Most lists are lists of numbers, which hold no artifacts.
        return [resolve(item, read) for item in value] if value and isinstance(value[0], Mapping | list) else value
    return value


def _load(reference: Mapping[str, Any], read: Callable[[str], bytes]) -> Any:
    kind, uri = reference.get("kind"), str(reference[ARTIFACT_KEY])
    loader = _LOADERS.get(str(kind))
    if loader is None:
        raise ContractError(f"an artifact of kind {str(kind)[:40]!r}: read it with a newer pipefleet")
    content = read(uri)
    try:
        return loader(content, reference)
    except ImportError as error:
        raise UsageError(f"this result holds an artifact of kind {kind}: pip install {_package(error)}") from None


def _array(content: bytes, _: Mapping[str, Any]) -> Any:
    import numpy

    return numpy.load(io.BytesIO(content), allow_pickle=False)


def _mask(content: bytes, reference: Mapping[str, Any]) -> Any:
    import numpy

    shape = [int(size) for size in reference["shape"]]
    bits = numpy.unpackbits(_array(content, reference), count=int(numpy.prod(shape)))
    return bits.astype(bool).reshape(shape)


def _mask_list(content: bytes, reference: Mapping[str, Any]) -> Any:
    return list(_mask(content, reference))


def _audio(content: bytes, reference: Mapping[str, Any]) -> Any:
    """The samples of a WAV of float32 as workers write it: after the data chunk's header come frames of interleaved channels."""
    import numpy

    size = 4 * int(numpy.prod([int(one) for one in reference["shape"]]))
    start = content.index(b"data") + 8
    samples = numpy.frombuffer(content[start : start + size], "<f4")
    shape = [int(one) for one in reference["shape"]]
    return samples.reshape(shape[::-1]).T.copy()


def _image(content: bytes, _: Mapping[str, Any]) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=("PNG",)) as file:
        return file.copy()  # a picture and not a file: Pillow holds the two for unequal whatever they show


def _package(error: ImportError) -> str:
    return {"PIL": "pillow"}.get(str(error.name), str(error.name))


_LOADERS: Mapping[str, Callable[[bytes, Mapping[str, Any]], Any]] = {
    "array": _array,
    "mask": _mask,
    "mask_list": _mask_list,
    "audio": _audio,
    "image": _image,
}
