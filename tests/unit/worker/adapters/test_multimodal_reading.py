"""Models that read pictures and pages: labels of one request never meet another's, pages are cut where they are too long."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from pipefleet_workers.adapters.vision import document_question_answering
from pipefleet_workers.adapters.vision.document_question_answering import document_answerer
from pipefleet_workers.adapters.vision.question_answering import visual_answerer
from pipefleet_workers.adapters.vision.zero_shot import ImageLabeller
from pipefleet_workers.adapters.vision.zero_shot_detection import LABELS_AT_ONCE, ObjectFinder
from pipefleet_workers.inputs import ocr
from tests.checkpoints import CHECKPOINTS
from tests.checkpoints.media import image
from tests.parity.harness import Call, assert_same, load, recording, running

NAMED, SOUGHT = "zero-shot-image-classification", "zero-shot-object-detection"
PAGES, ASKED = "document-question-answering", "visual-question-answering"
PICTURES = [image(40, 30), image(30, 40, 1), image(64, 64, 2), image(20, 50, 3)]
LABELS = [["a cat", "a dog"], ["winter"], ["a dog", "bread", "the sea"], ["a cat", "a dog"]]


def outputs(outcomes: list[Any]) -> list[Any]:
    assert [one.failure for one in outcomes] == [None] * len(outcomes)
    return [one.output for one in outcomes]


def failure(task: str, adapter: Any, call: Call) -> Any:
    with running(adapter, task) as engine:
        (outcome,) = engine.run([call])
    assert outcome.failure is not None
    return outcome.failure


@contextlib.contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """A list with the rows of every call of `module` inside the block."""
    rows: list[int] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    try:
        yield rows
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def clip() -> Any:
    return load(NAMED)


@pytest.fixture(scope="module")
def owl() -> Any:
    return load(SOUGHT)


@pytest.fixture(scope="module")
def layoutlm() -> Any:
    return load(PAGES)


def page(index: int = 0, **changes: Any) -> dict[str, Any]:
    return {**CHECKPOINTS[PAGES].inputs(None)[index], **changes}  # type: ignore[arg-type]


def test_pictures_share_a_call_and_a_text_is_embedded_once(clip: Any) -> None:
    adapter = recording(ImageLabeller, clip)
    calls = [Call(one, {"candidate_labels": own}) for one, own in zip(PICTURES, LABELS, strict=True)]
    with running(adapter, NAMED) as engine, counted(clip.model.text_model) as texts:
        engine.run([calls[0]])
        with counted(clip.model.vision_model) as seen:
            engine.run_together(calls)
        engine.run(calls)
    assert 4 in seen
    assert sum(texts) == len({label for own in LABELS for label in own})


def test_a_model_whose_towers_do_not_give_its_scores_is_run_whole_and_by_labels(clip: Any) -> None:
    class Whole(ImageLabeller):
        def _compared(self, *_: Any) -> Any:
            return [torch.zeros(2)]

    calls = [Call(one, {"candidate_labels": own}) for one, own in zip(PICTURES, LABELS, strict=True)]
    wanted = [clip(call.inputs, **call.parameters) for call in calls]
    adapter = recording(Whole, clip)
    with running(adapter, NAMED) as engine:
        found = outputs(engine.run_together(calls))
    assert_same(found, wanted)
    assert max(len(batch.units) for batch in adapter.batches) == 2


def test_labels_may_come_as_one_text(clip: Any) -> None:
    with running(recording(ImageLabeller, clip), NAMED) as engine:
        listed, written = outputs(
            engine.run([Call(PICTURES[0], {"candidate_labels": one}) for one in (["a cat", "a dog"], "a cat, a dog,")])
        )
    assert_same(listed, written)


@pytest.mark.parametrize(
    ("parameters", "code", "words"),
    [
        ({}, "bad_parameter", "candidate_labels is missing"),
        ({"candidate_labels": []}, "bad_parameter", "candidate_labels is missing"),
        ({"candidate_labels": ["fine", "word " * 90]}, "too_long", "the model takes 77"),
    ],
)
def test_labels_that_cannot_be_served(clip: Any, parameters: dict[str, Any], code: str, words: str) -> None:
    found = failure(NAMED, recording(ImageLabeller, clip), Call(PICTURES[0], parameters))
    assert (found.code, found.stage) == (code, "preprocess")
    assert words in found.message


@pytest.mark.parametrize("labels", [[""], ["a cat", ""], "", "a cat,,"])
def test_an_empty_label_is_looked_for_as_transformers_does(owl: Any, labels: Any) -> None:
    parameters = {"candidate_labels": labels, "threshold": 0.0}
    with running(recording(ObjectFinder, owl), SOUGHT) as engine:
        (found,) = outputs(engine.run([Call(PICTURES[0], parameters)]))
    assert_same(found, owl(PICTURES[0], **parameters))


def test_a_picture_is_processed_and_looked_at_once_for_all_its_labels(owl: Any) -> None:
    adapter = recording(ObjectFinder, owl)
    processed: list[Any] = []
    seen_by = adapter.copies.get

    def counting() -> Any:
        pipe = seen_by()
        if not hasattr(pipe, "counted"):
            pipe.counted, inner = True, pipe.image_processor
            pipe.image_processor = _Counting(inner, processed)
        return pipe

    adapter.copies.get = counting
    many = [f"thing {index}" for index in range(LABELS_AT_ONCE + 4)]
    calls = [Call({"image": PICTURES[0], "candidate_labels": many}), Call(PICTURES[1], {"candidate_labels": "cat"})]
    with running(adapter, SOUGHT) as engine, counted(owl.model.owlvit.vision_model) as seen:
        outputs(engine.run(calls))
    assert len(processed) == 2
    assert sum(seen) == 3, "the first in two pieces, the second in one"


class _Counting:
    """An image processor that notes its calls."""

    def __init__(self, inner: Any, calls: list[Any]) -> None:
        self._inner = inner
        self._calls = calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls.append(args)
        return self._inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    ("inputs", "parameters", "code"),
    [
        (PICTURES[0], {}, "bad_parameter"),
        ({"image": PICTURES[0], "candidate_labels": []}, {}, "bad_parameter"),
        (PICTURES[0], {"candidate_labels": ["word " * 30]}, "too_long"),
    ],
)
def test_objects_that_cannot_be_looked_for(owl: Any, inputs: Any, parameters: dict[str, Any], code: str) -> None:
    assert failure(SOUGHT, recording(ObjectFinder, owl), Call(inputs, parameters)).code == code


def test_a_model_that_padding_changes_gets_units_of_one_length(owl: Any) -> None:
    class Strict(ObjectFinder):
        def __init__(self, pipe: Any) -> None:
            super().__init__(pipe)
            self.pads = False

    calls = [Call(one, {"candidate_labels": own, "threshold": 0.0}) for one, own in zip(PICTURES, LABELS, strict=True)]
    wanted = [owl({"image": call.inputs, **call.parameters}, threshold=0.0) for call in calls]
    adapter = recording(Strict, owl)
    with running(adapter, SOUGHT) as engine:
        assert_same(outputs(engine.run_together(calls)), wanted)
    assert max(len(batch.units) for batch in adapter.batches) <= 2


def test_a_question_longer_than_the_model_takes() -> None:
    long = {"image": PICTURES[0], "question": "what " * 60}
    adapter = recording(visual_answerer, load(ASKED))
    with running(adapter, ASKED) as engine:
        refused, cut = engine.run([Call(long), Call(long, {"truncation": True})])
    assert refused.failure is not None
    assert (refused.failure.code, refused.failure.stage) == ("too_long", "preprocess")
    assert "truncation" in refused.failure.message
    assert cut.failure is None


def test_a_long_page_is_read_in_pieces_and_they_share_a_batch(layoutlm: Any) -> None:
    adapter = recording(document_answerer, layoutlm)
    with running(adapter, PAGES) as engine:
        outputs(engine.run([Call(page(1))]))
    assert len(adapter.batches[0].units) > 1


def test_a_question_is_cut_to_its_bound(layoutlm: Any) -> None:
    long = page(question="What is the invoice number and who wrote it?")
    short = page(question="What is the")
    tokens = len(layoutlm.tokenizer.tokenize("What is the"))
    with running(recording(document_answerer, layoutlm), PAGES) as engine:
        cut, whole, wanted = outputs(engine.run([Call(long, {"max_question_len": tokens}), Call(long), Call(short)]))
    assert_same(cut, wanted)
    assert cut[0]["score"] != pytest.approx(whole[0]["score"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "parameters", "code", "words"),
    [
        ({"word_boxes": [["a", [0, 0, 1001, 5]]]}, {}, "bad_input", "word_boxes are"),
        ({"word_boxes": [["a", [9, 0, 5, 5]]]}, {}, "bad_input", "word_boxes are"),
        ({"word_boxes": [["a", [0, 0, 5]]]}, {}, "bad_input", "word_boxes are"),
        ({"word_boxes": [["a", [0, 0, 5, float("nan")]]]}, {}, "bad_input", "word_boxes are"),
        ({"word_boxes": [[3, [0, 0, 5, 5]]]}, {}, "bad_input", "word_boxes are"),
        ({"word_boxes": "words"}, {}, "bad_input", "word_boxes are"),
        ({"question": "word " * 70}, {}, "too_long", "max_question_len"),
        ({}, {"max_seq_len": 12, "doc_stride": 9}, "bad_parameter", "doc_stride must be below"),
        ({}, {"max_seq_len": 4}, "too_long", "shorten it"),
    ],
)
def test_pages_that_cannot_be_served(
    layoutlm: Any, changes: dict[str, Any], parameters: dict[str, Any], code: str, words: str
) -> None:
    found = failure(PAGES, recording(document_answerer, layoutlm), Call(page(**changes), parameters))
    assert (found.code, found.stage) == (code, "preprocess")
    assert words in found.message


@pytest.mark.parametrize("parameters", [{}, {"top_k": 2}, {"handle_impossible_answer": True}])
@pytest.mark.parametrize("read", [False, True], ids=["word_boxes", "read"])
def test_a_page_without_words_is_answered_as_by_transformers(
    layoutlm: Any, parameters: dict[str, Any], read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_question_answering, "read_words", lambda seen: [])
    empty = page(word_boxes=[])
    wanted = layoutlm(**empty, **parameters)
    if read:
        empty.pop("word_boxes")
    with running(recording(document_answerer, layoutlm), PAGES) as engine:
        (found,) = outputs(engine.run([Call(empty, parameters)]))
    assert_same(found, wanted)
    assert bool(found) is bool(parameters.get("handle_impossible_answer"))


def test_a_model_of_words_alone_needs_no_picture_of_the_page(layoutlm: Any) -> None:
    asked = {name: one for name, one in page().items() if name != "image"}
    wanted = layoutlm({**asked, "image": None})
    adapter = recording(document_question_answering.PageReader, layoutlm)
    with running(adapter, PAGES) as engine:
        (found,) = outputs(engine.run([Call(asked)]))
    assert_same(found, wanted)
    adapter._looks = True
    assert "pass its image" in failure(PAGES, adapter, Call(asked)).message


def test_a_bound_above_the_models_own_is_lowered_to_it(layoutlm: Any) -> None:
    with running(recording(document_answerer, layoutlm), PAGES) as engine:
        high, own = outputs(engine.run([Call(page(1), {"max_seq_len": 5000}), Call(page(1))]))
    assert_same(high, own)


def test_words_that_are_missing_come_from_the_page(layoutlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = page()
    monkeypatch.setattr(
        document_question_answering, "read_words", lambda seen: [(word, box) for word, box in full["word_boxes"]]
    )
    bare = {name: full[name] for name in ("image", "question")}
    with running(recording(document_answerer, layoutlm), PAGES) as engine:
        read, given = outputs(engine.run([Call(bare), Call(full)]))
    assert_same(read, given)


INSTALLED = importlib.util.find_spec("rapidocr") is not None


@pytest.mark.skipif(INSTALLED, reason="the extra is installed")
def test_without_the_extra_the_error_says_how_to_install_it(layoutlm: Any) -> None:
    bare = {name: page()[name] for name in ("image", "question")}
    found = failure(PAGES, recording(document_answerer, layoutlm), Call(bare))
    assert found.code == "not_installed"
    assert "pip install 'pipefleet[ocr]'" in found.message


@pytest.mark.skipif(not INSTALLED, reason="needs the extra ocr")
def test_a_printed_page_is_read_word_by_word() -> None:
    paper = Image.new("RGB", (800, 400), "white")
    ImageDraw.Draw(paper).text((40, 40), "Total amount: 154.06 EUR", fill="black", font=ImageFont.load_default(28))
    words = ocr.read_words(paper)
    assert [word for word, _ in words] == ["Total", "amount:", "154.06", "EUR"]
    lefts = [box[0] for _, box in words]
    assert lefts == sorted(lefts)
    assert all(0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000 for _, box in words)
    assert ocr.read_words(Image.new("RGB", (200, 100), "white")) == []
