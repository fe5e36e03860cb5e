"""Models that write about pictures and sound: seeds, stops, media of unequal shapes, what is refused, and the older decoders."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipefleet.contract.messages import JobItem
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.vision.document_question_answering import document_answerer
from pipefleet_workers.adapters.writing.equal_shapes import EqualWriter
from pipefleet_workers.adapters.writing.multimodal import EqualMultimodal, MultimodalGenerator, image_text_writer
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import Decoded, ItemError, JobContext, Work
from pipefleet_workers.models.warmup import warm_up
from pipefleet_workers.observe.service_fit import ServiceFit
from tests.checkpoints import CHECKPOINTS, cached
from tests.checkpoints.media import audio, image
from tests.parity.cases.multimodal import without_media
from tests.parity.harness import Call, Running, finished, load, recording, running

CHAT, CAPTION, PAGES = "image-text-to-text", "image-to-text", "document-question-answering"
PICTURES = [image(40, 30), image(30, 40, 1), image(64, 64, 2), image(20, 50, 3)]


def chat(words: str, *pictures: Any) -> list[dict[str, Any]]:
    seen = [{"type": "image", "image": one} for one in pictures]
    return [{"role": "user", "content": [*seen, {"type": "text", "text": words}]}]


def outputs(outcomes: list[Any]) -> list[Any]:
    assert [one.failure for one in outcomes] == [None] * len(outcomes)
    return [one.output for one in outcomes]


@pytest.fixture(scope="module")
def llava() -> Any:
    return load(CHAT)


@pytest.fixture
def engine(llava: Any) -> Iterator[Running]:
    with running(recording(image_text_writer, llava), CHAT) as one:
        yield one


SAMPLED = {"do_sample": True, "max_new_tokens": 9}


def test_a_sampled_answer_about_a_picture_depends_on_its_seed_and_never_on_its_neighbours(engine: Running) -> None:
    calls = [
        Call(chat("What?", PICTURES[0]), {"seed": 1, "generate_kwargs": SAMPLED}),
        Call(
            chat("Which of both is red?", *PICTURES[:2]), {"seed": 1, "generate_kwargs": {**SAMPLED, "temperature": 3}}
        ),
        Call(chat("Nothing to see."), {"seed": 1, "generate_kwargs": {**SAMPLED, "top_k": 5, "max_new_tokens": 4}}),
        Call(chat("What?", PICTURES[0]), {"seed": 2, "generate_kwargs": SAMPLED}),
    ]
    alone = [outputs(engine.run([call]))[0] for call in calls]
    assert alone[0] != alone[3]
    assert outputs(engine.run_together(calls)) == alone
    assert max(len(batch.units) for batch in engine.adapter.batches) == 4
    assert outputs(engine.run_together(calls[::-1])) == alone[::-1]


def test_several_sampled_answers_bring_their_picture_with_each_row(engine: Running) -> None:
    calls = [
        Call(chat("What?", one), {"seed": 4, "generate_kwargs": {**SAMPLED, "num_return_sequences": 3}})
        for one in PICTURES
    ]
    alone = [outputs(engine.run([call]))[0] for call in calls]
    assert all(len(records) == 3 for records in alone)
    assert outputs(engine.run_together(calls)) == alone


def test_media_of_unequal_shapes_are_taken_apart_and_their_order_is_kept(llava: Any) -> None:
    """As with processors that give each picture a number of tiles of its own."""

    class Sized(MultimodalGenerator):
        def _read(self, value: Any, arguments: Any) -> Any:
            prompt, ids, features = super()._read(value, arguments)
            if "pixel_values" in features and "odd" in value[0]["content"][-1]["text"]:
                features["pixel_values"] = features["pixel_values"][
                    None
                ]  # another number of dimensions: cannot be joined
            return prompt, ids, features

        def _inputs(self, units: Any) -> dict[str, Any]:
            inputs = super()._inputs(units)
            if "pixel_values" in inputs and inputs["pixel_values"].dim() == 5:
                inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
            return inputs

    words = ["odd one", "an even one", "no picture", "another odd one, and a longer one"]
    calls = [
        Call(chat(text, *([PICTURES[i]] if "no" not in text.split() else [])), {"max_new_tokens": 6})
        for i, text in enumerate(words)
    ]
    with running(recording(image_text_writer, llava), CHAT) as engine:
        wanted = outputs(engine.run(calls))
    adapter = recording(Sized, llava)
    with running(adapter, CHAT) as engine:
        assert outputs(engine.run_together(calls)) == wanted
    together = [batch for batch in adapter.batches if len(batch.units) == 4]
    assert together, "the four waited as one batch"
    assert adapter.collate(together[0].units) == {}


class Careless(MultimodalGenerator):
    """Hides no padding from the model."""

    def _inputs(self, units: Any) -> dict[str, Any]:
        inputs = super()._inputs(units)
        return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}


class Swapped(MultimodalGenerator):
    """Hands each request the media of another."""

    def _inputs(self, units: Any) -> dict[str, Any]:
        inputs = super()._inputs(units)
        return {name: one.flip(0) if one.is_floating_point() else one for name, one in inputs.items()}


@pytest.mark.parametrize("task", [CHAT, "any-to-any"])
@pytest.mark.parametrize(("kind", "exact"), [(MultimodalGenerator, True), (Careless, False), (Swapped, False)])
def test_the_proof_looks_at_words_and_media_in_one_batch(task: str, kind: Any, exact: bool) -> None:
    assert warm_up(kind(load(task)), task_spec(task), {}, ServiceFit(), 4096).pads is exact


def test_a_model_that_padding_changes_batches_equal_shapes_only(llava: Any, engine: Running) -> None:
    pictured = [Call(chat("What?", one), {"max_new_tokens": 5}) for one in PICTURES]
    calls = [*pictured, Call(chat("What is it?", PICTURES[0]), {"max_new_tokens": 5}), Call(chat("What?"), {})]
    wanted = outputs(engine.run(calls))
    adapter = recording(Careless, llava)
    adapter.pads = False
    with running(adapter, CHAT) as careless:
        assert outputs(careless.run_together(calls)) == wanted
    assert max(len(batch.units) for batch in adapter.batches) == len(pictured)


@pytest.mark.parametrize(
    ("inputs", "parameters", "code", "words"),
    [
        ({"text": chat("x"), "images": PICTURES[0]}, {}, "bad_input", "inside its messages"),
        ("", {}, "bad_input", "empty"),
        (chat("x"), {"generate_kwargs": {"max_new_tokens": 4}, "max_new_tokens": 4}, "bad_parameter", "twice"),
        (chat("word " * 900), {}, "too_long", "the model takes"),
        (chat("x"), {"do_sample": True, "temperature": 0}, "bad_parameter", "do_sample=false"),
    ],
)
def test_what_cannot_be_served_fails_alone(
    engine: Running, inputs: Any, parameters: dict[str, Any], code: str, words: str
) -> None:
    bad, fine = engine.run([Call(inputs, parameters), Call(chat("fine", PICTURES[1]), {"max_new_tokens": 2})])
    assert bad.failure is not None
    assert (bad.failure.code, bad.failure.stage) == (code, "preprocess")
    assert words in bad.failure.message
    assert fine.failure is None


def test_a_model_with_a_generate_of_its_own_answers_as_the_pipeline_does() -> None:
    """BLIP as image-text-to-text: equal prompts share a call, others do not."""
    pipe = transformers.pipeline(CHAT, model=str(cached(CAPTION)), device="cpu", dtype=torch.float32)
    texts = ["a photo of", "a photo of", "two dogs", "a"]
    calls = [
        Call({"images": one, "text": text}, {"max_new_tokens": 6, "return_full_text": full})
        for one, text in zip(PICTURES, texts, strict=True)
        for full in (True, False)
    ]
    wanted = [
        pipe(images=call.inputs["images"], text=call.inputs["text"], **call.parameters) for call in copy.deepcopy(calls)
    ]
    adapter = recording(image_text_writer, pipe)
    assert isinstance(adapter, EqualMultimodal)
    with running(adapter, CHAT) as engine:
        assert outputs(engine.run_together(calls)) == wanted
    assert max(len(batch.units) for batch in adapter.batches) == 4


@pytest.mark.parametrize("content", ["It is", [{"type": "text", "text": "It is"}]])
def test_an_answer_that_was_begun_is_gone_on_with(llava: Any, engine: Running, content: Any) -> None:
    begun = [*chat("What is it?", PICTURES[0]), {"role": "assistant", "content": content}]
    (records,) = outputs(engine.run([Call(begun, {"max_new_tokens": 5})]))
    parts = [*begun[:1], {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    (wanted,) = llava(text=copy.deepcopy(parts), max_new_tokens=5)
    assert records == [{name: without_media(value) for name, value in wanted.items()}]


def test_captions_that_sample_are_repeatable_and_have_a_call_for_themselves() -> None:
    adapter = recording(EqualWriter, load(CAPTION))
    calls = [Call(one, {"seed": 3, "generate_kwargs": SAMPLED}) for one in PICTURES]
    state = torch.random.get_rng_state()
    with running(adapter, CAPTION) as engine:
        alone = [outputs(engine.run([call]))[0] for call in calls]
        assert outputs(engine.run_together(calls)) == alone
        other = outputs(engine.run([Call(PICTURES[0], {"seed": 4, "generate_kwargs": SAMPLED})]))
    assert other[0] != alone[0]
    assert max(len(batch.units) for batch in adapter.batches) == 1
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_seed_is_what_torch_is_seeded_with_before_a_page_is_read() -> None:
    page, seeds = {"image": PICTURES[2], "question": "what is it"}, (3, 4)
    wanted = []
    pipe = transformers.pipeline(
        "document-question-answering", model=str(cached(f"{PAGES}:donut")), device="cpu", dtype=torch.float32, **SAMPLED
    )
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wanted.append(pipe(**page))
    assert wanted[0] != wanted[1]
    with running(recording(document_answerer, load(f"{PAGES}:donut")), PAGES) as engine:
        assert outputs(engine.run_together([Call(page, {**SAMPLED, "seed": seed}) for seed in seeds])) == wanted


def test_a_caption_ends_at_a_stop_string_and_a_cancelled_one_fails_alone() -> None:
    pipe = load(CAPTION)
    adapter = recording(EqualWriter, pipe)
    with running(adapter, CAPTION) as engine:
        (full,) = outputs(engine.run([Call(PICTURES[0], {"max_new_tokens": 12})]))
        text = full[0]["generated_text"]
        stop = text[len(text) // 2]
        (cut,) = outputs(engine.run([Call(PICTURES[0], {"max_new_tokens": 12, "stop": [stop]})]))
        adapter.gate.clear()
        adapter.entered.clear()
        jobs = [
            engine.submit([Call(one, {"max_new_tokens": 9})], id=str(index)) for index, one in enumerate(PICTURES[:2])
        ]
        assert adapter.entered.wait(60)
        jobs[0][0].cancelled = True
        adapter.gate.set()
        ends = [finished(sink)[0] for _, sink in jobs]
    assert len(cut[0]["generated_text"]) < len(text)
    assert ends[0].failure is not None
    assert ends[0].failure.code == "cancelled"
    assert ends[1].failure is None


@pytest.mark.filterwarnings("ignore:Unfeasible length")
def test_a_caption_never_leaves_the_decoders_table_of_positions() -> None:
    """64 positions; transformers' own default of 256 new tokens would index beyond them."""
    with running(recording(EqualWriter, load(CAPTION)), CAPTION) as engine:
        long, refused = engine.run(
            [
                Call(PICTURES[0], {"generate_kwargs": {"max_new_tokens": 300, "min_new_tokens": 300}}),
                Call({"image": PICTURES[1], "text": "dog " * 90}, {"max_new_tokens": 3}),
            ]
        )
    assert long.failure is None
    assert refused.failure is not None
    assert refused.failure.code == "too_long"


