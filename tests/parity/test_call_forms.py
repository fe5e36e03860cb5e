"""Every form of a call, on every task: the result has the form and the values that transformers gives for the same call.

The fleet's answer for one input is that of transformers, as other tests hold; what is looked at here is what the client makes of
calls and answers, so transformers itself answers the single inputs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.pipelines.pt_utils import KeyDataset

from pipefleet.contract.references import refs_in
from pipefleet.errors import InputError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.pipelines.fleet_pipeline import FleetPipeline
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS, Media, task_spec
from tests.checkpoints import CHECKPOINTS
from tests.checkpoints.media import audio, image
from tests.parity.cases.vision import stand_in_for_torchvision
from tests.parity.harness import assert_same, load

Pipe = Callable[..., Any]
Form = Callable[[Pipe, Any, Any, dict[str, Any]], Any]
"""A call of a pipeline with two inputs of its task and parameters that suit them."""


class Answered:
    """A job whose answer transformers gives."""

    warnings: tuple[str, ...] = ()

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    def result(self, timeout: float | None = None) -> Any:
        return self._answer()

    def cancel(self) -> bool:
        return True


class Answering(FleetPipeline):
    """The client's half of a pipeline: its inputs are prepared as for the fleet and answered by `pipe`, one at a time."""

    def __init__(self, task: str, pipe: Any, **defaults: Any) -> None:
        client: Any = SimpleNamespace(settings=SimpleNamespace(in_flight=4))
        super().__init__(client, task_spec(task), model=None, revision=None, defaults=defaults)
        self._pipe = pipe
        store = ObjectStore.__new__(ObjectStore)
        self._preparer = InputPreparer(self._spec, store, "s3://calls/", inline_bytes=1 << 20).dry()

    def submit(self, inputs: Any, **parameters: Any) -> Any:
        return self._submit(inputs, None, **parameters)

    def _submit(self, inputs: Any, patience: Any, **parameters: Any) -> Any:
        parameters = {**self._defaults, **parameters}
        self._spec.check(parameters)
        prepared = self._preparer.prepare(inputs)
        asked = copy.deepcopy(inputs if refs_in(prepared) else prepared)
        if self.task == "zero-shot-object-detection":
            labels = {"candidate_labels": parameters.pop("candidate_labels", None)}
            asked = {**labels, **(asked if isinstance(asked, Mapping) else {"image": asked})}
        named = asked if self._spec.media is Media.PROMPT and isinstance(asked, Mapping) else None
        parameters = copy.deepcopy(parameters)
        return Answered(
            lambda: carried(self._pipe(**named, **parameters) if named else self._pipe(asked, **parameters))
        )


