"""Computes Whisper's spectrogram of a long recording block by block. In one piece it takes seven times the memory of the samples.

Each frame depends only on its own 400 samples; only the loudest value is searched over the whole recording. The results equal the
extractor's own results exactly. `speech` switches it on once for each pipeline.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch

LONG_SECONDS = 120
"""Recordings up to this length are computed in one piece."""
_BLOCK_FRAMES = 6_000


def read_in_blocks(extractor: Any) -> None:
    """Let an extractor of Whisper's kind compute long recordings block by block; any other extractor stays unchanged."""
    if hasattr(extractor, "_torch_extract_fbank_features") and not getattr(extractor, "dither", 0.0):
        extractor._torch_extract_fbank_features = types.MethodType(_features, extractor)


def _features(extractor: Any, waveform: np.ndarray[Any, Any], device: str = "cpu") -> np.ndarray[Any, Any]:
    """The result of the extractor's own method for `[recordings, samples]`."""
    if waveform.shape[-1] <= LONG_SECONDS * extractor.sampling_rate or len(waveform) > 1:
        own: np.ndarray[Any, Any] = type(extractor)._torch_extract_fbank_features(extractor, waveform, device)
        return own
    window = torch.hann_window(extractor.n_fft)
    filters = torch.from_numpy(extractor.mel_filters).to(torch.float32).T.contiguous()
    samples = torch.from_numpy(waveform[0]).to(torch.float32)
    count = samples.shape[0] // extractor.hop_length
    logs = torch.empty((filters.shape[0], count))
    for first in range(0, count, _BLOCK_FRAMES):
        last = min(first + _BLOCK_FRAMES, count)
        logs[:, first:last] = filters @ _powers(extractor, samples, first, last, window)
    logs.clamp_(min=1e-10).log10_()
    torch.maximum(logs, logs.max() - 8.0, out=logs)
    return logs.add_(4.0).div_(4.0)[None].numpy()


def _powers(extractor: Any, samples: torch.Tensor, first: int, last: int, window: torch.Tensor) -> torch.Tensor:
    """The powers of frames `first` to `last`, `[frequencies, frames]`.

    Frames are centred: their samples begin half a frame earlier.
    """
    half, hop = extractor.n_fft // 2, extractor.hop_length
    begin, end = first * hop - half, (last - 1) * hop + half
    piece = samples[max(0, begin) : end]
    margins = (max(0, -begin), max(0, end - samples.shape[0]))
    if any(margins):
        piece = torch.nn.functional.pad(piece[None], margins, mode="reflect")[0]
    found = torch.stft(piece, extractor.n_fft, hop, window=window, center=False, return_complex=True)
    return found.abs().square()