def test_every_generation_argument_of_a_caption_that_generate_refuses_is_a_bad_parameter() -> None:
    with running(recording(EqualWriter, load(CAPTION)), CAPTION) as engine:
        (bad,) = engine.run([Call(PICTURES[0], {"generate_kwargs": {"do_sample": False, "num_return_sequences": 2}})])
    assert bad.failure is not None
    assert bad.failure.code == "bad_parameter"


def test_several_recordings_belong_to_one_text_whatever_is_in_the_batch() -> None:
    pipe, heard, short = load("any-to-any"), "it <|audio_bos|><|AUDIO|><|audio_eos|>", {"max_new_tokens": 3}
    sounds = [audio(1.0), audio(2.2, "noise"), audio(0.7, "chirp")]
    prompts = [
        {"text": f"{heard} {heard}", "audio": sounds[:2]},
        {"text": heard, "audio": sounds[2:]},
        {"text": heard, "audio": sounds[0]},
        {"text": "nothing"},
    ]
    wanted = [pipe(**copy.deepcopy(one), generate_kwargs=short) for one in prompts]
    with running(recording(image_text_writer, load("any-to-any")), "any-to-any") as engine:
        assert outputs(engine.run_together([Call(one, {"generate_kwargs": short}) for one in prompts])) == wanted


