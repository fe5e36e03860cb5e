"""Pieces that the builders of all modalities share: sizes, label maps, sharper heads, and saving."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers as hf

#: Sizes of a transformer stack; the wide initialisation makes random answers depend on the input.
STACK: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def labels(*names: str) -> dict[str, Any]:
    """The two label maps of a classification config."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def bert_sizes(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Arguments of a BERT-like config that fit `tokenizer`, with `changes` on top."""
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    return {**STACK, **NO_DROPOUT, **sizes, **changes}


def token_ids(tokenizer: Any, *names: str) -> dict[str, int]:
    """Ids of the special tokens `names` (default: bos, eos, pad) as arguments such as `pad_token_id`."""
    fields = [f"{name}_token_id" for name in names or ("bos", "eos", "pad")]
    return {field: getattr(tokenizer, field) for field in fields}


def amplify(model: Any, head: str, gain: float) -> Any:
    """Multiply the weight matrices whose name contains `head`; returns the model.

    The head of a random model answers nearly the same to every input, which would hide a wrong batch.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if head in name and parameter.dim() > 1:
                parameter.mul_(gain)
    return model


def set_bias(bias: Any, values: Sequence[float] | float) -> None:
    """Overwrite a classifier's bias, so that a random detector finds something and not everything."""
    import torch

    with torch.no_grad():
        bias.copy_(torch.tensor(values))


def image_processor(name: str, **settings: Any) -> Any:
    """The image processor `name` in its Pillow form where there is one, else the only one.

    The Pillow form needs no torchvision and gives the same pixels on every machine.
    """
    try:
        return getattr(hf, name + "Pil")(**settings)
    except (AttributeError, ImportError):
        return getattr(hf, name)(**settings)


def save(directory: Path, model: Any, *processors: Any) -> None:
    """Write the weights (safetensors), the configs and the processors into `directory`."""
    model.eval()
    model.save_pretrained(directory)
    for processor in processors:
        processor.save_pretrained(directory)
    for name in _PROCESSOR_FILES:
        _use_neutral_processor_names(directory / name)


def _use_neutral_processor_names(file: Path) -> None:
    # The saved class name would pin the Pillow form even on a host that has torchvision.
    if file.exists():
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('ImageProcessorPil"', 'ImageProcessor"'), encoding="utf-8")
