"""Makes the sample media of `pipefleet demo` again: `python -m tests.samples`.

In: `passages.txt`, sentences of nineteenth-century books. Out: recordings and their `transcripts.tsv`,
pictures, `texts.jsonl`, always the same with the same tools. Needs the program espeak-ng (1.51 was used; on Debian
`apt install espeak-ng`) and the `workers` extra. The samples are kept with the project: run this only to change them.
"""

import io
import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import soundfile

from pipefleet_workers.fleet.demo import assets
from tests.samples.pictures import make_pictures

Passages = dict[str, list[str]]
Samples = npt.NDArray[np.int16]

RATE = 16_000
_PASSAGES = Path(__file__).with_name("passages.txt")
_SAMPLES = assets.texts().parent
# Whisper tiny.en understood no voice clearly better, see the figures in samples/README.md.
_VOICE, _WORDS_PER_MINUTE = "en-us", 150
_CODECS = {".mp3": "libmp3lame", ".ogg": "libopus", ".m4a": "aac"}
_BIT_RATE = 24_000
# How many texts have 1, 2, 3 … 12 sentences: most are short and a few are long, as in real collections.
_TEXTS_BY_SENTENCES = (90, 70, 50, 40, 32, 28, 22, 18, 16, 14, 10, 10)


@dataclass(frozen=True, slots=True)
class Recording:
    """`count` sentences of `passage` from number `first` on, stored in the format of `suffix`."""

    passage: str
    first: int
    count: int
    suffix: str

    @property
    def name(self) -> str:
        """The file's name in `samples/`."""
        return f"{self.passage}-{self.first:02d}{self.suffix}"


RECORDINGS = (
    Recording("carol", 0, 1, ".wav"),
    Recording("pride", 10, 1, ".wav"),
    Recording("walden", 1, 1, ".wav"),
    Recording("alice", 3, 1, ".flac"),
    Recording("holmes", 12, 2, ".flac"),
    Recording("time", 3, 1, ".flac"),
    Recording("walden", 3, 1, ".flac"),
    Recording("alice", 7, 1, ".mp3"),
    Recording("carol", 15, 2, ".mp3"),
    Recording("gettysburg", 0, 8, ".mp3"),
    Recording("holmes", 8, 1, ".mp3"),
    Recording("moby", 3, 1, ".mp3"),
    Recording("time", 9, 2, ".mp3"),
    Recording("walden", 13, 3, ".mp3"),
    Recording("alice", 9, 8, ".ogg"),
    Recording("carol", 4, 3, ".ogg"),
    Recording("holmes", 14, 1, ".ogg"),
    Recording("pride", 11, 2, ".ogg"),
    Recording("treasure", 5, 2, ".ogg"),
    Recording("carol", 18, 1, ".m4a"),
    Recording("moby", 12, 2, ".m4a"),
    Recording("time", 5, 1, ".m4a"),
    Recording("treasure", 8, 2, ".m4a"),
    Recording("walden", 4, 6, ".m4a"),
)


def main() -> int:
    """Write every sample; 0, or 2 with a sentence on standard error when espeak-ng is not installed."""
    if shutil.which("espeak-ng") is None:
        print("espeak-ng is not installed; install it (on Debian: apt install espeak-ng).", file=sys.stderr)
        return 2
    passages = read_passages(_PASSAGES.read_text())
    make_recordings(passages)
    make_pictures(_SAMPLES)
    make_texts(passages)
    return 0


def read_passages(text: str) -> Passages:
    """Split the content of `passages.txt`: a line `# name: source` opens a passage of one sentence a line."""
    passages: Passages = {}
    for line in filter(None, text.splitlines()):
        if line.startswith("# "):
            sentences = passages.setdefault(line[2:].partition(":")[0], [])
        else:
            sentences.append(line)
    return passages


def make_recordings(passages: Passages) -> None:
    """Speak and store `RECORDINGS`, and list them in `transcripts.tsv`: file name, tab, sentences."""
    rows = []
    for recording in RECORDINGS:
        text = " ".join(passages[recording.passage][recording.first : recording.first + recording.count])
        store(speak(text), _SAMPLES / recording.name)
        rows.append(f"{recording.name}\t{text}\n")
    (_SAMPLES / "transcripts.tsv").write_text("".join(rows))


def speak(text: str) -> Samples:
    """Synthesise `text` at 16 kHz, one channel; raises `CalledProcessError` when espeak-ng fails."""
    command = ["espeak-ng", "-v", _VOICE, "-s", str(_WORDS_PER_MINUTE), "--stdout", text]
    wav = subprocess.run(command, check=True, capture_output=True).stdout
    audio, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    return resampled(audio, rate)


def resampled(samples: Samples, rate: int) -> Samples:
    """`samples` of one channel at `rate` Hz, at 16 kHz."""
    frame = av.AudioFrame.from_ndarray(samples[np.newaxis, :], format="s16", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
    pieces = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([piece.to_ndarray()[0] for piece in pieces])


def store(samples: Samples, path: Path) -> None:
    """Encode `samples` in the format of the suffix of `path`; lossy formats at 24 kbit/s."""
    if path.suffix in (".wav", ".flac"):
        soundfile.write(path, samples, RATE, subtype="PCM_16")
        return
    # bitexact leaves out encoder versions and random stream numbers, so the same sound gives the same file.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(_CODECS[path.suffix], rate=RATE, layout="mono")
        assert isinstance(stream, av.AudioStream)
        stream.bit_rate = _BIT_RATE
        stream.codec_context.options = {"flags": "+bitexact"}
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis, :], format="s16", layout="mono")
        frame.sample_rate = RATE
        for part in (frame, None):
            container.mux(stream.encode(part))


def make_texts(passages: Passages) -> None:
    """Write `texts.jsonl`: 400 different runs of 1 to 12 neighbouring sentences, as lines of a manifest."""
    chooser = random.Random(19)
    texts: list[str] = []
    for sentences, count in enumerate(_TEXTS_BY_SENTENCES, start=1):
        texts += chooser.sample(_runs(passages, sentences), count)
    chooser.shuffle(texts)
    lines = (json.dumps({"id": f"text-{number:03d}", "inputs": text}) for number, text in enumerate(texts))
    (_SAMPLES / "texts.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _runs(passages: Passages, length: int) -> list[str]:
    return [
        " ".join(sentences[first : first + length])
        for sentences in passages.values()
        for first in range(len(sentences) - length + 1)
    ]


if __name__ == "__main__":
    raise SystemExit(main())
