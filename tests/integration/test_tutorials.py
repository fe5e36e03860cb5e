"""What the public tutorials of transformers' pipelines show, called on the fleet and compared with transformers itself."""

from __future__ import annotations

import itertools
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import soundfile
import torch
import transformers as hf
from PIL import Image

import pipefleet
from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.errors import InputError, ParameterError, UnknownModelError
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.stack import Stack
from tests.checkpoints import cached
from tests.checkpoints.media import audio, document, image, image_bytes, sound_bytes
from tests.parity.harness import assert_same, load
from tests.parity.in_process_worker import working
from tests.servers import until

WAIT = 120
SHORT = {"generate_kwargs": {"num_beams": 1, "max_new_tokens": 8}}
"""Random models never end by themselves."""
SERVED = {
    "classify": "text-classification",
    "zero-shot": "zero-shot-classification",
    "tables": "table-question-answering",
    "write": "text-generation",
    "translate": "translation_xx_to_yy",
    "speech": "automatic-speech-recognition:whisper",
    "ctc": "automatic-speech-recognition",
    "say": "text-to-audio",
    "pictures": "image-classification",
    "masks": "image-segmentation",
    "depth": "depth-estimation",
    "vqa": "visual-question-answering",
    "pages": "document-question-answering",
    "find": "zero-shot-object-detection",
    "chat": "image-text-to-text",
    "matches": "keypoint-matching",
}
"""pool: checkpoint. All but one are the only pool of their task."""
TABLE = {"Repository": ["Transformers", "Datasets", "Tokenizers"], "Stars": ["36542", "4512", "3934"]}
LABELS = ["sports", "politics", "travel"]


