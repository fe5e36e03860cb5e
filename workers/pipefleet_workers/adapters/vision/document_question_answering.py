"""The adapter of document-question-answering: LayoutLM and its kin point at words of a page, Donut reads the page itself.

A page with more words than the model takes becomes several units that overlap. Units are padded on the right, where the attention
mask hides the padding, and cut apart again.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipefleet_workers.adapters.arguments import STAGE, Arguments, with_forward
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.padding import pad
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.encoder import position_limit
from pipefleet_workers.adapters.text.whole_texts import characters, require_pieces, require_whole
from pipefleet_workers.adapters.writing.equal_shapes import EqualWriter, Writing
from pipefleet_workers.adapters.writing.parameters import apart
from pipefleet_workers.inputs.ocr import read_words
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

_HOST = ("p_mask", "word_ids", "words", "is_last")
"""Values that the pipeline's preprocess makes only for its postprocess."""
_LEAST_ROOM = 2
"""Places that a question must leave for words."""


class PageReader(Adapter):
    """LayoutLM, v2 and v3: answers are spans of words, from `word_boxes`, or from OCR if there are none."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.pads = True
        own, table = pipe.tokenizer.model_max_length, position_limit(pipe.model)
        self._longest = own if table is None else min(own, table)
        if getattr(pipe.image_processor, "apply_ocr", False):
            pipe.image_processor.apply_ocr = False  # this OCR needs tesseract; `read_words` takes its place
        taken = inspect.signature(pipe.model.forward).parameters
        self._looks = bool({"pixel_values", "image"} & set(taken))
        self._picture = "pixel_values" if "pixel_values" in taken and "image" not in taken else "image"

    def example(self, size: int) -> Any:
        """A page with `size` words on a grid."""
        words = ["sea", "wide", "trees", "old", "was"]
        boxes = [
            [40 * (i % 20), 40 * (i // 20 % 20), 40 * (i % 20) + 30, 40 * (i // 20 % 20) + 20] for i in range(size)
        ]
        written = [[words[index % len(words)], box] for index, box in enumerate(boxes)]
        return {"image": Image.new("RGB", (224, 224), "white"), "question": "what was wide", "word_boxes": written}

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """The model's inputs, padded on the right."""
        fill = self.pipe.tokenizer.pad_token_id or 0
        names = units[0].features["tensors"]
        rows = {name: [unit.features["tensors"][name] for unit in units] for name in names}
        return {name: pad(own, fill if name == "input_ids" else 0) for name, own in rows.items()}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """For every place two logits, on the host: that the answer begins there, and that it ends there."""
        device = self.pipe.device
        with torch.inference_mode():
            found = self.pipe.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            return found.start_logits.float().cpu(), found.end_logits.float().cpu()

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The outputs of each unit's own places, `[1, tokens]`."""
        start, end = outputs
        return [
            {"start_logits": start[row : row + 1, : unit.length], "end_logits": end[row : row + 1, : unit.length]}
            for row, unit in enumerate(units)
        ]

    def finish(self, assembly: Assembly) -> Any:
        """`[{"score": …, "answer": …, "start": …, "end": …}]`, the best first; `start` and `end` count words."""
        arguments, hosts = assembly.context
        outputs = [{**assembly.outputs[index], **host} for index, host in enumerate(hosts)]
        return self.copies.get().postprocess(outputs, **arguments.fresh().postprocess)

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        parameters = dict(decoded.work.parameters)
        most = parameters.pop("max_question_len", None)  # documented, but transformers' preprocess refuses it
        arguments = self.parse(parameters)
        if "image" not in decoded.value and self._looks:
            raise ItemError("bad_input", "this model looks at the page itself; pass its image beside word_boxes", STAGE)
        page = {**decoded.value, "word_boxes": self._words(decoded.value)}
        if most is not None:
            page["question"] = self._cut(self.long_texts().shortened(page["question"], most), most)
        self.long_texts().require(page["question"], self._longest, "shorten it or pass max_question_len")
        before = self._lengths(page["question"], arguments)
        self._require_few(page, before)
        spans = list(self.copies.get().preprocess(page, **before))
        hosts = [{name: span.pop(name) for name in _HOST} for span in spans]
        for host, span in zip(hosts, spans, strict=True):
            host["attention_mask"] = span["attention_mask"]
        assembly = Assembly(decoded.work, expected=len(spans), context=(arguments, hosts))
        return [self._unit(assembly, index, span) for index, span in enumerate(spans)]

    def _unit(self, assembly: Assembly, index: int, span: dict[str, Any]) -> Unit:
        tensors = {self._picture if name == "image" else name: one for name, one in span.items()}
        length = tensors["input_ids"].shape[1]
        picture = tuple(tensors[self._picture].shape) if self._picture in tensors else None
        key = (tuple(tensors), picture, None if self.pads else length)
        return Unit(assembly, index, key, length, {"tensors": tensors})

    def _words(self, value: Mapping[str, Any]) -> list[Any]:
        """The page's words with their boxes. Empty for an empty page; its only possible answer is "no answer"."""
        given = value.get("word_boxes")
        return read_words(value["image"]) if given is None else checked(given)

    def _lengths(self, question: str, arguments: Arguments) -> dict[str, Any]:
        """Arguments of preprocess with lengths that fit the model and the question.

        Raises ItemError: too_long, bad_parameter. If the overlap left no room for words, the tokenizer would panic.
        """
        before = dict(arguments.fresh().preprocess)
        longest = min(before.get("max_seq_len") or self._longest, self._longest)
        stride = before.get("doc_stride")
        stride = min(longest // 2, 256) if stride is None else stride
        asked, special = self._tokens(question), self.pipe.tokenizer.num_special_tokens_to_add(pair=True)
        room = longest - asked - special
        if room < _LEAST_ROOM:
            text = f"the question has {asked} tokens, which leaves no room for the page in {longest}; shorten it"
            raise ItemError("too_long", f"{text} or pass max_question_len", STAGE)
        if stride >= room and arguments.preprocess.get("doc_stride") is not None:
            raise ItemError("bad_parameter", f"doc_stride must be below {room}, what the question leaves", STAGE)
        return {**before, "max_seq_len": longest, "doc_stride": min(stride, room - 1)}

    def _require_few(self, page: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Raise ItemError (too_long) for a page that would be read in too many pieces.

        A word has at most one token for each byte.
        """
        longest, words = before["max_seq_len"], [word for word, _ in page["word_boxes"]]
        require_whole(characters(words), self.max_whole_characters)
        step = longest - self._tokens(page["question"]) - self.pipe.tokenizer.num_special_tokens_to_add(pair=True)
        tokens = 4 * characters(words)
        require_pieces(
            tokens, room=step, stride=before["doc_stride"], longest=longest, most=4 * self.max_whole_characters
        )

    def _tokens(self, question: str) -> int:
        return len(self.copies.get().tokenizer.tokenize(question)) if self._plain else self._worded(question)

    @property
    def _plain(self) -> bool:
        """Whether the tokenizer takes plain texts; the tokenizers of v2 and v3 need boxes."""
        return bool(self.pipe.model_type.value == "layoutlm")

    def _worded(self, question: str) -> int:
        encoded = self.copies.get().tokenizer(text=[question], text_pair=[["a"]], boxes=[[[0, 0, 0, 0]]])
        special: int = self.pipe.tokenizer.num_special_tokens_to_add(pair=True)
        return len(encoded["input_ids"][0]) - special - 1

    def _cut(self, question: str, most: int) -> str:
        """The first words of a question that have at most `most` tokens together."""
        words = question.split()
        fits, above = 1, len(words) + 1
        while above - fits > 1:  # adding the words one by one would take the square of their number
            middle = (fits + above) // 2
            fits, above = (middle, above) if self._tokens(" ".join(words[:middle])) <= most else (fits, middle)
        return " ".join(words[:fits])


class PageWriter(EqualWriter):
    """Donut: it continues a prompt that holds the question.

    Only equal prompts share a batch, since padding would change its answer.
    """

    loads = True

    def parse(self, parameters: Mapping[str, Any]) -> Arguments:
        """The pipeline's arguments, with the arguments of generate(), which this pipeline takes from no call."""
        rest, generation = apart(parameters, but=("top_k",))
        return with_forward(super().parse(rest), generation)

    def read(self, value: Any, arguments: Arguments) -> tuple[dict[str, torch.Tensor], Any]:
        """The page's pixels and the prompt's tokens. Raises ItemError (bad_input) for a page without its image."""
        if "image" not in value:
            raise ItemError("bad_input", "this model reads the page itself; pass its image", STAGE)
        page = {name: value[name] for name in ("image", "question")}
        before = {name: one for name, one in arguments.fresh().preprocess.items() if name != "max_question_len"}
        (span,) = self.copies.get().preprocess(page, **before)
        return {name: span[name] for name in ("inputs", "decoder_input_ids")}, None

    def finish(self, assembly: Assembly) -> Any:
        """`[{"answer": …}]`; the answer is None if the model did not end it."""
        request: Writing = assembly.context
        outputs = [{"sequences": assembly.outputs[0]}]
        return self.copies.get().postprocess(outputs, **request.arguments.fresh().postprocess)


def document_answerer(pipe: Any) -> Adapter:
    """The adapter of document-question-answering: Donut reads a page and writes, LayoutLM points at words."""
    return PageWriter(pipe) if pipe.model_type.value == "vision_encoder_decoder" else PageReader(pipe)


def checked(boxes: Any) -> list[Any]:
    """Words with their boxes, in thousandths of the page.

    Raises ItemError (bad_input) for a box beyond 0 to 1000 and for a box turned inside out. Such a box is an index beyond a table
    of the model; on a GPU it breaks the device for every later input.
    """
    if isinstance(boxes, list) and all(_is_boxed(one) for one in boxes):
        return [(word, [int(corner) for corner in box]) for word, box in boxes]
    text = "word_boxes are a list of [word, [x0, y0, x1, y1]] with 0 <= x0 <= x1 <= 1000 and 0 <= y0 <= y1 <= 1000"
    raise ItemError("bad_input", text, STAGE)


def _is_boxed(one: Any) -> bool:
    if not isinstance(one, list) or len(one) != 2 or not isinstance(one[0], str):
        return False
    box = one[1]
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(corner, int | float) for corner in box)
    return bool(numbers and np.isfinite(box).all() and 0 <= box[0] <= box[2] <= 1000 and 0 <= box[1] <= box[3] <= 1000)
