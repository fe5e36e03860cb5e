"""Values that stand in no message of a well-behaved producer: texts, numbers, nested things, URIs."""

from __future__ import annotations

import bz2
import functools
import lzma
import math
import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

FORGED = "2026-01-01 00:00:00,000 CRITICAL forged.logger: the worker gave up"
"""A line as the worker's log has them, which only a message may have written."""
BOMB_BYTES = 128 << 20
"""What a compressed body becomes."""

_WHITE = ["", " ", "\t", "\n", "\r\n", "\x00", "a\x00b", "\u2028", "\u2029", "\x85", "\ufeff"]
_TERMINAL = [
    "\x1b[2J\x1b[H",
    "\x1b]0;owned\x07",
    "\x1b[31mred",
    "\x9b2J",
    "\u202egnp.exe",
    "\x08" * 40,
    f"x\n{FORGED}",
    f"x\r{FORGED}",
]
_LONE = ["\ud800", "\udfff", "a\udc80b", "\ud83d", "\udc00\ud800"]
_SYNTAX = [
    '"',
    "\\",
    '"]',
    '", "',
    "'",
    "{}",
    "[]",
    "null",
    "%s%n%d",
    "{0}",
    "*",
    "?",
    "[a-z]",
    "__proto__",
    "\x06\x163",
]
_NAMES = [
    "..",
    "../../x",
    "pipefleet:pools",
    "pipefleet:workers",
    "celery",
    "pipefleet.text-classification",
    "@",
    ":",
    "0",
    "-1",
    "None",
    "true",
]
_LONG = ["x" * 200, "x" * 201, "x" * 513, "x" * 5000, "\U0001f600" * 300, "\x00" * 1000]


def texts() -> st.SearchStrategy[str]:
    """Texts that somebody has to escape, bound or refuse; now and then any text at all."""
    known = st.sampled_from([*_WHITE, *_TERMINAL, *_LONE, *_SYNTAX, *_NAMES, *_LONG])
    free = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates too
    return known | known | free


def numbers() -> st.SearchStrategy[Any]:
    """Whole numbers and floats at and beyond every bound, and booleans."""
    near = [0, -1, 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), 10**100, 10**400]
    floats = [0.5, -0.0, 1e15, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan]
    return st.sampled_from([*near, *floats, True, False]) | st.integers() | st.floats()


def nested() -> st.SearchStrategy[Any]:
    """Lists and objects of many levels."""
    return st.tuples(st.sampled_from([50, 99, 101, 150, 300]), st.booleans()).map(lambda pair: _nest(*pair))


def anything() -> st.SearchStrategy[Any]:
    """Any JSON value, most of them of a type that was not asked for."""
    scalars = st.none() | texts() | numbers()
    small = st.recursive(
        scalars, lambda one: st.lists(one, max_size=3) | st.dictionaries(texts(), one, max_size=3), max_leaves=5
    )
    return scalars | small | nested() | st.sampled_from(TAGGED)


TAGGED: list[Any] = [
    {"__type__": "datetime", "__value__": "2026-01-01T00:00:00"},
    {"__type__": "datetime", "__value__": "not a time"},
    {"__type__": "uuid", "__value__": {"hex": "0" * 32, "version": 4}},
    {"__type__": "decimal", "__value__": "1e1000000"},
    {"__type__": "bytes", "__value__": "AAAA"},
    {"__type__": "nothing", "__value__": 1},
]
"""Objects that kombu's JSON turns into Python's own types."""


def _nest(levels: int, objects: bool) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = {"a": value} if objects else [value]
    return value


@functools.cache
def bomb(method: str) -> bytes:
    """A valid JSON list of BOMB_BYTES spaces and nothing else, packed by `method`: some kilobytes."""
    pack = _PACKS[method]
    if method == "gzip":  # kombu takes one stream of it alone
        return pack(b"[" + b" " * BOMB_BYTES + b"]")
    piece = b" " * (4 << 20)
    return pack(b"[") + pack(piece) * (BOMB_BYTES // len(piece)) + pack(b"]")


_PACKS: dict[str, Callable[[bytes], bytes]] = {
    "bz2": bz2.compress,
    "gzip": lambda content: zlib.compress(content, 9),
    "lzma": lzma.compress,
}
