"""Sample inputs of every task: ragged on purpose, so that padding and bucketing have something to get wrong.

Each function takes a writable folder (used by those whose inputs must be files) and returns a list whose
elements are each the single positional argument of one pipeline call. The values are made anew on every call,
because pipelines change what they are given.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.checkpoints.corpus import CORPUS, DELIVERY, INVOICE, LONG, ORDER, REFUND
from tests.checkpoints.media import audio, document, frames, gif_bytes, image, mp4_bytes

LABELS = ["sports", "politics", "business and science", "travel"]

#: Generation arguments that give short and repeatable answers.
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}

CAPITAL_QUESTION = "What is the capital of France?"


def texts(_: Path) -> list[Any]:
    merkel = "Angela Merkel met Emmanuel Macron in Paris on Tuesday to discuss the European budget."
    mixed = "The delivery was fast, but the packaging was the worst that I have ever seen in two days."
    return ["Great!", REFUND, merkel, "ok", LONG[:520], mixed]


def masked_texts(_: Path) -> list[Any]:
    return [
        "The capital of France is [MASK].",
        "[MASK]!",
        "I was charged [MASK] for my order and I want a refund.",
        LONG[:300] + " the [MASK] was slow.",
        "A cat is sleeping on the red [MASK].",
    ]


def prompts(_: Path) -> list[Any]:
    """Plain prompts, a chat, and a chat that ends with the start of the answer."""
    ask = [{"role": "user", "content": CAPITAL_QUESTION}]
    instructed = [{"role": "system", "content": "Be short."}, {"role": "user", "content": ORDER}]
    continued = [*instructed, {"role": "assistant", "content": "The worker"}]
    return [
        "The quick brown",
        "Yes",
        LONG[:400],
        ask,
        continued,
        "In the beginning there was a single server,",
    ]


def decisions(_: Path) -> list[Any]:
    """Questions of all three types; the last input is the same as JSON text."""
    refund = {"refund": {"type": "noul", "instructions": "Is a refund requested?"}}
    tones = {"calm": "A polite message", "angry": None, "other": None}
    tone = {"tone": {"type": "choice", "instructions": "What is the tone?", "criteria": tones}}
    urgency = {"type": "score", "instructions": "How urgent?", "criteria": ["Can wait", "This week", "Today"]}
    return [
        {"state": REFUND, "questions": refund},
        {"state": "ok", "questions": tone},
        {"state": {"message": LONG[:300], "from": "ada"}, "questions": {**refund, "urgency": urgency}},
        json.dumps({"state": DELIVERY, "questions": refund}),
    ]


def sources(prefix: str) -> Callable[[Path], list[Any]]:
    """Inputs of an encoder-decoder model whose task is named by `prefix`."""

    def prefixed(_: Path) -> list[Any]:
        return [prefix + text for text in (LONG[:600], ORDER, "The house is wonderful.", LONG[:150], "ok")]

    return prefixed


def questions(_: Path) -> list[Any]:
    pairs = [
        ("Where is the capital?", CORPUS[22]),
        ("Who wrote the first program?", CORPUS[8]),
        ("What is slow?", LONG),
        ("What is the invoice number?", INVOICE),
    ]
    return [{"question": question, "context": context} for question, context in pairs]


def table_questions(_: Path) -> list[Any]:
    stars = {"Repository": ["Transformers", "Datasets", "Tokenizers"], "Stars": ["36542", "4512", "3934"]}
    goals = {
        "Player": [f"player {i}" for i in range(9)],
        "Goals": [str(i * 3 % 7) for i in range(9)],
        "Club": ["red", "blue", "green"] * 3,
    }
    city = {"City": ["Paris"], "Country": ["France"]}
    return [
        {"table": stars, "query": "How many stars does the transformers repository have?"},
        {"table": goals, "query": "Which player scored the most goals?"},
        {"table": city, "query": CAPITAL_QUESTION},
        {"table": goals, "query": "sum of goals"},
    ]


def speeches(_: Path) -> list[Any]:
    """16 kHz waveforms from 0.6 to 33 s: the last is longer than Whisper's window."""
    return [
        audio(1.0, "sine"),
        audio(3.7, "speech", seed=1),
        audio(0.6, "chirp"),
        audio(12.3, "speech", seed=3),
        audio(33.0, "speech", seed=4),
    ]


def sounds(_: Path) -> list[Any]:
    """48 kHz waveforms under 10 s, above which CLAP crops at random."""
    return [
        audio(1.0, "sine", 48000),
        audio(3.0, "speech", 48000),
        audio(7.5, "chirp", 48000),
        audio(2.0, "noise", 48000),
    ]