class Tutorial:
    """The fleet, whose workers are started in this process when they are first wanted."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._stack = ExitStack()
        self._working: set[str] = set()
        self._direct: dict[str, Any] = {}

    def pipe(self, pool: str, **arguments: Any) -> Any:
        """`pipefleet.pipeline` on a pool."""
        self.start(pool)
        one = self.client.fleet.pools[pool]
        return pipefleet.pipeline(one.task, model=one.model, client=self.client, **arguments)

    def start(self, pool: str) -> None:
        """A worker for a pool, unless it has one."""
        if pool not in self._working:
            self._working.add(pool)
            self._stack.enter_context(working(self.client.fleet, self.client.fleet.pools[pool], self.client.settings))

    def direct(self, pool: str) -> Any:
        """transformers' own pipeline of the pool's model."""
        if pool not in self._direct:
            self._direct[pool] = load(SERVED[pool])
        return self._direct[pool]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorials")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Path:
    """A model that AutoBackbone can read, with its image processor."""
    config = hf.Dinov2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        hf.AutoModel.from_config(config).eval().save_pretrained(folder / "dinov2")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "dinov2")
    return folder / "dinov2"


@pytest.fixture(scope="module")
def apart(folder: Path) -> tuple[Path, Path]:
    """A classifier without its tokenizer, and the tokenizer in a folder of its own."""
    model, tokenizer = folder / "model", folder / "tokenizer"
    shutil.copytree(cached("text-classification"), model)
    tokenizer.mkdir()
    for path in [*model.glob("*token*"), *model.glob("vocab*"), *model.glob("merges*")]:
        path.rename(tokenizer / path.name)
    return model, tokenizer


@pytest.fixture(scope="module")
def stack(folder: Path, backbone: Path, apart: tuple[Path, Path]) -> Iterator[Stack]:
    tables = [
        f'[pools.{pool}]\ntask = "{checkpoint.partition(":")[0]}"\nmodel = "{cached(checkpoint)}"\n'
        + ("default = true\n" if pool in ("classify", "speech") else "")
        for pool, checkpoint in SERVED.items()
    ]
    model, tokenizer = apart
    tables.append(f'[pools.apart]\ntask = "text-classification"\nmodel = "{model}"\ntokenizer = "{tokenizer}"\n')
    tables.append(f'[pools.backbone]\ntask = "image-feature-extraction"\nmodel = "{backbone}"\n')
    fleet = folder / "fleet.toml"
    fleet.write_text("\n".join(tables))
    with Stack(folder / "data", fleet=fleet, pools=(), flower=False) as one, in_environment(one.environment()):
        yield one


@pytest.fixture(scope="module")
def fleet(stack: Stack) -> Iterator[Tutorial]:
    with Client() as client:
        one = Tutorial(client)
        yield one
        one.close()


@pytest.fixture
def store(stack: Stack) -> ObjectStore:
    return ObjectStore()


class TestText:
    def test_several_inputs_as_a_list(self, fleet: Tutorial) -> None:
        texts = ["I like it.", "I do not.", "", "A much longer sentence about nothing in particular."]
        for parameters in ({}, {"top_k": None}, {"top_k": 1}, {"batch_size": 8, "function_to_apply": "none"}):
            assert_same(fleet.pipe("classify")(texts, **parameters), fleet.direct("classify")(texts, **parameters))

    def test_parameters_of_the_pipeline_hold_until_a_call_says_otherwise(self, fleet: Tutorial) -> None:
        mine = fleet.pipe("classify", top_k=2, device=0, batch_size=4)
        theirs = hf.pipeline("text-classification", model=str(cached("text-classification")), device="cpu", top_k=2)
        assert_same(mine("I like it."), theirs("I like it."))
        assert_same(mine("I like it.", top_k=1), theirs("I like it.", top_k=1))
        assert_same(mine(["a", "b"]), theirs(["a", "b"]))
        pair = {"text": "a", "text_pair": "b"}
        assert_same(mine(pair), theirs(pair))
        assert len(mine.submit("I like it.").result(WAIT)) == 2
        with pytest.raises(ParameterError, match="did you mean 'top_k'"):
            fleet.pipe("classify", topk=2)
        with pytest.raises(
            ParameterError,
            match=r"tokenizer belongs to how a pool loads its model: write `tokenizer = .*` under its .* in fleet\.toml",
        ):
            fleet.pipe("classify", tokenizer="org/other")

    def test_the_task_of_a_model_is_found_by_the_model(self, fleet: Tutorial) -> None:
        fleet.start("zero-shot")
        pipe = pipefleet.pipeline(model=str(cached("zero-shot-classification")), client=fleet.client)
        assert pipe.task == "zero-shot-classification"
        assert pipe("Going to Rome.", candidate_labels=LABELS)["sequence"] == "Going to Rome."
        with pytest.raises(UnknownModelError, match="no pool of the fleet serves org/none"):
            pipefleet.pipeline(model="org/none", client=fleet.client)
        with pytest.raises(ParameterError, match="a task, a model, or both"):
            pipefleet.pipeline(client=fleet.client)

    def test_pairs_of_texts_are_ranked(self, fleet: Tutorial) -> None:
        pairs = [
            {"text": "Which is the capital?", "text_pair": one} for one in ("Paris is.", "Bread.", "The sea, said he")
        ]
        mine, theirs = fleet.pipe("classify"), fleet.direct("classify")
        parameters = {"function_to_apply": "sigmoid", "top_k": None}
        assert_same(mine(pairs, **parameters), theirs(pairs, **parameters))
        assert_same(mine(pairs[0]), theirs(pairs[0]))

    def test_a_model_and_a_tokenizer_that_lie_apart(self, fleet: Tutorial, apart: tuple[Path, Path]) -> None:
        assert not list(apart[0].glob("*token*"))
        tokenizer = hf.AutoTokenizer.from_pretrained(apart[1])
        theirs = hf.pipeline("text-classification", model=str(apart[0]), tokenizer=tokenizer, device="cpu")
        assert_same(fleet.pipe("apart")(["I like it.", "no"]), theirs(["I like it.", "no"]))

    def test_tokenizer_model_softmax_and_label_by_hand_agree(self, fleet: Tutorial) -> None:
        place, text = str(cached("text-classification")), "We are very happy to show you the library."
        tokenizer = hf.AutoTokenizer.from_pretrained(place)
        model = hf.AutoModelForSequenceClassification.from_pretrained(place).eval()
        with torch.no_grad():
            scores = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        best = int(scores.argmax())
        assert_same(
            fleet.pipe("classify")(text), [{"label": model.config.id2label[best], "score": float(scores[best])}]
        )

    def test_zero_shot_labels_by_position_and_by_name(self, fleet: Tutorial) -> None:
        mine, theirs = fleet.pipe("zero-shot"), fleet.direct("zero-shot")
        text = "I have a problem with my iphone that needs to be resolved asap!!"
        assert_same(mine(text, LABELS), theirs(text, LABELS))
        assert_same(mine(text, candidate_labels=LABELS), theirs(text, candidate_labels=LABELS))
        assert_same(mine(text, candidate_labels="urgent, phone"), theirs(text, candidate_labels="urgent, phone"))
        several = {"candidate_labels": LABELS, "multi_label": True, "hypothesis_template": "It is about {}."}
        assert_same(mine([text, "Rome"], **several), theirs([text, "Rome"], **several))
        assert_same(mine(sequences=text, candidate_labels=LABELS), theirs(text, LABELS))

    def test_several_sequences_for_one_prompt(self, fleet: Tutorial) -> None:
        parameters = {"max_new_tokens": 5, "num_return_sequences": 3, "num_beams": 3, "do_sample": False}
        prompts = ["The secret to baking a good cake is ", "A baguette is"]
        mine, theirs = fleet.pipe("write"), fleet.direct("write")
        assert_same(mine(prompts[0], **parameters), theirs(prompts[0], **parameters))
        parameters["return_full_text"] = False
        assert_same(mine(prompts, **parameters), theirs(prompts, **parameters))
        sampled = mine(prompts[0], max_new_tokens=5, num_return_sequences=4, do_sample=True)
        assert len(sampled) == 4

    def test_chats_alone_in_lists_and_from_a_generator(self, fleet: Tutorial) -> None:
        chats = [
            [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Hello, how are you?"}],
            [{"role": "user", "content": "And you?"}],
        ]
        parameters = {"max_new_tokens": 5, "do_sample": False}
        mine, theirs = fleet.pipe("write"), fleet.direct("write")
        answer = mine(chats[0], **parameters)
        assert_same(answer, theirs(chats[0], **parameters))
        assert answer[0]["generated_text"][-1]["role"] == "assistant"
        assert_same(mine(chats, **parameters), theirs(chats, **parameters))
        assert_same(list(mine((one for one in chats), **parameters)), theirs(chats, **parameters))
        longer = [*answer[0]["generated_text"], {"role": "user", "content": "Go on."}]
        assert_same(mine(longer, **parameters), theirs(longer, **parameters))

    def test_a_translation_named_by_its_languages(self, fleet: Tutorial) -> None:
        fleet.start("translate")
        direct, text = fleet.direct("translate"), "How old are you?"
        pipe = pipefleet.pipeline("translation_en_to_fr", client=fleet.client)
        german = pipefleet.pipeline("translation_en_to_de", client=fleet.client)
        wanted = direct(text, src_lang="en", tgt_lang="fr", max_new_tokens=8)
        assert_same(pipe(text, max_new_tokens=8), wanted)
        assert wanted != direct(text, src_lang="en", tgt_lang="de", max_new_tokens=8)
        assert german(text, max_new_tokens=8) != wanted
        assert_same(pipe([text, "Yes"], max_new_tokens=8)[0], wanted[0])
        assert_same(
            fleet.client.submit("translation_en_to_fr", text, parameters={"max_new_tokens": 8}).result(WAIT), wanted
        )

    def test_a_table_of_pandas_and_several_questions(self, fleet: Tutorial) -> None:
        mine, theirs, table = fleet.pipe("tables"), fleet.direct("tables"), pandas.DataFrame(TABLE)
        queries = ["How many stars does the transformers repository have?", "Which has the fewest?"]
        one = theirs(table=table, query=queries[0])
        assert_same(mine(table=table, query=queries[0]), one)
        assert isinstance(mine(table=TABLE, query=queries[0])["coordinates"][0], tuple)
        assert_same(mine(table, queries[0]), one)
        assert_same(mine({"table": table, "query": queries[0]}), one)
        assert_same(mine(table=table.to_dict("records"), query=queries[0]), one)
        assert_same(mine(table=TABLE, query=queries), theirs(table=table, query=queries))
        several = [{"table": table, "query": one} for one in queries]
        assert_same(mine(several), theirs(several))


class Lazy:
    """What `datasets` and torch have in common: a length and items by number, here for ever beyond its end."""

    def __init__(self, make: Callable[[int], Any], length: int) -> None:
        self.make, self.length, self.taken = make, length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        self.taken += 1
        return self.make(index)


class TestStreams:
    def test_a_generator_is_taken_as_far_as_results_are(self, fleet: Tutorial, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIPEFLEET_IN_FLIGHT", "4")
        taken: list[str] = []

        def examples() -> Iterator[str]:
            for number in itertools.count():
                taken.append(f"My example {number}")
                yield taken[-1]

        fleet.start("classify")
        model = fleet.client.fleet.pools["classify"].model
        with Client() as client:
            results = pipefleet.pipeline("text-classification", model=model, client=client)(examples())
            assert list(next(results)) == ["label", "score"]
            until(lambda: len(taken) == 1 + 4)
            for _ in range(5):
                next(results)
            until(lambda: len(taken) == 6 + 4)
            results.close()
        assert len(taken) == 6 + 4

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_a_data_set_ends_with_its_length(self, fleet: Tutorial, wrapped: bool) -> None:
        from transformers.pipelines.pt_utils import KeyDataset

        rows = Lazy(lambda index: {"text": f"This is test {index}"} if wrapped else f"This is test {index}", 300)
        results = fleet.pipe("classify")(KeyDataset(rows, "text") if wrapped else rows, batch_size=64)  # type: ignore[arg-type]
        next(results)
        assert rows.taken <= fleet.client.settings.in_flight + 1 < 300
        assert 1 + sum(1 for _ in results) == 300 == rows.taken

    def test_torch_data_sets_of_both_kinds(self, fleet: Tutorial) -> None:
        texts = ["a text", "and another text"]

        class Mapped(torch.utils.data.Dataset[str]):
            def __len__(self) -> int:
                return 2

            def __getitem__(self, index: int) -> str:
                return texts[index % 2]

        class Streamed(torch.utils.data.IterableDataset[str]):
            def __iter__(self) -> Iterator[str]:
                return iter(texts)

        wanted = list(fleet.direct("classify")(Mapped()))
        for each in (Mapped(), Streamed()):
            assert_same(list(fleet.pipe("classify")(each)), wanted)

    def test_columns_and_sets_of_datasets(self, fleet: Tutorial) -> None:
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_dict({"text": [f"text {index}" for index in range(40)]})
        wanted = fleet.direct("classify")(list(rows["text"]))
        assert_same(list(fleet.pipe("classify")(rows["text"])), wanted)
        streamed = (row["text"] for row in rows.to_iterable_dataset())
        assert_same(list(fleet.pipe("classify")(streamed)), wanted)
        pairs = datasets.Dataset.from_dict({"text": ["a", "b"], "text_pair": ["c", "d"]})
        assert_same(list(fleet.pipe("classify")(pairs)), fleet.direct("classify")(pairs.to_list()))


class TestSpeech:
    @pytest.mark.parametrize("stamps", [True, "word", None])
    def test_timestamps(self, fleet: Tutorial, stamps: Any) -> None:
        wave = audio(4.0, "speech", seed=1)
        found = fleet.pipe("speech")(wave, return_timestamps=stamps, **SHORT)
        assert_same(found, fleet.direct("speech")(wave.copy(), return_timestamps=stamps, **SHORT))
        assert all(isinstance(one["timestamp"], tuple) for one in found.get("chunks", []))

    def test_every_way_to_hand_in_a_recording(self, fleet: Tutorial, store: ObjectStore, tmp_path: Path) -> None:
        wave = audio(2.0, "speech", seed=3)
        place = tmp_path / "speech.flac"
        place.write_bytes(sound_bytes(wave, "FLAC"))
        stored, _ = soundfile.read(place, dtype="float32")
        store.put("s3://pipefleet/in/speech.flac", place.read_bytes())
        given = [
            place, str(place), place.read_bytes(), "s3://pipefleet/in/speech.flac", stored, torch.from_numpy(stored),
            {"raw": stored, "sampling_rate": 16_000}, {"array": stored, "sampling_rate": 16_000, "path": None},
        ]  # fmt: skip
        decoded = SimpleNamespace(data=torch.from_numpy(np.stack([stored, stored])), sample_rate=16_000)
        given.append(SimpleNamespace(get_all_samples=lambda: decoded))
        wanted = fleet.direct("ctc")(stored.copy())
        pipe = fleet.pipe("ctc")
        for one, found in zip(given, pipe(given), strict=True):
            assert_same(found, wanted, type(one).__name__)
        assert_same(pipe(torch.from_numpy(stored)), wanted)
        resampled = pipe({"raw": audio(2.0, "speech", 48_000, seed=3), "sampling_rate": 48_000})
        assert resampled["text"]

    def test_a_long_recording_by_chunks(self, fleet: Tutorial, tmp_path: Path) -> None:
        minute = audio(60.0, "speech", seed=2)
        place = tmp_path / "long.wav"
        soundfile.write(place, np.tile(minute, 10), 16_000, subtype="PCM_16")
        pipe = fleet.pipe("ctc", chunk_length_s=30)
        pipe(minute)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = pipe(str(place), return_timestamps="char")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        end = found["chunks"][-1]["timestamp"][1]
        assert 590 < end <= 600
        assert grown < 512 << 20, f"{grown >> 20} MiB more for ten minutes of sound"


class TestPictures:
    def test_every_way_to_hand_in_a_picture(self, fleet: Tutorial, store: ObjectStore, tmp_path: Path) -> None:
        picture = image(60, 40)
        place = tmp_path / "cat.png"
        picture.save(place)
        store.put("s3://pipefleet/in/cat.png", place.read_bytes())
        pipe, wanted = fleet.pipe("pictures"), fleet.direct("pictures")(picture)
        given = [picture, place, str(place), place.read_bytes(), "s3://pipefleet/in/cat.png"]
        for one, found in zip(given, pipe(given), strict=True):
            assert_same(found, wanted, type(one).__name__)
        assert_same(pipe(images=str(place)), wanted)
        assert_same(pipe(picture, top_k=2), fleet.direct("pictures")(picture, top_k=2))

    def test_feature_maps_of_a_backbone(self, fleet: Tutorial, backbone: Path) -> None:
        picture = image(40, 30)
        processor = hf.AutoImageProcessor.from_pretrained(backbone)
        model = hf.Dinov2Backbone.from_pretrained(backbone, out_indices=(1, 2)).eval()
        with torch.no_grad():
            wanted = model(**processor(picture, return_tensors="pt")).feature_maps
        found = fleet.pipe("backbone")(picture, out_indices=[1, 2])
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)

    def test_questions_about_pictures_in_every_form(self, fleet: Tutorial) -> None:
        mine, theirs = fleet.pipe("vqa"), fleet.direct("vqa")
        picture, asked = image(64, 48), ["What color is it?", "How many?"]
        one = theirs({"image": picture, "question": asked[0]}, top_k=2)
        assert_same(mine(image=picture, question=asked[0], top_k=2), one)
        assert_same(mine(picture, asked[0], top_k=2), one)
        assert_same(mine({"image": picture, "question": asked[0]}, top_k=2), one)
        both = [{"image": picture, "question": each} for each in asked]
        wanted = [theirs(each, top_k=2) for each in both]
        assert_same(mine(both, top_k=2), wanted)
        other = image(48, 64, 2)
        crossed = [theirs({"image": one, "question": each}, top_k=2) for each in asked for one in (picture, other)]
        assert_same(mine(image=[picture, other], question=asked, top_k=2), crossed)
        assert_same(mine(image=picture, question=asked, top_k=2), wanted)
        assert_same(list(mine((each for each in both), top_k=2)), wanted)

    def test_labels_for_each_of_several_pictures(self, fleet: Tutorial) -> None:
        mine, theirs, pictures = fleet.pipe("find"), fleet.direct("find"), [image(60, 40), image(40, 30, 2)]
        for labels in (["a cat", "sky"], [["a cat"], ["a dog", "sky"]]):
            wanted = theirs(pictures, candidate_labels=labels, threshold=0.0)
            assert_same(mine(pictures, candidate_labels=labels, threshold=0.0), wanted)
            assert_same(mine(image=pictures, candidate_labels=labels, threshold=0.0), wanted)
        assert_same(mine(pictures[0], ["a cat"], threshold=0.0), theirs(pictures[0], ["a cat"], threshold=0.0))

    def test_pairs_of_pictures(self, fleet: Tutorial) -> None:
        mine, theirs = fleet.pipe("matches"), fleet.direct("matches")
        pair = [image(60, 40), image(60, 40).rotate(5)]
        assert_same(mine(pair), theirs(pair))
        assert_same(mine([pair]), theirs([pair]))
        assert_same(mine([pair, pair[::-1]]), theirs([pair, pair[::-1]]))

    def test_questions_about_pages_in_every_form(self, fleet: Tutorial) -> None:
        mine, theirs = fleet.pipe("pages"), fleet.direct("pages")
        page, boxes = document(["the", "invoice", "number", "is", "us-001", "of", "march"])
        asked = "What is the invoice number?"
        one = theirs(image=page, question=asked, word_boxes=boxes)
        assert_same(mine(image=page, question=asked, word_boxes=boxes), one)
        assert_same(mine(page, asked, boxes), one)
        assert_same(mine({"image": page, "question": asked, "word_boxes": boxes}), one)
        several = [{"image": page, "question": each, "word_boxes": boxes} for each in (asked, "Who?")]
        assert_same(mine(several), [theirs(**each) for each in several])

    def test_pictures_and_text_side_by_side(self, fleet: Tutorial) -> None:
        mine, theirs, parameters = fleet.pipe("chat"), fleet.direct("chat"), {"max_new_tokens": 4}
        pictures = [image(50, 60, 1), image(70, 30)]
        for given in (
            {"images": pictures[0], "text": "A photo <image> of"},
            {"images": pictures, "text": "<image> or <image>?"},
            {"images": pictures, "text": ["one <image>", "two <image>"]},
            {"text": ["one", "two"]},
        ):
            wanted = theirs(**given, **parameters)
            assert_same(mine(**given, **parameters), wanted)
        several = [{"images": one, "text": f"<image> {index}"} for index, one in enumerate(pictures)]
        assert_same(mine(several, **parameters), [theirs(**one, **parameters) for one in several])
        part = {"type": "image", "image": pictures[0]}
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "Describe this image."}]}]
        answer = mine(text=chat, return_full_text=False, **parameters)
        assert_same(
            answer[0]["generated_text"], theirs(text=chat, return_full_text=False, **parameters)[0]["generated_text"]
        )


class TestRuns:
    def test_a_manifest_of_questions_with_parameters_of_their_own(
        self, fleet: Tutorial, store: ObjectStore, tmp_path: Path
    ) -> None:
        fleet.start("vqa")
        pictures = {f"s3://pipefleet/vqa/{name}.png": image(60, 40, kind) for kind, name in enumerate("ab")}
        for uri, picture in pictures.items():
            store.put(uri, image_bytes(picture))
        rows: list[dict[str, Any]] = [
            {"inputs": {"image": uri, "question": "What is it?"}, "id": f"{index}", "parameters": {"top_k": 1 + index}}
            for index, uri in enumerate(pictures)
        ]
        store.put("s3://pipefleet/vqa/m.jsonl", "\n".join(json.dumps(row) for row in rows).encode())
        run = fleet.client.map("vqa", "s3://pipefleet/vqa/m.jsonl", output="s3://pipefleet/vqa/out/")
        assert run.wait(timeout=WAIT).state == "succeeded", list(run.failures())
        found = list(run.results())
        assert [row["id"] for row in found] == ["0", "1"]
        for row, asked in zip(found, rows, strict=True):
            assert row["input"] == asked["inputs"]
            one = {**asked["inputs"], "image": pictures[asked["inputs"]["image"]]}
            assert_same(row["output"], fleet.direct("vqa")(one, **asked["parameters"]))
        table = tmp_path / "m.csv"
        table.write_text("id,image,question\n" + "".join(f"{uri[-5]},{uri},What is it?\n" for uri in pictures))
        run = fleet.client.map("vqa", str(table), output="s3://pipefleet/vqa/csv/", parameters={"top_k": 1})
        assert run.wait(timeout=WAIT).state == "succeeded"
        assert [(row["id"], len(row["output"])) for row in run.results()] == [("a", 1), ("b", 1)]
        assert_same(next(iter(run.results()))["output"], found[0]["output"])

    def test_masks_come_back_as_pictures_and_lie_beside_the_part(self, fleet: Tutorial, store: ObjectStore) -> None:
        fleet.start("masks")
        picture = image(48, 40)
        store.put("s3://pipefleet/masks/in/a.png", image_bytes(picture))
        run = fleet.client.map("image-segmentation", "s3://pipefleet/masks/in/", output="s3://pipefleet/masks/out/")
        assert run.wait(timeout=WAIT).state == "succeeded", list(run.failures())
        (row,) = run.results()
        wanted = fleet.direct("masks")(picture)
        assert_same(row["output"], wanted)
        assert all(isinstance(one["mask"], Image.Image) and one["mask"].mode == "L" for one in row["output"])
        stored = [entry.key for entry in store.list("s3://pipefleet/masks/out/artifacts/")]
        assert len(stored) == len(wanted)
        assert all(store.get(f"s3://pipefleet/{key}").startswith(b"\x89PNG") for key in stored)

    def test_sound_is_stored_as_wav_and_depth_as_an_array(
        self, fleet: Tutorial, store: ObjectStore, tmp_path: Path
    ) -> None:
        fleet.start("say")
        fleet.start("depth")
        run = fleet.client.map("text-to-speech", ["Hello."], output="s3://pipefleet/say/", parameters={"seed": 1})
        assert run.wait(timeout=WAIT).state == "succeeded", list(run.failures())
        (row,) = run.results()
        (sound,) = store.list("s3://pipefleet/say/artifacts/")
        (tmp_path / "a.wav").write_bytes(store.get(f"s3://pipefleet/{sound.key}"))
        samples, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
        assert rate == row["output"]["sampling_rate"]
        assert np.array_equal(samples, np.squeeze(row["output"]["audio"]))
        picture = image(40, 30)
        store.put("s3://pipefleet/depth/in/a.png", image_bytes(picture))
        run = fleet.client.map("depth-estimation", "s3://pipefleet/depth/in/", output="s3://pipefleet/depth/out/")
        assert run.wait(timeout=WAIT).state == "succeeded", list(run.failures())
        (row,) = run.results()
        assert_same(row["output"], fleet.direct("depth")(picture))
        ends = sorted(Path(entry.key).suffix for entry in store.list("s3://pipefleet/depth/out/artifacts/"))
        assert ends == [".npy", ".png"]


class TestShell:
    def test_an_input_with_several_fields_is_a_json_object(
        self, fleet: Tutorial, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fleet.start("vqa")
        image(64, 48).save(tmp_path / "cat.png")
        asked = json.dumps({"image": str(tmp_path / "cat.png"), "question": "What is it?"})
        assert main(["submit", "vqa", asked, "--param", "top_k=1", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert_same(row["output"], fleet.direct("vqa")({**json.loads(asked), "image": image(64, 48)}, top_k=1))

    def test_chats_are_json_lists_and_other_texts_may_look_like_json(
        self, fleet: Tutorial, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fleet.start("write")
        fleet.start("zero-shot")
        chat = json.dumps([{"role": "user", "content": "Hello"}])
        words = ["--param", "max_new_tokens=3", "--param", "do_sample=false", "--json"]
        assert main(["submit", "text-generation", chat, "[1] Hello", *words]) == 0
        chatted, written = json.loads(capsys.readouterr().out)
        assert chatted["output"][0]["generated_text"][-1]["role"] == "assistant"
        assert written["output"][0]["generated_text"].startswith("[1] Hello")
        labels = 'candidate_labels=["a", "b"]'
        assert main(["submit", "zero-shot-classification", '{"a": 1}', "--param", labels, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["output"]["sequence"] == '{"a": 1}'

    def test_pictures_in_a_result_are_named_by_their_objects(
        self, fleet: Tutorial, store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fleet.start("masks")
        fleet.start("matches")
        image(48, 40).save(tmp_path / "a.png")
        assert main(["submit", "image-segmentation", str(tmp_path / "a.png")]) == 0
        (segment, *_) = json.loads(capsys.readouterr().out)
        assert store.get(segment["mask"]["$artifact"]).startswith(b"\x89PNG")
        pair = json.dumps([str(tmp_path / "a.png"), str(tmp_path / "a.png")])
        assert main(["submit", "keypoint-matching", pair, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["state"] == "succeeded"

    def test_a_manifest_is_mapped(
        self, fleet: Tutorial, store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fleet.start("vqa")
        store.put("s3://pipefleet/shell/a.png", image_bytes(image(40, 40)))
        row = {"inputs": {"image": "s3://pipefleet/shell/a.png", "question": "What?"}, "parameters": {"top_k": 1}}
        manifest = tmp_path / "m.jsonl"
        manifest.write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": "b"}) + "\n")
        assert main(["map", "vqa", str(manifest), "--output", "s3://pipefleet/shell/out/", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["succeeded"] == 2
        manifest.write_text(json.dumps({"inputs": {"question": "What?"}}))
        assert main(["map", "vqa", str(manifest), "--output", "s3://pipefleet/shell/none/", "--json"]) == 1
        summary = json.loads(capsys.readouterr().out)
        assert (summary["succeeded"], summary["failed"]) == (0, 1)
        failure = json.loads(store.get(summary["failures"]))
        assert failure["error"]["code"] == "bad_input"
        assert "image is missing" in failure["error"]["message"]


def test_what_is_no_input_at_all_is_refused_before_anything_is_queued(fleet: Tutorial) -> None:
    with pytest.raises(InputError, match="needs an input"):
        fleet.pipe("classify")()
    with pytest.raises(InputError, match="at most 2"):
        fleet.pipe("ctc")(torch.zeros(5, 4000))
