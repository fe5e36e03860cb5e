"""The pipeline of image-to-image: a model turns a picture into a new picture, such as a larger one.

transformers 5 has the models, but no longer the pipeline. The base `Adapter` runs its stages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageToImage
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

NAME = "pipefleet/image-to-image"


class ImageToImagePipeline(Pipeline):  # type: ignore[misc]  # transformers has no types
    """A PIL image in, a PIL image out. The stages work as in transformers 4."""

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {}, {}

    def preprocess(self, image: Image.Image) -> Any:
        """`pixel_values`, in the picture's own size, rounded up to a size that the model accepts."""
        return self.image_processor(images=[image], return_tensors="pt").to(self.dtype)

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"reconstruction": self.model(**model_inputs).reconstruction}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> Image.Image:
        """The model's picture, in the model's size."""
        pixels = model_outputs["reconstruction"][0].float().clamp(0, 1).permute(1, 2, 0).numpy()
        return Image.fromarray((pixels * 255.0).round().astype(np.uint8))


PIPELINE_REGISTRY.register_pipeline(NAME, pipeline_class=ImageToImagePipeline, pt_model=AutoModelForImageToImage)
