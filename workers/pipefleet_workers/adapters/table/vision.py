"""Tasks whose input is pictures or video alone."""

from __future__ import annotations

from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.pipelines import image_to_image
from pipefleet_workers.adapters.table.row import IMAGE, Sizing, TaskRuntime
from pipefleet_workers.adapters.vision.features import ImageFeatures
from pipefleet_workers.adapters.vision.masks import MaskGenerator
from pipefleet_workers.adapters.vision.sized import DepthEstimator, KeypointMatcher, SizedPictures
from pipefleet_workers.adapters.vision.video import VideoClassifier

_VIDEO = Sizing(slice_items=1, cpu_cost=IMAGE.cpu_cost, gpu_cost=IMAGE.gpu_cost)
_POINTS = Sizing(slice_items=1, cpu_cost=64, gpu_cost=256)

ROWS = {
    "depth-estimation": TaskRuntime(DepthEstimator, IMAGE),
    "image-classification": TaskRuntime(Adapter, IMAGE),
    "image-feature-extraction": TaskRuntime(ImageFeatures, IMAGE),
    "image-segmentation": TaskRuntime(SizedPictures, IMAGE),
    "image-to-image": TaskRuntime(Adapter, IMAGE, transformers_task=image_to_image.NAME),
    "keypoint-matching": TaskRuntime(KeypointMatcher, IMAGE),
    "mask-generation": TaskRuntime(MaskGenerator, _POINTS),
    "object-detection": TaskRuntime(SizedPictures, IMAGE),
    "video-classification": TaskRuntime(VideoClassifier, _VIDEO),
}