def sentences_to_speak(_: Path) -> list[Any]:
    order = "Yes, the order is fine, but the delivery was late!"
    return ["Hello.", "The quick brown fox jumps over the lazy dog.", order, "ok"]


def pictures() -> list[Image.Image]:
    """Five pictures of different sizes and shapes."""
    sizes = [(64, 64), (320, 240), (97, 203), (640, 480), (33, 50)]
    return [image(width, height, kind) for kind, (width, height) in enumerate(sizes)]


def images(_: Path) -> list[Any]:
    return list(pictures())


def few_images(_: Path) -> list[Any]:
    return list(pictures()[:4])


def small_images(_: Path) -> list[Any]:
    return [image(16, 16), image(24, 17, 1), image(40, 30, 2), image(9, 20, 3)]


def scenes(_: Path) -> list[Any]:
    return [image(64, 64), image(96, 48, 1), image(40, 72, 2), image(128, 100, 3)]


def image_pairs(_: Path) -> list[Any]:
    first, second, third, large, small = pictures()
    crop = large.crop((50, 40, 600, 440))
    return [[first, first.rotate(10)], [second, third], [large, crop], [small, second]]


def videos(folder: Path) -> list[Any]:
    """Paths of three MP4 files and a GIF, written into `folder`; 12 to 60 frames."""
    clips = {
        "a.mp4": mp4_bytes(frames(24, 64, 48, 0)),
        "b.mp4": mp4_bytes(frames(60, 160, 120, 1)),
        "c.gif": gif_bytes(frames(12, 48, 80, 2)),
        "d.mp4": mp4_bytes(frames(16, 96, 64, 3)),
    }
    for name, content in clips.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in clips]


def images_to_search(_: Path) -> list[Any]:
    """Pictures with labels of their own: as lists, and as text with commas."""
    sought: list[Any] = [
        ["cat", "a red couch"],
        ["dog"],
        ["a remote control", "a cup of coffee", "book"],
        "cat,man",
    ]
    return [{"image": picture, "candidate_labels": names} for picture, names in zip(pictures(), sought, strict=False)]


def image_questions(_: Path) -> list[Any]:
    asked = [
        "What color is it?",
        "How many dogs run along the beach while a man rides a bicycle?",
        "Is it?",
        "What is on the couch?",
    ]
    return [{"image": picture, "question": question} for picture, question in zip(pictures(), asked, strict=False)]


def captions(_: Path) -> list[Any]:
    """Pictures with the start of a caption, of different lengths."""
    begun = ["a photo of", "a", "two dogs run along the beach while", "a cat"]
    return [{"images": picture, "text": text} for picture, text in zip(pictures(), begun, strict=False)]


def image_chats(_: Path) -> list[Any]:
    """Chats with one picture each, and one without any."""
    long_question = "What is the cat doing on the red couch? " + CORPUS[13]
    asked = ["Describe this image.", long_question, "Count.", "Is there a dog?"]
    seen = [_chat(question, image=picture) for question, picture in zip(asked, pictures(), strict=False)]
    return [*seen, _chat(CAPITAL_QUESTION)]


def audio_chats(_: Path) -> list[Any]:
    """Chats with one, one, two and no sounds."""
    both = [{"type": "audio", "audio": wave} for wave in (audio(0.7), audio(2.2, "noise"))]
    compare = {"type": "text", "text": "Compare the two sounds in one word, please."}
    return [
        _chat("What is this sound?", audio=audio(1.5, "chirp")),
        _chat("Describe.", audio=audio(4, "speech", seed=2)),
        [{"role": "user", "content": [*both, compare]}],
        _chat(CAPITAL_QUESTION),
    ]


def _chat(question: str, **media: Any) -> list[dict[str, Any]]:
    parts = [{"type": kind, kind: value} for kind, value in media.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def documents(_: Path) -> list[Any]:
    """Pages with a question and the words and boxes that an OCR engine would have found."""
    return [{"image": page, "question": question, "word_boxes": boxes} for question, page, boxes in _pages()]


def documents_without_words(_: Path) -> list[Any]:
    return [{"image": page, "question": question} for question, page, _boxes in _pages()]


def _pages() -> list[tuple[str, Image.Image, list[Any]]]:
    written = [
        ("What is the invoice number?", INVOICE),
        ("Total amount?", " ".join(LONG.split()[:70])),
        ("Who?", CORPUS[7]),
        ("When was the company founded?", f"{CORPUS[10]} {ORDER}"),
    ]
    return [
        (question, *document(text.split(), 300 + 60 * i, 200 + 50 * i)) for i, (question, text) in enumerate(written)
    ]
