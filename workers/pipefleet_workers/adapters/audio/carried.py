"""Reads the input of speech recognition: the samples, the stride at both ends, and extra keys that go into the result unchanged.

`speech` passes the decoded input, which is samples or a dict, and gets a `Heard`. A wrong stride or wrong extra keys raise
ItemError (bad_input).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipefleet.errors import InputError
from pipefleet.inputs.recordings import extra_of, rate_of, stride_of
from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.items import ItemError


@dataclass(frozen=True, slots=True)
class Heard:
    """Samples at the model's rate, with the stride in samples at this rate."""

    samples: np.ndarray[Any, Any]
    rate: int
    stride: tuple[int, int] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def given(self) -> Any:
        """The argument of the pipeline's preprocess; new for each call, since preprocess removes the keys of a dict."""
        if self.stride is None:
            return self.samples
        return {"raw": self.samples, "sampling_rate": self.rate, "stride": self.stride}


def heard(value: Any, rate: int) -> Heard:
    """The contents of a decoded input: samples, or `{audio, stride?, sampling_rate?, extra?}`. Raises ItemError (bad_input)."""
    if not isinstance(value, Mapping):
        return Heard(value, rate)
    samples = value["audio"]
    try:
        stride = _at_rate(stride_of(value.get("stride")), value.get("sampling_rate"), rate)
        extra = value.get("extra", {})
        extra = extra_of(extra) if isinstance(extra, Mapping) else {}
    except InputError as error:
        raise ItemError("bad_input", str(error), STAGE) from None
    if stride is not None and sum(stride) > len(samples):
        raise ItemError("bad_input", f"the stride {list(stride)} is longer than the {len(samples)} samples", STAGE)
    return Heard(samples, rate, stride, extra)


def _at_rate(stride: tuple[float, float] | None, given: Any, rate: int) -> tuple[int, int] | None:
    if stride is None:
        return None
    ratio = rate / rate_of(given)
    return round(stride[0] * ratio), round(stride[1] * ratio)
