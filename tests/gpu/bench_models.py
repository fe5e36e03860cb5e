"""Random weights in real shapes, and inputs of realistic sizes, made without a hub. A rehearsal takes tiny shapes.

Each `Load` writes a folder that `load_pipeline` reads, as it would read a downloaded model.
"""

from __future__ import annotations

import io
import random
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.benchmarks.pictures import pictures
from tests.checkpoints import audio
from tests.checkpoints.parts import amplify, image_processor, labels, save
from tests.gpu.plan import Order

SEED = 20_240_817
WORDS = 20_000
NEW_TOKENS = (8, 32, 64, 128)
"""How many tokens the requests of text generation ask for."""
SPOKEN_TOKENS = 48
"""Tokens that each recording's text has: a random model would end anywhere."""


@dataclass(frozen=True)
class Load:
    """One workload. `items` are texts or the bytes of media; `most` is how many are used at most on a GPU."""

    name: str
    task: str
    dtype: str
    write: Callable[[Path, Order], None]
    """Writes the model's folder."""
    items: Callable[[int, Order], list[Any]]
    most: int
    parameters: dict[str, Any] = field(default_factory=dict)
    least_agreement: float = 0.97
    """Share of the outputs that must equal those of the pipeline one by one."""
    batch_items: int = 64
    """Most items of a batch of pipefleet on a GPU: `max_batch_items` of a pool for such a model."""
    cpu_threads: int = 4
    """Threads that decode and preprocess, of pipefleet and of the raw loop alike; at most the cores."""


def _words(count: int = WORDS) -> list[str]:
    source = random.Random(SEED)
    return ["".join(source.choices("abcdefghijklmnoprstuvw", k=source.randint(3, 8))) + str(i) for i in range(count)]


def _bert(folder: Path, order: Order) -> None:
    """BERT-base with a vocabulary in which every word of the texts is a token."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_words()]
    tokenizer = hf.BertTokenizer(vocab={name: index for index, name in enumerate(names)}, model_max_length=512)
    small = {} if order.on_gpu else {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {} if order.on_gpu else {"intermediate_size": 128}
    config = hf.BertConfig(vocab_size=30_522, **small, **labels("harbour", "forest", "street", "kitchen", "meadow"))
    _save(
        folder,
        order,
        "float16",
        lambda: amplify(hf.BertForSequenceClassification(config), "classifier", 40.0),
        tokenizer,
    )


def _ragged_texts(count: int, order: Order) -> list[str]:
    """Seven of ten texts of 6 to 18 words, the others of 60 to 230."""
    source, words = random.Random(SEED), _words()
    lengths = [source.randint(6, 18) if source.random() < 0.7 else source.randint(60, 230) for _ in range(count)]
    return [" ".join(source.choices(words, k=length)) for length in lengths]


def _vit(folder: Path, order: Order) -> None:
    """ViT-B/16."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = hf.ViTConfig(**({} if order.on_gpu else small), **labels(*(f"thing {index}" for index in range(20))))
    processor = image_processor("ViTImageProcessor", size={"height": 224, "width": 224})
    _save(
        folder, order, "bfloat16", lambda: amplify(hf.ViTForImageClassification(config), "classifier", 60.0), processor
    )


def _jpegs(count: int, order: Order) -> list[bytes]:
    made = list(pictures(min(count, 40 if order.on_gpu else 12), SEED).values())
    return [made[index % len(made)] for index in range(count)]


def _whisper(folder: Path, order: Order) -> None:
    """Whisper-small: 12 and 12 layers of 768."""
    tokenizer, ids = audio._whisper_tokenizer()
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    size, layers, heads, inner = (768, 12, 12, 3072) if order.on_gpu else (32, 2, 2, 64)
    config = hf.WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=80, d_model=size, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=inner, decoder_ffn_dim=inner,
        decoder_start_token_id=start, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        begin_suppress_tokens=[220, end], max_target_positions=448, init_std=0.05 if order.on_gpu else 0.2,
    )  # fmt: skip

    def make() -> Any:
        model = hf.WhisperForConditionalGeneration(config)
        model.generation_config = audio._whisper_generation(config, ids)
        return model

    _save(folder, order, "float16", make, tokenizer, hf.WhisperFeatureExtractor(feature_size=80))


