"""Sources as the tests open them, and the items that they give."""

from __future__ import annotations

from collections.abc import Callable

from pipefleet.inputs.rows import SourceItem
from pipefleet.inputs.sources import Source

TEXTS, PICTURES = "text-classification", "image-classification"
Opener = Callable[..., Source]


def items(source: Source) -> list[SourceItem]:
    source.check()
    return list(source.items(0, None))
