"""The pipelines of text2text-generation, summarization and translation: encoder-decoders that write.

transformers 5 has none of these pipelines. `TextRewriter` runs their stages.

As in transformers 4, a T5-like checkpoint names parameters and a prefix for each task of its training (`task_specific_params`).
A multilingual model gets its two languages as codes of its own tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForSeq2SeqLM, GenerationConfig
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from pipefleet_workers.adapters.arguments import generate_arguments

PREFIX = "pipefleet/"
_GENERATION = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
_SHOWN = {"clean_up_tokenization_spaces", "return_tensors", "return_text"}
_Sets = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
_OTHER_BOUND = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}


class Text2TextPipeline(Pipeline):  # type: ignore[misc]  # transformers has no types
    """A text in; a list of `{generated_text}` out, one for each sequence."""

    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256, num_beams=4)
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    trained_task = "text2text-generation"
    """Name of the task in the model's `task_specific_params`."""
    result_key = "generated_text"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Every call merges the trained parameters again: if they were kept here, a call could not override them.
        self._forward_params: dict[str, Any] = {}

    def _sanitize_parameters(self, **parameters: Any) -> _Sets:
        given = {name: value for name, value in parameters.items() if value is not None or name in _GENERATION}
        pre = {name: given.pop(name) for name in {"truncation"} & given.keys()}
        post = {name: given.pop(name) for name in _SHOWN & given.keys()}
        if post.pop("return_text", True) is False:
            post.setdefault("return_tensors", True)
        trained, forward = self._trained(self.trained_task, given)
        return {**pre, **trained}, forward, post

    def preprocess(self, text: str, truncation: bool = False, prefix: str = "") -> Any:
        """The tokens of one text, after the prefix of its task."""
        prefix = prefix or getattr(self.model.config, "prefix", None) or ""
        inputs = self.tokenizer(prefix + text, return_tensors="pt", truncation=truncation)
        inputs.pop("token_type_ids", None)
        return inputs

    def _forward(self, model_inputs: dict[str, Any], **generation: Any) -> dict[str, Any]:
        rows = len(model_inputs["input_ids"])
        written = self.model.generate(**model_inputs, **generate_arguments(self, generation))
        return {"output_ids": written.reshape(rows, -1, written.shape[-1])}

    def postprocess(
        self,
        model_outputs: Mapping[str, Any],
        clean_up_tokenization_spaces: bool = False,
        return_tensors: bool = False,
    ) -> Any:
        """The texts of one input's sequences, or their tokens."""
        if return_tensors:
            name = f"{self.result_key.removesuffix('_text')}_token_ids"
            return [{name: list(ids)} for ids in model_outputs["output_ids"][0]]
        return [
            {
                self.result_key: self.tokenizer.decode(
                    ids, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up_tokenization_spaces
                )
            }
            for ids in model_outputs["output_ids"][0]
        ]

    def _trained(self, task: str, generation: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of preprocess and generate(): the config's parameters for this task, below the parameters of the call."""
        own = (getattr(self.model.config, "task_specific_params", None) or {}).get(task) or {}
        hidden = {name for name, other in _OTHER_BOUND.items() if other in generation}
        defaults = {name: value for name, value in own.items() if name in _GENERATION and name not in hidden}
        prefix = own.get("prefix")
        return ({"prefix": prefix} if prefix else {}), {**defaults, **generation}


class SummarizationPipeline(Text2TextPipeline):
    """A text in; a list of `{summary_text}` out."""

    trained_task = "summarization"
    result_key = "summary_text"


class TranslationPipeline(Text2TextPipeline):
    """A text in; a list of `{translation_text}` out."""

    trained_task = "translation"
    result_key = "translation_text"

    def _sanitize_parameters(self, **parameters: Any) -> _Sets:
        src_lang, tgt_lang = parameters.pop("src_lang", None), parameters.pop("tgt_lang", None)
        pre, forward, post = super()._sanitize_parameters(**parameters)
        if src_lang is None or tgt_lang is None:
            return pre, forward, post
        trained, forward = self._trained(f"translation_{src_lang}_to_{tgt_lang}", forward)
        if self._is_multilingual:
            for code in (src_lang, tgt_lang):
                self._check_language(code)
            pre = {**pre, "src_lang": src_lang, "tgt_lang": tgt_lang}
            forward = {**forward, "forced_bos_token_id": self._inputs("", src_lang, tgt_lang)["forced_bos_token_id"]}
        return {**pre, **trained}, forward, post

    def preprocess(
        self,
        text: str,
        truncation: bool = False,
        prefix: str = "",
        src_lang: str | None = None,
        tgt_lang: str | None = None,
    ) -> Any:
        """The tokens of one text in its language. Raises ValueError when a multilingual model gets no languages."""
        if not self._is_multilingual:
            return super().preprocess(text, truncation, prefix)
        inputs = self._inputs(text, src_lang, tgt_lang, truncation=truncation)
        for name in ("forced_bos_token_id", "token_type_ids"):
            inputs.pop(name, None)
        return inputs

    @property
    def languages(self) -> list[str]:
        """The codes of the languages that the tokenizer knows; empty if the model has only one pair."""
        if not self._is_multilingual:
            return []
        return list(getattr(self.tokenizer, "lang_code_to_id", None) or self.tokenizer.extra_special_tokens)

    @property
    def _is_multilingual(self) -> bool:
        return hasattr(self.tokenizer, "_build_translation_inputs")

    def _inputs(self, text: str, src_lang: str | None, tgt_lang: str | None, **arguments: Any) -> Any:
        return self.tokenizer._build_translation_inputs(
            text, return_tensors="pt", src_lang=src_lang, tgt_lang=tgt_lang, **arguments
        )

    def _check_language(self, code: str) -> None:
        """Raise ValueError for a code that the tokenizer does not know: the model would then write in any language."""
        known = self.languages
        if not {code, f"__{code}__"} & set(known):
            raise ValueError(f"the model knows no language {code!r}, but {', '.join(known[:20])} …")


for _pipeline in (Text2TextPipeline, SummarizationPipeline, TranslationPipeline):
    PIPELINE_REGISTRY.register_pipeline(
        PREFIX + _pipeline.trained_task, pipeline_class=_pipeline, pt_model=AutoModelForSeq2SeqLM
    )