def carried(value: Any) -> Any:
    """A result as JSON and the store bring it back: without tuples, numbers of numpy and tensors."""
    if isinstance(value, Mapping):
        return {name: carried(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [carried(one) for one in value]
    if isinstance(value, torch.Tensor):
        return value.numpy()
    return value.item() if isinstance(value, np.generic) else value


def form(value: Any) -> Any:
    """Containers with their kinds and keys, and the kinds of what they hold."""
    if isinstance(value, Mapping):
        return {name: form(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [form(one) for one in value]
    if isinstance(value, np.floating):
        return "float"
    return str(value.dtype) if isinstance(value, np.ndarray | torch.Tensor) else type(value).__name__


def taken(value: Any) -> tuple[bool, Any]:
    """Whether a result is lazy, and its values."""
    lazy = isinstance(value, Iterator) or (
        hasattr(value, "__iter__") and isinstance(value, torch.utils.data.IterableDataset)
    )
    return lazy, list(value) if lazy else value


def summed_up(pipe: Any) -> Pipe:
    """The call of transformers 4 for tasks that write: texts in a list have no list around each single answer."""

    def call(inputs: Any, **parameters: Any) -> Any:
        found = pipe(inputs, **parameters)
        texts = isinstance(inputs, list) and all(isinstance(one, str) for one in inputs)
        return [one for (one,) in found] if texts and all(len(one) == 1 for one in found) else found

    return call


def asked(pipe: Any) -> Pipe:
    """The call of question-answering in transformers 4: one of a list is answered alone, and lists go pairwise."""

    def call(*inputs: Any, question: Any = None, context: Any = None, **parameters: Any) -> Any:
        given = inputs[0] if len(inputs) == 1 else None
        if len(inputs) == 2:
            question, context = inputs
        if given is None:
            questions = question if isinstance(question, list) else [question]
            contexts = context if isinstance(context, list) else [context] * len(questions)
            given = [{"question": one, "context": other} for one, other in zip(questions, contexts, strict=True)]
        return pipe(given[0] if isinstance(given, list) and len(given) == 1 else given, **parameters)

    return call


def seen(pipe: Any) -> Pipe:
    """The call of visual-question-answering in transformers 4: each question with each picture."""

    def call(image: Any, question: Any = None, **parameters: Any) -> Any:
        if question is None:
            return pipe(image, **parameters)
        several = isinstance(image, list | KeyDataset) or isinstance(question, list)
        pictures = [image[index] for index in range(len(image))] if isinstance(image, list | KeyDataset) else [image]
        questions = question if isinstance(question, list) else [question]
        pairs = [{"image": one, "question": text} for text in questions for one in pictures]
        return pipe(pairs if several else pairs[0], **parameters)

    return call


REMOVED: Mapping[str, Callable[[Any], Pipe]] = {
    "summarization": summed_up,
    "translation": summed_up,
    "translation_xx_to_yy": summed_up,
    "text2text-generation": summed_up,
    "question-answering": asked,
    "visual-question-answering": seen,
}
"""Calls of tasks that transformers 5 has no longer, as far as they were more than those of any pipeline."""


def keyed(*values: Any) -> Any:
    return KeyDataset([{"x": one} for one in values], "x")  # type: ignore[arg-type]


FORMS: Mapping[str, Form] = {
    "one": lambda pipe, a, b, own: pipe(a, **own),
    "a list of one": lambda pipe, a, b, own: pipe([a], **own),
    "a list": lambda pipe, a, b, own: pipe([a, b], **own),
    "a generator": lambda pipe, a, b, own: pipe((one for one in (a, b)), **own),
    "a data set": lambda pipe, a, b, own: pipe(keyed(a, b), **own),
}
DICTS: Mapping[str, Form] = {
    "keywords": lambda pipe, a, b, own: pipe(**a, **own),
    "in order": lambda pipe, a, b, own: pipe(*a.values(), **own),
}
WITHOUT: Mapping[str, Sequence[str]] = {
    "table-question-answering": ("a generator", "a data set"),
    "keypoint-matching": ("a generator", "a data set"),
    "decision": ("keywords", "in order"),
    "image-to-text": ("keywords", "in order"),
    "any-to-any": ("a generator",),
}
"""Calls that transformers itself refuses."""
_HELLO, _BYE = ([{"role": "user", "content": [{"type": "text", "text": word}]}] for word in ("hello", "good bye"))
_PROMPTS = {"max_new_tokens": 3, "do_sample": False}
_SHORT = {"generate_kwargs": {"max_new_tokens": 3, "do_sample": False}}
_A, _B, _SOUND, _SEEN = image(40, 48, 1), image(48, 40), audio(1.0), "it <image>"
_HEARD = "it <|audio_bos|><|AUDIO|><|audio_eos|>"
_LABELS = {"candidate_labels": ["a cat", "sky"]}
_BOXES = [("sea", (0, 0, 90, 90)), ("wide", (100, 0, 190, 90))]
_WIDE = {"question": "what was wide", "word_boxes": _BOXES}

CALLS: list[tuple[str, Callable[[Pipe], Any]]] = [
    ("text-classification", lambda pipe: pipe("a", text_pair="b c")),
    ("text-classification", lambda pipe: pipe("a", text_pair="b c", top_k=1)),
    ("text-classification", lambda pipe: pipe(inputs="a", text_pair="b c")),
    ("text-classification", lambda pipe: pipe(["a", "d e"], text_pair="b c")),
    ("text-classification", lambda pipe: pipe(["a", "d e"], text_pair="b c", top_k=2)),
    ("text-classification", lambda pipe: pipe((one for one in "ab"), text_pair="b c")),
    ("text-classification", lambda pipe: pipe(keyed("a", "d e"), text_pair="b c")),
    ("text-classification", lambda pipe: pipe([[["a", "b c"]], [["d", "e"]]])),
    ("text-classification", lambda pipe: pipe([[["a", "b c"]]], top_k=2)),
    ("text-classification", lambda pipe: pipe({"text": "a", "text_pair": "b"})),
    ("text-classification", lambda pipe: pipe([{"text": "a", "text_pair": "b"}, "c"], batch_size=1)),
    ("text-classification", lambda pipe: len(pipe(keyed("a", "b", "c")))),
    ("text-generation", lambda pipe: pipe(_text_chat("a"), **_PROMPTS)),
    ("text-generation", lambda pipe: pipe([_text_chat("a"), _text_chat("b")], **_PROMPTS)),
    ("text-generation", lambda pipe: pipe([_text_chat("a")], **_PROMPTS)),
    ("text-generation", lambda pipe: pipe((_text_chat(one) for one in "ab"), **_PROMPTS)),
    ("text-generation", lambda pipe: pipe((one for one in _text_chat("a")), **_PROMPTS)),
    ("text-generation", lambda pipe: pipe(keyed(_text_chat("a"), _text_chat("b")), **_PROMPTS)),
    ("text-generation", lambda pipe: pipe(keyed(*_text_chat("a")), **_PROMPTS)),
    ("text-generation", lambda pipe: pipe(text_inputs=keyed("a", "b"), **_PROMPTS)),
    ("text-generation", lambda pipe: pipe(["a", "b"], num_beams=2, num_return_sequences=2, **_PROMPTS)),
    ("image-text-to-text", lambda pipe: pipe([_A, _B], text=[_SEEN, _SEEN], **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe([_A, _B], [_SEEN, _SEEN], **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe([_A], text=[_SEEN], **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(images=[_A, _B], text=[_SEEN, _SEEN], **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe({"images": [_A, _B], "text": [_SEEN, _SEEN]}, **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(images=[_A, _B], text=f"{_SEEN} {_SEEN}", **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(images=[[_A, _B]], text=f"{_SEEN} {_SEEN}", **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(({"images": one, "text": _SEEN} for one in (_A, _B)), **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(text=["one", "two"], **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(text=("one", "two"), **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(text=(one for one in ("one", "two")), **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(text=keyed("one", "two"), **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(text=_HELLO, **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(text=[_HELLO, _BYE], **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe(text=keyed(_HELLO, _BYE), **_SHORT)),
    ("image-text-to-text", lambda pipe: pipe((one for one in _HELLO), **_SHORT)),
    ("any-to-any", lambda pipe: pipe(["one", "two"], **_SHORT)),
    ("any-to-any", lambda pipe: pipe(text=["one", "two"], **_SHORT)),
    ("any-to-any", lambda pipe: pipe([_HEARD, _HEARD], audio=[_SOUND, _SOUND[::-1].copy()], **_SHORT)),
    ("any-to-any", lambda pipe: pipe([{"text": _HEARD, "audio": _SOUND}, {"text": "one"}], **_SHORT)),
    ("any-to-any", lambda pipe: pipe(text=_HEARD, audio=[_SOUND], **_SHORT)),
    ("any-to-any", lambda pipe: pipe(text=f"{_HEARD} {_HEARD}", audio=[_SOUND, _SOUND[:9000]], **_SHORT)),
    ("any-to-any", lambda pipe: pipe({"text": f"{_HEARD} {_HEARD}", "audio": [_SOUND, _SOUND[:9000]]}, **_SHORT)),
    ("any-to-any", lambda pipe: pipe(({"text": one} for one in ("one", "two")), **_SHORT)),
    ("any-to-any", lambda pipe: pipe(text=[_HELLO, _BYE], **_SHORT)),
    ("question-answering", lambda pipe: pipe(question=["Who?", "Why?"], context="The sea was wide.")),
    ("question-answering", lambda pipe: pipe(question=["Who?", "Why?"], context=["The sea.", "It was wide."])),
    ("visual-question-answering", lambda pipe: pipe(image=[_A, _B], question=["Who?", "Why?", "What?"], top_k=2)),
    ("visual-question-answering", lambda pipe: pipe(image=[_A, _B], question="Who?", top_k=2)),
    ("visual-question-answering", lambda pipe: pipe(image=_A, question=["Who?", "Why?"], top_k=2)),
    ("visual-question-answering", lambda pipe: pipe(image=keyed(_A, _B), question="Who?", top_k=2)),
    ("visual-question-answering", lambda pipe: pipe(image=keyed(_A, _B), question=["Who?", "Why?"], top_k=2)),
    ("zero-shot-image-classification", lambda pipe: pipe(image=keyed(_A, _B), **_LABELS)),
    ("zero-shot-image-classification", lambda pipe: pipe(image=(one for one in (_A, _B)), **_LABELS)),
    ("zero-shot-image-classification", lambda pipe: pipe([_A, _B], ["a cat", "sky"])),
    ("zero-shot-object-detection", lambda pipe: pipe([_A, _B], [["a cat"], ["a dog", "sky"]], threshold=0.0)),
    ("zero-shot-object-detection", lambda pipe: pipe(image=_A, candidate_labels=["a cat"], threshold=0.0)),
    ("zero-shot-object-detection", lambda pipe: pipe(_A, text_queries=["a cat", "sky"], threshold=0.0)),
    ("keypoint-matching", lambda pipe: pipe([_A, _B], 0.01)),
    ("keypoint-matching", lambda pipe: pipe([[_A, _B], [_B, _A]], 0.0)),
    ("document-question-answering", lambda pipe: pipe(image=None, **_WIDE)),
    ("document-question-answering", lambda pipe: pipe(dict(_WIDE))),
    ("summarization", lambda pipe: pipe(["a b", "c"], num_beams=2, num_return_sequences=2, max_new_tokens=3)),
]


def _text_chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """transformers' pipelines by task, filled as they are wanted."""
    return {}


def pipe_of(task: str, pipes: dict[str, Any]) -> Any:
    if task not in pipes:
        pipes[task] = load(task)
    return pipes[task]


def check(task: str, pipe: Any, call: Callable[[Pipe], Any], *, values: bool = True) -> None:
    theirs = taken(call(REMOVED[task](pipe) if task in REMOVED else pipe))
    mine = taken(call(Answering(task, pipe)))
    assert (mine[0], form(mine[1])) == (theirs[0], form(theirs[1]))
    if values and isinstance(theirs[1], list):
        for one, other in zip(mine[1], theirs[1], strict=True):
            assert_same(one, other)
    elif values:
        assert_same(mine[1], theirs[1])


@pytest.mark.parametrize("task", TASKS)
def test_every_form_on_every_task(task: str, pipes: dict[str, Any], tmp_path: Path) -> None:
    row, pipe = CHECKPOINTS[task], pipe_of(task, pipes)
    inputs = row.inputs(tmp_path)[:2]
    forms = {**FORMS, **(DICTS if isinstance(inputs[0], Mapping) else {})}
    for name in forms.keys() - set(WITHOUT.get(task, ())):

        def call(one: Pipe, wanted: Form = forms[name]) -> Any:
            return wanted(one, *copy.deepcopy(inputs), row.parameters)

        try:
            with stand_in_for_torchvision() if task == "mask-generation" else contextlib.nullcontext():
                check(task, pipe, call, values=task != "text-to-audio")
        except (AssertionError, InputError) as error:
            raise AssertionError(f"{task} with {name}: {error}") from error


@pytest.mark.parametrize(("task", "call"), CALLS, ids=[f"{task}-{index}" for index, (task, _) in enumerate(CALLS)])
def test_calls_of_their_own(task: str, call: Callable[[Pipe], Any], pipes: dict[str, Any]) -> None:
    check(task, pipe_of(task, pipes), call)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda pipe: pipe(image=[_A, _B], question=(one for one in ("Who?", "Why?"))),
            "question of .* is taken lazily",
        ),
        (
            lambda pipe: list(pipe(image=(one for one in (_A, _B)), question=(one for one in ("Who?",)))),
            "different lengths",
        ),
        (lambda pipe: pipe({"image": _A}, question="Who?"), "put them into one dict"),
    ],
)
def test_what_cannot_be_combined_is_refused(call: Callable[[Pipe], Any], words: str, pipes: dict[str, Any]) -> None:
    task = "visual-question-answering"
    with pytest.raises(InputError, match=words):
        call(Answering(task, pipe_of(task, pipes)))


def test_more_than_transformers_takes(pipes: dict[str, Any]) -> None:
    """Pairs as tuples, and pictures of a data set beside one question for all."""
    pipe = pipe_of("text-classification", pipes)
    mine, pair = Answering("text-classification", pipe), {"text": "a", "text_pair": "b c"}
    assert_same(mine(("a", "b c")), pipe(pair))
    assert_same(mine([("a", "b c"), ("d", "e")]), pipe([pair, {"text": "d", "text_pair": "e"}]))
    assert_same(list(mine(one for one in [("a", "b c")])), pipe([pair]))
    assert_same(mine(["a", "d"], text_pair=["b c", "e"]), pipe([pair, {"text": "d", "text_pair": "e"}]))
    pipe = pipe_of("document-question-answering", pipes)
    mine = Answering("document-question-answering", pipe)
    assert_same(list(mine(image=keyed(_A, _B), **_WIDE)), [pipe(image=one, **_WIDE) for one in (_A, _B)])
    assert not mine([])
    assert list(mine(one for one in ())) == []
