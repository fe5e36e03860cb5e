"""Why parameters of transformers are refused: one sentence for each. docs/same-as-transformers.md lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_POOL = "it belongs to how a pool loads and runs its model; say it in fleet.toml"
_ASSISTANT = "assisted generation belongs to how a pool runs its model, and changes only how fast a text is written"
_CODE = "it would load code from the Hub, which no call may do"
_GONE = "transformers 5 does it with code from the Hub only, which no call may load"
_INTERNALS = (
    "a result holds what was written and none of the model's inner numbers, which take megabytes for each token"
)
_OBJECT = "it is Python code, and a worker runs none of its callers'"
_TIME = "what others ask for at the same time would change the result; let the job end with expires, or pass timeout to the call"
_TEMPLATE = "it would reach the model's chat template unchecked; write what it says into a message of the chat"
_KEYWORDS = "pass what it holds as parameters of the call"

REASONS: Mapping[str, str] = {
    "custom_generate": _CODE,
    "trust_remote_code": _POOL,
    "chat_template": "the model's own template is used, since a template is a program",
    "tools": _TEMPLATE,
    "documents": _TEMPLATE,
    "assistant_model": _ASSISTANT,
    "assistant_tokenizer": _ASSISTANT,
    "is_assistant": _ASSISTANT,
    "num_assistant_tokens": _ASSISTANT,
    "num_assistant_tokens_schedule": _ASSISTANT,
    "assistant_confidence_threshold": _ASSISTANT,
    "assistant_early_exit": _ASSISTANT,
    "assistant_lookbehind": _ASSISTANT,
    "target_lookbehind": _ASSISTANT,
    "assistant_ensemble_weight": _ASSISTANT,
    "speculation_type": _ASSISTANT,
    "prompt_lookup_num_tokens": _ASSISTANT,
    "max_matching_ngram_size": _ASSISTANT,
    "use_mtp": _ASSISTANT,
    "cache_implementation": _POOL,
    "cache_config": _POOL,
    "max_cache_len": _POOL,
    "prefill_chunk_size": _POOL,
    "compile_config": _POOL,
    "disable_compile": _POOL,
    "continuous_batching_config": "a worker batches by itself",
    "low_memory": _GONE,
    "penalty_alpha": _GONE,
    "dola_layers": _GONE,
    "diversity_penalty": _GONE,
    "num_beam_groups": _GONE,
    "constraints": _GONE,
    "force_words_ids": _GONE,
    "output_attentions": _INTERNALS,
    "output_hidden_states": _INTERNALS,
    "output_scores": _INTERNALS,
    "output_logits": _INTERNALS,
    "return_dict_in_generate": _INTERNALS,
    "return_segments": _INTERNALS,
    "return_token_timestamps": 'pass return_timestamps="word"',
    "max_time": _TIME,
    "timeout": "a worker opens no URL; how many seconds to wait for a result is said to the call of a pipeline or to result()",
    "token_healing": "it changes the prompt by a search of its own, which has not been shown to leave neighbours in a batch alone",
    "streamer": "tokens come with the result and not one by one",
    "stopping_criteria": f"{_OBJECT}; pass stop, max_new_tokens or eos_token_id",
    "logits_processor": f"{_OBJECT}; pass bad_words_ids, sequence_bias or suppress_tokens",
    "prefix_allowed_tokens_fn": f"{_OBJECT}; pass sequence_bias or suppress_tokens",
    "monitor_progress": _OBJECT,
    "synced_gpus": _POOL,
    "negative_prompt_ids": "it is a tensor of tokens that only guidance_scale reads; guidance here is away from an empty prompt",
    "model_kwargs": _POOL,
    "preprocess_params": "pass what the model takes as forward_params or generate_kwargs",
    "generation_config": "pass a GenerationConfig to pipeline(), to submit or to map, or what it holds as parameters",
    "generate_kwargs": _KEYWORDS,
    "tokenizer_kwargs": _KEYWORDS,
    "tokenize_kwargs": _KEYWORDS,
    "processor_kwargs": "the model's own processor settings are used: others could ask for any amount of memory",
    "load_audio_from_video": "send the sound and the film as two parts of the message",
    "generation_mode": "models write text here; text-to-audio is the task for sound",
    "parameters": _KEYWORDS,
    "forced_decoder_ids": "it is an older way to say the language and the task; pass those",
    "return_all_scores": "transformers 5 has it no more; pass top_k=None",
    "grouped_entities": 'transformers 5 has it no more; pass aggregation_strategy="simple"',
    "ignore_subwords": 'transformers 5 has it no more; pass aggregation_strategy="first"',
    "offset_mapping": "the worker's tokenizer knows where its tokens stand",
    "multi_class": "transformers 5 has it no more; pass multi_label",
    "tesseract_config": "it would be part of a command line",
    "lang": "words are read in English; pass word_boxes for a page in another language",
    "decoder_kwargs": "it is for a decoder with a language model, which no pool loads",
    "max_hole_area": "no model of this task takes it",
    "max_sprinkle_area": "no model of this task takes it",
    "binary_output": "results are JSON",
    "args_parser": _OBJECT,
}
"""Reasons by parameter, for every task that does not take the parameter."""

OF_A_TASK: Mapping[tuple[str, str], str] = {
    ("automatic-speech-recognition", "num_return_sequences"): "a recording has one transcription",
    ("automatic-speech-recognition", "stop_strings"): "a transcription ends where its recording does",
    ("document-question-answering", "num_return_sequences"): "a page has one answer, also in transformers",
    ("document-question-answering", "padding"): "pages are padded to their batch, which the model does not see",
    ("zero-shot-image-classification", "tokenizer_kwargs"): "transformers ignores it as well",
}
"""Reasons by task and parameter, where the task has a reason of its own."""
_GENERATION = frozenset({"num_return_sequences", "stop_strings", "encoder_repetition_penalty", "guidance_scale",
                         "encoder_no_repeat_ngram_size", "decoder_start_token_id", "watermarking_config", "early_stopping",
                         "length_penalty", "num_beams"})  # fmt: skip
_WRITERS = frozenset({"automatic-speech-recognition", "text-to-audio", "table-question-answering",
                      "document-question-answering", "summarization", "translation", "translation_xx_to_yy",
                      "text2text-generation", "image-to-text", "visual-question-answering"})  # fmt: skip
_UNHEARD = "the models of this task do not hear it, or it has not been shown to leave neighbours in a batch alone"
_NOTHING: Mapping[str, float] = {
    "num_beam_groups": 1, "diversity_penalty": 0, "penalty_alpha": 0, "num_return_sequences": 1,
}  # fmt: skip
"""Numbers with which generate() does as it does without the parameter."""


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a refused parameter has the value of a call without it: None, False, nothing in it, or a neutral number."""
    if isinstance(value, str | list | Mapping):
        return not value
    return value is None or value is False or (name in _NOTHING and value == _NOTHING[name])


def why_refused(task: str, name: str) -> str | None:
    """Why `task` does not take a parameter of transformers; None for a name that transformers does not know."""
    reason = OF_A_TASK.get((task, name), REASONS.get(name))
    return _UNHEARD if reason is None and name in _GENERATION and task in _WRITERS else reason
