"""Texts and tables in files: which characters a file is written in, its lines, and which delimiter its cells have."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator

LONGEST_LINE = 64 << 20
"""Characters that one line, or one cell, may have: as much as an item."""
_DELIMITERS = ",;\t"
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_PIECE = 1 << 16


def allow_long_cells() -> None:
    """Let the csv module take cells of up to LONGEST_LINE characters; its bound is one of the process, at first 131,072."""
    if csv.field_size_limit() < LONGEST_LINE:
        csv.field_size_limit(LONGEST_LINE)


def text_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """A file as text, in pieces, without its byte order mark: UTF-8, or UTF-16 where the mark says so, as Excel writes it.

    Bytes that are no text stay as lone surrogates, so that one line with such bytes spoils no other.
    """
    chunks = iter(chunks)
    head = b""
    while len(head) < 3 and (more := next(chunks, None)) is not None:
        head += more
    mark, encoding = next((one for one in _MARKS if head.startswith(one[0])), (b"", "utf-8"))
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape" if encoding == "utf-8" else "surrogatepass")
    yield decoder.decode(head[len(mark) :])
    for chunk in chunks:
        yield decoder.decode(chunk)
    try:
        yield decoder.decode(b"", True)
    except UnicodeDecodeError:  # the first half of a character of UTF-16
        yield "\udcff"


def with_line_feeds(texts: Iterable[str]) -> Iterator[str]:
    """A text in pieces as it is, or with LF where its lines end with CR alone, as Excel's "CSV (Macintosh)" and old programs write.

    The first 65,536 characters tell: they hold a CR and no LF.
    """
    texts, head = iter(texts), ""
    while len(head) < _PIECE and "\n" not in head and (more := next(texts, None)) is not None:
        head += more
    alone = "\n" not in head and "\r" in head[:-1]
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for text in itertools.chain([head], texts):
        yield decoder.decode(text) if alone else text


def lines_of(texts: Iterable[str], *, most: int = LONGEST_LINE) -> Iterator[str]:
    """The lines of a text that comes in pieces, with their ends (LF or CRLF). Raises ValueError above `most` characters."""
    left: list[str] = []
    held = 0
    for text in texts:
        *ended, last = text.split("\n")
        for line in ended:
            yield "".join([*left, line, "\n"])
            left, held = [], 0
        left.append(last)
        held += len(last)
        if held > most:
            raise ValueError(f"it has more than {most} characters")
    if held:
        yield "".join(left)


def unreadable_at(line: str) -> int | None:
    """The column, from 1, where a line of `text_of` holds what is no text; None where there is nothing of that kind."""
    if line.isascii():
        return None if "\0" not in line else line.index("\0") + 1
    try:
        line.encode()
    except UnicodeEncodeError as error:
        return error.start + 1
    return None if "\0" not in line else line.index("\0") + 1


def delimiter_of(header: str) -> str:
    """The delimiter of a table, told from its first line: a comma, or the semicolon or tab that Excel writes in some countries."""
    outside = "".join(header.split('"')[::2])
    return next((one for one in _DELIMITERS if one in outside), ",")


def unzipped(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The content of a gzip file, in pieces of bounded size. Raises ValueError for what is none, or is cut off."""
    engine, begun = zlib.decompressobj(wbits=31), False
    for chunk in chunks:
        while chunk:
            try:
                piece = engine.decompress(chunk, _PIECE)
            except zlib.error as error:
                raise ValueError(f"it is not a gzip file ({error})") from None
            begun = True
            if piece:
                yield piece
            chunk = engine.unconsumed_tail
            if engine.eof:
                chunk, engine, begun = engine.unused_data.lstrip(b"\0"), zlib.decompressobj(wbits=31), False
    if begun:
        raise ValueError("it is a gzip file that ends too early")
