"""The pipeline of image-to-text: a picture goes in, perhaps with a prompt; its caption comes out.

transformers 5 has the models, but no longer the pipeline. `EqualWriter` runs its stages. An input that the model cannot take
raises ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from pipefleet_workers.adapters.arguments import generate_arguments

NAME = "pipefleet/image-to-text"
_UNPROMPTED = ("pix2struct",)


class ImageToTextPipeline(Pipeline):  # type: ignore[misc]  # transformers has no types
    """A PIL image, or a dict of `image` and `text`, in; `[{"generated_text": …}]` out. Stages as in transformers 4."""

    _load_processor = None
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def _sanitize_parameters(
        self,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        **keywords: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        generation = {**(generate_kwargs or {}), **keywords}
        if max_new_tokens is not None:
            if "max_new_tokens" in generation:
                raise ValueError("max_new_tokens is given twice, once in generate_kwargs; pass it once")
            generation["max_new_tokens"] = max_new_tokens
        return {} if prompt is None else {"prompt": prompt}, generation, {}

    def preprocess(self, inputs: Image.Image | Mapping[str, Any], prompt: str | None = None) -> Any:
        """The picture's tensors, with the tokens of a prompt if there is one.

        Raises ValueError for an input that the model cannot take.
        """
        if isinstance(inputs, Mapping):
            prompt = inputs.get("text", prompt)
            inputs = _picture(inputs)
        if prompt is None:
            return self.image_processor(images=inputs, return_tensors="pt").to(self.dtype)
        kind = self.model.config.model_type
        if kind in _UNPROMPTED:
            raise ValueError(f"a {kind} model takes no text beside the picture")
        if kind == "vision-encoder-decoder":
            found = self.image_processor(images=inputs, return_tensors="pt").to(self.dtype)
            ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
            return {**found, "decoder_input_ids": ids}
        return self._prompted(inputs, prompt)

    def _prompted(self, picture: Image.Image, prompt: str) -> Any:
        if self.model.config.model_type == "git":  # GIT's prompt begins with [CLS], without a [SEP]
            found = self.image_processor(images=picture, return_tensors="pt").to(self.dtype)
            words = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            return {**found, "input_ids": torch.tensor([[self.tokenizer.cls_token_id, *words]])}
        if self.processor is not None:
            return self.processor(images=picture, text=prompt, return_tensors="pt").to(self.dtype)
        found = self.image_processor(images=picture, return_tensors="pt").to(self.dtype)
        tokens = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        return {**found, **tokens}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, torch.Tensor]:
        return {"output_ids": generate(self, model_inputs, generate_kwargs)}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        """A record for each sequence; the text includes the prompt, since the model repeats it."""
        decode = self.tokenizer.decode
        return [{"generated_text": decode(ids, skip_special_tokens=True)} for ids in model_outputs["output_ids"]]


def generate(pipe: Any, model_inputs: Mapping[str, Any], given: Mapping[str, Any]) -> torch.Tensor:
    """The sequences that a model writes, `[sequences, tokens]`; the pipeline's defaults fill in missing arguments."""
    arguments = generate_arguments(pipe, given)
    if type(pipe.model).generate is not GenerationMixin.generate:
        arguments.pop("pad_token_id", None)  # such a model passes its own padding token to its decoder
    found: torch.Tensor = pipe.model.generate(**model_inputs, **arguments)
    return found


def _picture(inputs: Mapping[str, Any]) -> Image.Image:
    found: Image.Image | None = inputs.get("image", inputs.get("images"))
    if found is None:
        raise ValueError("image-to-text takes a picture; the input holds none")
    return found


PIPELINE_REGISTRY.register_pipeline(NAME, pipeline_class=ImageToTextPipeline, pt_model=AutoModelForImageTextToText)
