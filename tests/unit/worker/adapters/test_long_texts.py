"""Long texts: a beginning stands for the whole where that is exact, and a text that is too long is refused by its beginning."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from pipefleet.contract.messages import JobItem
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text import long_texts
from pipefleet_workers.adapters.text.long_texts import LONG, LongTexts
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import Decoded, ItemError, JobContext, Unit, Work
from tests.checkpoints import vocabularies
from tests.checkpoints.corpus import CORPUS
from tests.parity.harness import load

PARTS = [
    *" ".join(CORPUS).split(),
    *(
        "gr\u00fc\u00df",
        "\u4e16\u754c",
        "\u041c\u0438\u0440",
        "e\u0301te\u0301",
        "\U0001f600",
        "[MASK]",
        "<mask>",
        "x" * 150,
        "99",
        "can't",
    ),
    *("Na\u00efve", "a\u0000b", "\u200b", "\u0130", "\ufb01n", "\u0e01\u0e33", "_", "--", "<|im_start|>"),
]
BLANKS = [" "] * 8 + ["\n", "  ", "\n\n ", "\t", "\r\n", "\u00a0", "\u3000"]


def text_of(length: int, seed: int = 0) -> str:
    """Words of many scripts with all kinds of blanks between."""
    source = random.Random(seed)
    parts, size = [], 0
    while size < length:
        parts += [source.choice(PARTS), source.choice(BLANKS)]
        size += len(parts[-1]) + len(parts[-2])
    return "".join(parts)


def wrapped(backend: Tokenizer) -> Any:
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, pad_token="<pad>")


def like_llama() -> Any:
    """Byte-level BPE whose words are cut by a pattern of their own, after a normaliser."""
    vocab, merges = vocabularies.byte_bpe(420, ["<pad>"])
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return wrapped(backend)


def like_gemma(*, spanning: bool = False) -> Any:
    """BPE over the whole text, whose spaces are a sign of their own; `spanning` has a token that reaches over one."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz.,'", "\u2581"})
    pairs = [("\u2581", "s"), ("e", "a"), ("\u2581s", "ea"), ("\u2581", "t"), ("h", "e"), ("\u2581", "\u2581")]
    if spanning:
        pairs.append(("e", "\u2581t"))
    vocab = {one: index for index, one in enumerate(["<pad>", "<unk>", *letters, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    return wrapped(backend)


def like_xlm() -> Any:
    """Unigram behind NFKC, whose words are cut before each space."""
    pieces = [(one, -float(index % 7) - 1) for index, one in enumerate(vocabularies.wordpiece()) if "[" not in one]
    vocab = [("<pad>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *pieces, ("\u2581the", -1.5), ("\u2581sea", -1.5)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=1))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrapped(backend)


TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "WordPiece": vocabularies.bert_tokenizer,
    "byte-level BPE": vocabularies.roberta_tokenizer,
    "CLIP": vocabularies.clip_tokenizer,
    "chat": vocabularies.chat_tokenizer,
    "Unigram": vocabularies.t5_tokenizer,
    "like Llama": like_llama,
    "like Gemma": like_gemma,
    "like XLM-R": like_xlm,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts count as long from a thousand characters on."""
    monkeypatch.setattr(long_texts, "LONG", 1000)
    monkeypatch.setattr(long_texts, "FIRST_LOOK", 500)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_of_a_beginning_are_the_first_of_the_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    looked = LongTexts(tokenizer)
    found = 0
    for seed in range(20):
        text = text_of(6000, seed)
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for most in (10, 300):
            start = looked.prefix(text, most)
            if start is None:
                continue
            found += 1
            own = tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"]
            assert text.startswith(start)
            assert len(whole) >= len(own) > most
            assert own[:most] == whole[:most], seed
            cut = {"truncation": True, "max_length": most, "verbose": False}
            assert dict(tokenizer(looked.shortened(text, most), **cut)) == dict(tokenizer(text, **cut))
    assert found > 20, "hardly a text was cut"


ALPHABETS = {
    "numbers": "0123456789,,,",
    "json": '{}[]":,ab1',
    "Chinese": "\u6d77\u4e16\u754c\u6728\u3002\uff0c",
    "one word": "aaaabcdeeest",
    "signs": ".-=",
    "emoji": "\U0001f600\U0001f1e9\U0001f1ea\U0001f468\u200d\u2764\ufe0f",
    "accents": "e\u0301\u0302a\u0308\u1100\u1161\u11a8\u0e01\u0e33",
    "blanks": "  \n\t\r\na",
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", [*TOKENIZERS, "tokens over a space"])
def test_texts_without_words_are_cut_where_two_beginnings_agree(name: str) -> None:
    tokenizer = TOKENIZERS[name]() if name in TOKENIZERS else like_gemma(spanning=True)
    looked = LongTexts(tokenizer)
    found = set()
    for kind, letters in ALPHABETS.items():
        source = random.Random(kind)
        for text in ("".join(source.choices(letters, k=5_000)), letters * (5_000 // len(letters))):
            whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for most in (10, 100):
                start = looked.prefix(text, most)
                if start is None:
                    continue
                found.add(kind)
                assert text.startswith(start)
                assert tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"][:most] == whole[:most]
                cut = {"truncation": True, "max_length": most, "verbose": False}
                assert dict(tokenizer(looked.shortened(text, most), **cut)) == dict(tokenizer(text, **cut)), kind
    assert len(found) > 1, "hardly a text was cut"


@pytest.mark.usefixtures("small")
def test_a_text_is_not_cut_by_a_tokenizer_that_is_not_fast_but_refused() -> None:
    looked, text = LongTexts(hf.CanineTokenizer()), "the sea " * 1000
    assert looked.prefix(text, 5) is None
    assert looked.shortened(text, 5) == text
    with pytest.raises(ItemError):
        looked.require(text, 5)
    looked.require(text, len(text))


@pytest.mark.usefixtures("small")
def test_a_text_of_one_unknown_word_is_not_refused() -> None:
    looked = LongTexts(vocabularies.bert_tokenizer())
    looked.require("x" * 6000, 5)
    assert looked.prefix("x" * 6000, 5) is None


def decoded(value: Any, parameters: Mapping[str, Any]) -> Decoded:
    context = JobContext("job", None, parameters, 3, None, Outcomes(range(1)))
    return Decoded(Work(context, 0, JobItem("0", value), parameters, 1), value)


def prepared(adapter: Any, value: Any, parameters: Mapping[str, Any]) -> list[Unit] | ItemError:
    (found,) = adapter.prepare([decoded(value, parameters)])
    return found  # type: ignore[no-any-return]


def plain(units: list[Unit] | ItemError) -> Any:
    assert isinstance(units, list), units.failure
    return [(unit.index, unit.length, listed(unit.features)) for unit in units]


def listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: listed(one) for name, one in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


WORDS = text_of(LONG + 20_000).replace("[MASK]", "mask").replace("<mask>", "mask")
CUT: list[tuple[str, Any, dict[str, Any]]] = [
    ("feature-extraction", WORDS, {"truncation": True}),
    ("feature-extraction", WORDS, {"tokenize_kwargs": {"truncation": True, "max_length": 20}}),
    ("text-classification", WORDS, {"truncation": True}),
    ("text-classification", {"text": WORDS, "text_pair": "the sea " * 90}, {"truncation": True}),
    ("text-classification", {"text": "the sea " * 9, "text_pair": WORDS}, {"truncation": "only_second"}),
    ("text-classification", {"text": WORDS, "text_pair": "the sea " * 70}, {"truncation": "longest_first"}),
    ("fill-mask", f"The [MASK] {WORDS}", {"tokenizer_kwargs": {"truncation": True}}),
    ("feature-extraction", "1,2;3" * LONG, {"truncation": True}),
    ("text-classification", "\u6d77\u4e16\u3002" * LONG, {"truncation": True}),
    ("summarization", "ab,c" * LONG, {"truncation": True}),
    ("token-classification", WORDS, {}),
    ("token-classification", WORDS, {"aggregation_strategy": "simple", "stride": 8}),
    ("zero-shot-classification", WORDS, {"candidate_labels": ["sea", "a wide old tree"]}),
    ("question-answering", {"question": WORDS, "context": "The sea was wide."}, {"max_question_len": 20}),
    ("question-answering", {"question": "What was wide?", "context": WORDS}, {}),
    ("summarization", WORDS, {"truncation": True}),
]


@pytest.mark.parametrize(
    ("task", "value", "parameters"), CUT, ids=[f"{index}-{one[0]}" for index, one in enumerate(CUT)]
)
def test_units_of_a_long_text_are_those_of_the_whole(
    task: str, value: Any, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(task)
    found = plain(prepared(RUNTIME[task].adapter(pipe), value, parameters))
    monkeypatch.setattr(LongTexts, "prefix", lambda *_: None)
    assert found == plain(prepared(RUNTIME[task].adapter(pipe), value, parameters))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("most", [21, 22])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_pair_of_long_texts_is_cut_as_the_whole_pair_is(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_texts, "LONG_BOTH", 200)
    tokenizer = TOKENIZERS[name]()
    looked = LongTexts(tokenizer)
    keywords = {"truncation": True, "max_length": most}
    for seed in range(2):
        long, other = text_of(500 + 300 * seed, seed), text_of(600, seed + 9)
        for texts in (
            (long, other),
            (other, long),
            (long, long),
            ("\u6d77" * 400, other),
            ("sea", long),
            (long, "sea"),
        ):
            pair = looked.bounded({"text": texts[0], "text_pair": texts[1]}, keywords, 10, "")
            cut = dict(tokenizer(**pair, **keywords, verbose=False))
            assert cut == dict(tokenizer(*texts, **keywords, verbose=False)), seed


REFUSED: list[tuple[str, Any, dict[str, Any]]] = [
    ("feature-extraction", WORDS, {}),
    ("text-classification", {"text": "the sea", "text_pair": WORDS}, {}),
    ("fill-mask", f"[MASK] {WORDS}", {}),
    ("feature-extraction", "1,2;3" * LONG, {}),
    ("feature-extraction", "\u6d77" * 3 * LONG, {}),
    ("text-generation", "1,2;3" * LONG, {}),
    ("text-generation", WORDS, {}),
    ("text-generation", [{"role": "user", "content": WORDS}], {}),
    ("translation", WORDS, {}),
    ("image-text-to-text", [{"role": "user", "content": [{"type": "text", "text": WORDS}]}], {}),
    ("visual-question-answering", {"image": None, "question": WORDS}, {}),
    ("visual-question-answering:blip", {"image": None, "question": WORDS}, {}),
    ("document-question-answering", {"image": None, "question": WORDS, "word_boxes": [["a", [0, 0, 1, 1]]]}, {}),
]


@pytest.mark.parametrize(("name", "value", "parameters"), REFUSED, ids=[one[0] for one in REFUSED])
def test_a_text_that_is_too_long_is_never_tokenised_in_full(name: str, value: Any, parameters: dict[str, Any]) -> None:
    pipe = load(name)
    adapter = RUNTIME[name.partition(":")[0]].adapter(pipe)
    seen: list[int] = []
    kept = adapter.copies.get().tokenizer

    class Watching(type(kept)):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *positional: Any, **keywords: Any) -> Any:
            seen.append(len(str(text)))
            return super()._encode_plus(text, *positional, **keywords)

    kept.__class__ = Watching
    found = prepared(adapter, value, parameters)
    assert isinstance(found, ItemError)
    assert found.failure.code == "too_long"
    assert "more than" in found.failure.message
    assert 0 < max(seen, default=0) < LONG


def test_labels_that_need_a_long_text_each_do_not_meet_in_one_call() -> None:
    pipe = load("zero-shot-classification")
    adapter: Any = RUNTIME["zero-shot-classification"].adapter(pipe)
    sizes: list[int] = []
    own = adapter._pairs

    def noted(pairs: list[tuple[str, str]]) -> Any:
        sizes.append(sum(len(text) for text, _ in pairs))
        return own(pairs)

    adapter._pairs = noted
    text = "\u6d77" * 20_000  # nowhere to cut it
    units = prepared(adapter, text, {"candidate_labels": ["sea", "tree", "wide", "old"]})
    assert isinstance(units, list)
    assert (len(units), len(sizes)) == (4, 2)
    assert max(sizes) < LONG