def test_sounds_of_one_request_stay_its_own() -> None:
    """Requests with one, two and no sounds in one batch, each with its own answer wherever it stands."""
    chats = CHECKPOINTS["any-to-any"].inputs  # ragged on purpose
    calls = [Call(one, {"max_new_tokens": 5}) for one in chats(None)]  # type: ignore[arg-type]
    with running(recording(image_text_writer, load("any-to-any")), "any-to-any") as engine:
        forth = outputs(engine.run_together(calls))
        assert outputs(engine.run_together(calls[::-1])) == forth[::-1]
    assert len({repr(one) for one in forth}) > 2


def test_a_recording_of_one_token_is_refused_whatever_stands_beside_it() -> None:
    """Alone the model takes its prompt for one of an earlier release, and fails; next to a longer one it would not."""
    prompt = {"text": "<|AUDIO|> what is it?"}
    works = [{**prompt, "audio": np.full(count, 0.01, np.float32)} for count in (160, 16_000)]
    short, fine = image_text_writer(load("any-to-any")).prepare(
        [decoded(place, one) for place, one in enumerate(works)]
    )
    assert isinstance(short, ItemError)
    assert (short.failure.code, short.failure.stage) == ("bad_input", "preprocess")
    assert not isinstance(fine, ItemError)


def decoded(place: int, value: Any) -> Decoded:
    job = JobContext("job", None, {}, 3, None, Outcomes(range(2)))
    return Decoded(Work(job, place, JobItem(str(place), value), {}, 1), value)
