"""Text files in pieces: their encoding, their lines, the delimiter of their tables, and gzip. Memory is bounded.

Chunks of bytes come in, texts and lines go out; `manifests` reads with these functions. ValueError names the fault of a file.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator

LONGEST_LINE = 64 << 20
"""Most characters of one line or one cell: as many as an item may have."""
_DELIMITERS = ",;\t"
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_PIECE = 1 << 16


def allow_long_cells() -> None:
    """Let the csv module take cells of up to LONGEST_LINE characters. Its bound, at first 131,072, holds for the whole process."""
    if csv.field_size_limit() < LONGEST_LINE:
        csv.field_size_limit(LONGEST_LINE)


def text_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """A file as text, in pieces, without its byte order mark: UTF-8, or UTF-16 if the mark says so (Excel writes it).

    Bytes that are not text become lone surrogates, so that they spoil only their own line.
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
    """A text in pieces. If its lines end with CR alone, as in Excel's "CSV (Macintosh)", they end with LF here.

    The first 65,536 characters decide: such a text has a CR there and no LF.
    """
    texts, head = iter(texts), ""
    while len(head) < _PIECE and "\n" not in head and (more := next(texts, None)) is not None:
        head += more
    alone = "\n" not in head and "\r" in head[:-1]
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for text in itertools.chain([head], texts):
        yield decoder.decode(text) if alone else text


def lines_of(texts: Iterable[str], *, most: int = LONGEST_LINE) -> Iterator[str]:
    """The lines of a text in pieces, with their ends (LF or CRLF). Raises ValueError for a line of more than `most` characters."""
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
    """The column, from 1, of the first character in a line of `text_of` that is not text; None if all are."""
    if line.isascii():
        return None if "\0" not in line else line.index("\0") + 1
    try:
        line.encode()
    except UnicodeEncodeError as error:
        return error.start + 1
    return None if "\0" not in line else line.index("\0") + 1


def delimiter_of(header: str) -> str:
    """The delimiter of a table, from its first line: a comma, or the semicolon or tab that Excel writes in some countries."""
    outside = "".join(header.split('"')[::2])
    return next((one for one in _DELIMITERS if one in outside), ",")


def unzipped(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The content of a gzip file, in pieces of bounded size. Raises ValueError for any other file, and for one that is cut off."""
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
