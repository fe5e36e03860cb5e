"""The adapter of video-classification: a clip goes in, scores of labels come out.

It decodes only the frames that the model wants, and gives them to the model's processor as pictures. Clips share a batch if their
tensors have one shape. Raises ItemError: bad_parameter without a number of frames, too_short for a clip with fewer frames, and the
errors of `Clip.frames`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata

from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.base import Adapter, shape_key
from pipefleet_workers.inputs.video import Clip, Frame
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit


class VideoClassifier(Adapter):
    """video-classification, with the frames that transformers takes.

    Without a video processor: `num_frames` frames from the start of the clip, `frame_sampling_rate` apart. A video processor
    chooses its frames itself, spread over the whole clip.
    """

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
        places = self._places(clip, wanted, arguments.preprocess.get("frame_sampling_rate", 1))
        frames = clip.frames(places)
        if len(frames) < wanted:
            text = f"{clip.blob.uri} ends before frame {places[-1] + 1}: {len(frames)} of {wanted} frames are there"
            raise ItemError("too_short", text + "; pass a smaller num_frames or frame_sampling_rate", STAGE)
        return frames

    def _places(self, clip: Clip, wanted: int, rate: int) -> list[int]:
        processor = self.copies.get().video_processor
        if processor is None:
            return [int(place) for place in np.linspace(0, wanted * rate - 1, num=wanted, dtype=np.int64)]
        about = VideoMetadata(total_num_frames=clip.count(), fps=clip.rate())
        try:
            found = processor.sample_frames(metadata=about, num_frames=wanted, fps=getattr(processor, "fps", None))
        except ValueError as error:
            raise ItemError("too_short", f"{clip.blob.uri}: {error}", STAGE) from None
        return [int(place) for place in found]

    def _features(self, frames: list[Frame]) -> dict[str, Any]:
        pipe = self.copies.get()
        if pipe.video_processor is None:
            found = pipe.image_processor(frames, return_tensors="pt")
        else:  # without sampling: to sample frames, the processor would open a file
            found = pipe.video_processor(np.stack(frames), do_sample_frames=False, return_tensors="pt")
        return dict(found.to(pipe.dtype))
