"""The tasks of the public tutorials as bulk runs and from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from pipefleet.cli import main
from pipefleet.storage.store import ObjectStore
from tests.checkpoints.media import image, image_bytes
from tests.integration.tutorials.tutorial import WAIT, Tutorial
from tests.parity.harness import assert_same


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
