"""Tiny tokenizers of every family, trained on the corpus so that two builds give the same bytes."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.checkpoints.corpus import CORPUS

Merges = list[tuple[str, str]]

_PRINTABLE = [chr(code) for code in range(33, 127)]

#: ChatML with image and audio placeholders; the prompt ends with the assistant's turn when asked to.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% elif c['type'] == 'image' %}<image>"
    "{% elif c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% endif %}{% endfor %}{% endif %}"
    "{% if not (loop.last and continue_final_message is defined and continue_final_message) %}"
    "<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def wordpiece(size: int = 420) -> dict[str, int]:
    """A lower-case WordPiece vocabulary of at most `size` pieces, in the order of the ids."""
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = [c for c in _PRINTABLE if not c.isupper()]
    # The trainer numbers "##x" pieces in hash order, and ties between merges follow the ids: name them first.
    named = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=named, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    return dict(sorted(trained.get_vocab().items(), key=lambda entry: entry[1]))


def byte_bpe(size: int, special: Sequence[str] = (), word_end: str = "") -> tuple[dict[str, int], Merges]:
    """Vocabulary and merges of a byte-level BPE; `special` tokens get the first ids."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    suffix: dict[str, Any] = {"end_of_word_suffix": word_end} if word_end else {}
    named = list(special)
    if word_end:  # hash order again, see wordpiece()
        named += [*sorted(alphabet), *(c + word_end for c in sorted(alphabet))]
    trained = Tokenizer(models.BPE(**suffix))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=named, initial_alphabet=alphabet, show_progress=False, **suffix
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return dict(sorted(model["vocab"].items(), key=lambda entry: entry[1])), [(a, b) for a, b in merges]


def bert_tokenizer(max_length: int = 128) -> Any:
    return hf.BertTokenizer(vocab=wordpiece(), model_max_length=max_length)


def roberta_tokenizer(max_length: int = 77) -> Any:
    vocab, merges = byte_bpe(420, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return hf.RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def clip_tokenizer(max_length: int = 77, pad_token: str = "<|endoftext|>") -> Any:
    """CLIP pads with its end token and pools at the highest id; OwlViT pads with `!`."""
    vocab, merges = byte_bpe(700, word_end="</w>")
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    return hf.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length, pad_token=pad_token)


def chat_tokenizer(max_length: int = 512, *, extra: Sequence[str] = (), padding_side: str = "left") -> Any:
    """The tokenizer of a decoder-only chat model: ChatML tokens, `extra` special ones, a template."""
    vocab, merges = byte_bpe(420, ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", *extra])
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        bos_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", *extra],
        model_max_length=max_length,
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def t5_tokenizer(max_length: int = 256) -> Any:
    """A unigram tokenizer over BPE pieces scored by rank: the unigram trainer is not repeatable."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always"),
        ]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=_PRINTABLE, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)[len(special) :]
    scored = [(piece, _unigram_score(piece, rank)) for rank, piece in enumerate(pieces)]
    vocab = [(token, 0.0) for token in special] + scored
    return hf.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length)


def _unigram_score(piece: str, rank: int) -> float:
    return round(-9.0 if len(piece) == 1 else -4.0 - rank / 200, 3)


def from_vocab_file(tokenizer_class: Callable[..., Any], vocab: dict[str, int], **settings: Any) -> Any:
    """A slow tokenizer that only takes a vocabulary file: JSON, or one token per line for BERT's heirs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab"
        lines = "[PAD]" in vocab
        file.write_text("\n".join(vocab) + "\n" if lines else json.dumps(vocab), encoding="utf-8")
        return tokenizer_class(str(file), **settings)
