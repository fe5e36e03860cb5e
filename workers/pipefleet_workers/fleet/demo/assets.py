"""Paths of the project's own sample media, in `samples/` inside the package.

`run` and the tests read them. They are small (under 1.6 MB in all) and free of other people's rights; `samples/README.md` names
their sources.
"""

from importlib.resources import files
from pathlib import Path

_SPEECH = (".flac", ".m4a", ".mp3", ".ogg", ".wav")
_PICTURES = (".jpg", ".png")


def recordings() -> list[Path]:
    """24 recordings of one speaker, sorted by name: 16 kHz, one channel, 2 to 60 s, five formats."""
    return _with_suffixes(_SPEECH)


def transcripts() -> dict[str, str]:
    """The sentences spoken in each recording, by its file name."""
    lines = (_samples() / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)


def pictures() -> list[Path]:
    """Six drawn pictures of 320 by 240 pixels, sorted by name: PNG and JPEG."""
    return _with_suffixes(_PICTURES)


def texts() -> Path:
    """The path of a JSONL manifest of 400 texts of 1 to 12 sentences, lines `{"id": "text-000", "inputs": "…"}`."""
    return _samples() / "texts.jsonl"


def _with_suffixes(suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in _samples().iterdir() if path.suffix in suffixes)


def _samples() -> Path:
    # S3 clients and decoders need a folder on disk; the wheel is never imported from inside a zip.
    return Path(str(files(__package__))) / "samples"
