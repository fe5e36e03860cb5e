"""The adapter of video-classification: the first frames of a clip, decoded here and passed to the image processor as pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.base import Adapter, shape_key
from pipefleet_workers.inputs.video import Clip, Frame
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit


class VideoClassifier(Adapter):
    """video-classification. It takes the first `num_frames` of a clip, `frame_sampling_rate` apart, as in transformers."""

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        arguments = self.parse(decoded.work.parameters)
        features = self._features(self._frames(decoded.value, arguments))
        assembly = Assembly(decoded.work, expected=1, context=arguments)
        length = max(value.numel() for value in features.values())
        return [Unit(assembly, 0, (arguments.forward_key, shape_key(features)), length, features)]

    def _frames(self, clip: Clip, arguments: Arguments) -> list[Frame]:
        wanted = arguments.preprocess.get("num_frames") or getattr(self.pipe.model.config, "num_frames", None)
        if wanted is None:
            raise ItemError("bad_parameter", "the model does not say how many frames it takes; pass num_frames", STAGE)
        rate = arguments.preprocess.get("frame_sampling_rate", 1)
        frames = clip.frames(np.linspace(0, wanted * rate - 1, num=wanted, dtype=np.int64).tolist())
        if len(frames) < wanted:
            text = f"{clip.blob.uri} ends before frame {wanted * rate}: {len(frames)} of {wanted} frames are there"
            raise ItemError("too_short", text + "; pass a smaller num_frames or frame_sampling_rate", STAGE)
        return frames

    def _features(self, frames: list[Frame]) -> dict[str, Any]:
        pipe = self.copies.get()
        if pipe.image_processor is not None:
            found = pipe.image_processor(frames, return_tensors="pt")
        else:  # a video processor alone would choose its own frames, and open files
            found = pipe.video_processor(np.stack(frames), do_sample_frames=False, return_tensors="pt")
        return dict(found.to(pipe.dtype))
