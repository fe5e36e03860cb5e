"""Words of a page with their places, for models that read boxes instead of pixels.

The adapter of document-question-answering calls `read_words` for pages without `word_boxes`. RapidOCR reads the page; its wheel
contains its weights. Without the extra `ocr`, ItemError (not_installed).
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from pipefleet_workers.items import ItemError

STAGE = "preprocess"
_ONE_PAGE = threading.Lock()
"""Only one page at a time: the recogniser writes into itself while it reads, and uses all cores for one page."""


def read_words(page: Image.Image) -> list[tuple[str, list[int]]]:
    """Each word with `[x0, y0, x1, y1]` in thousandths of the page, line by line; empty for a page without words.

    Takes about a second for a page on one core. Thread-safe, one page at a time. Raises ItemError (not_installed) without the
    extra `ocr`.
    """
    pixels = np.ascontiguousarray(np.asarray(page.convert("RGB"))[:, :, ::-1])
    with _ONE_PAGE:
        found = _recogniser()(pixels, return_word_box=True)
    lines = found.word_results if found.txts else ()
    words = [(text, corners) for line in lines for text, _, corners in line if text.strip()]
    return [(text, _thousandths(corners, *page.size)) for text, corners in words]


@functools.cache
def _recogniser() -> Any:
    try:
        library = importlib.import_module("rapidocr")
    except ImportError:
        text = "the page comes without word_boxes and this worker has no OCR; pass word_boxes, or on the worker run"
        raise ItemError("not_installed", f"{text} pip install 'pipefleet[ocr]'", STAGE) from None
    return library.RapidOCR(params={"Global.log_level": "critical"})


def _thousandths(corners: Iterable[tuple[float, float]], width: int, height: int) -> list[int]:
    xs, ys = zip(*corners, strict=True)
    edges = (min(xs) / width, min(ys) / height, max(xs) / width, max(ys) / height)
    return [min(1000, max(0, int(1000 * edge))) for edge in edges]
