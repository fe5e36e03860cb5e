"""The pipeline of visual-question-answering: a picture and a question go in, answers come out.

transformers 5 has the models, but no longer the pipeline. The adapters of `vision.question_answering` run its stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForVisualQuestionAnswering, GenerationConfig
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from pipefleet_workers.adapters.pipelines.image_to_text import generate

NAME = "pipefleet/visual-question-answering"


class VisualQuestionAnsweringPipeline(Pipeline):  # type: ignore[misc]  # transformers has no types
    """A dict of a PIL `image` and a `question` in.

    A model that classifies (ViLT) returns `[{"score": …, "answer": …}]`; a model that writes (BLIP) returns `[{"answer": …}]`.
    """

    _load_processor = None
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True
    _pipeline_calls_generate = True
    _non_generation_params = ("top_k",)
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def _sanitize_parameters(
        self, top_k: int | None = None, truncation: bool | None = None, padding: Any = None, **generate_kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        # A question is prepared alone, so it needs no padding.
        before = {} if truncation is None else {"truncation": truncation}
        return before, generate_kwargs, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, inputs: Mapping[str, Any], truncation: bool = False) -> dict[str, Any]:
        """The tensors of picture and question."""
        picture, question = inputs["image"], inputs["question"]
        if self.model.can_generate() and self.processor is not None:
            both = self.processor(images=picture, text=question, truncation=truncation, return_tensors="pt")
            return dict(both.to(self.dtype))
        seen = self.image_processor(images=picture, return_tensors="pt").to(self.dtype)
        return {**self.tokenizer(question, return_tensors="pt", truncation=truncation), **seen}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, torch.Tensor]:
        if self.model.can_generate():
            return {"output_ids": generate(self, model_inputs, generate_kwargs)}
        return {"logits": self.model(**model_inputs).logits}

    def postprocess(self, model_outputs: dict[str, torch.Tensor], top_k: int = 5) -> list[dict[str, Any]]:
        """The `top_k` answers with the highest scores, or the written answers."""
        if "output_ids" in model_outputs:
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in model_outputs["output_ids"]]
            return [{"answer": text.strip()} for text in texts]
        names = self.model.config.id2label
        scores, ids = model_outputs["logits"][0].float().sigmoid().topk(min(top_k, self.model.config.num_labels))
        return [{"score": score, "answer": names[id]} for score, id in zip(scores.tolist(), ids.tolist(), strict=True)]


PIPELINE_REGISTRY.register_pipeline(
    NAME, pipeline_class=VisualQuestionAnsweringPipeline, pt_model=AutoModelForVisualQuestionAnswering
)