def _recordings(count: int, order: Order) -> list[bytes]:
    """WAV files of 2 to 25 seconds: a voice of gliding harmonics with pauses, and noise."""
    source = np.random.default_rng(SEED)
    made = [_voice(source) for _ in range(min(count, 64))]
    return [made[index % len(made)] for index in range(count)]


def _voice(source: np.random.Generator) -> bytes:
    time = np.arange(int(16_000 * source.uniform(2, 25))) / 16_000
    pitch = 110 + 60 * source.random() + 30 * np.sin(2 * np.pi * source.uniform(0.3, 2) * time)
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    sound = sum(np.sin(k * phase) / k for k in range(1, 9)) * (np.sin(2 * np.pi * 1.5 * time) > -0.4)
    samples = (6000 * sound + 300 * source.standard_normal(len(time))).clip(-32_000, 32_000).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def _llama(folder: Path, order: Order) -> None:
    """A Llama of 1.1 B parameters. Its next token follows the last one alone, so that half precision changes no answer."""
    names = ["<s>", "</s>", "<pad>", "<unk>", *_words(31_996)]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=2048, padding_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    large = {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "intermediate_size": 5632}
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = hf.LlamaConfig(
        vocab_size=len(names), num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, **(large if order.on_gpu else small),
    )  # fmt: skip

    def make() -> Any:
        model = hf.LlamaForCausalLM(config)
        with torch.no_grad():
            table = model.model.embed_tokens.weight
            table.normal_(0, 10.0)
            follows = torch.arange(len(names), device=table.device)
            follows[4:] = 4 + (follows[4:] - 4 + 7919) % (len(names) - 4)  # a long cycle, without special tokens
            model.lm_head.weight[follows] = table / 10.0
        return model

    _save(folder, order, "bfloat16", make, tokenizer)


def _prompts(count: int, order: Order) -> list[str]:
    source, words = random.Random(SEED), _words(31_996)
    longest = 300 if order.on_gpu else 60
    return [" ".join(source.choices(words, k=source.randint(5, longest))) for _ in range(count)]


def new_tokens(index: int, order: Order) -> int:
    """How many tokens a prompt asks for; fewer in a rehearsal."""
    return NEW_TOKENS[index % len(NEW_TOKENS)] // (1 if order.on_gpu else 4)


def _save(folder: Path, order: Order, dtype: str, make: Callable[[], Any], *parts: Any) -> None:
    """Make a model on the device, where random numbers are quick, and write it in its dtype."""
    torch.manual_seed(SEED)
    with torch.device(order.device):
        model = make()
    save(folder, model.to(getattr(torch, dtype) if order.on_gpu else torch.float32), *parts)


LOADS = (
    Load(
        "texts, BERT-base", "text-classification", "float16", _bert, _ragged_texts, 40_000,
        {"truncation": True}, batch_items=2048,
    ),
    Load(
        "pictures, ViT-B/16", "image-classification", "bfloat16", _vit, _jpegs, 6_000,
        {"top_k": 1}, batch_items=256, cpu_threads=64,
    ),
    Load(
        "speech, Whisper-small", "automatic-speech-recognition", "float16", _whisper, _recordings, 1_000,
        {"generate_kwargs": {"num_beams": 1, "min_new_tokens": SPOKEN_TOKENS, "max_new_tokens": SPOKEN_TOKENS}},
        least_agreement=0.2, batch_items=128, cpu_threads=16,
    ),
    Load(
        "prompts, Llama 1.1 B", "text-generation", "bfloat16", _llama, _prompts, 512,
        {"do_sample": False, "return_full_text": False}, batch_items=512,
    ),
)  # fmt: skip
