"""Text of others, made fit for a terminal."""

from __future__ import annotations


def printable(text: str, most: int = 80) -> str:
    """`text` on one line of at most `most` characters; what a terminal would obey is escaped."""
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"
