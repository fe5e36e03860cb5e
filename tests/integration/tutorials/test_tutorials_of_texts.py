"""What public tutorials of transformers show with texts, tables and streams, on the fleet and compared with transformers itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import transformers as hf

import pipefleet
from pipefleet.client import Client
from pipefleet.errors import InputError, ParameterError, UnknownModelError
from tests.checkpoints import cached
from tests.integration.tutorials.tutorial import LABELS, TABLE, WAIT, Tutorial
from tests.parity.harness import assert_same
from tests.servers import until


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


def test_what_is_no_input_at_all_is_refused_before_anything_is_queued(fleet: Tutorial) -> None:
    with pytest.raises(InputError, match="needs an input"):
        fleet.pipe("classify")()
    with pytest.raises(InputError, match="at most 2"):
        fleet.pipe("ctc")(torch.zeros(5, 4000))
