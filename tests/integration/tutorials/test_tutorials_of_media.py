"""What the public tutorials show with recordings and pictures, called on the fleet and compared with transformers itself."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers as hf

from pipefleet.storage.store import ObjectStore
from tests.checkpoints.media import audio, document, image, sound_bytes
from tests.integration.tutorials.tutorial import SHORT, Tutorial
from tests.parity.harness import assert_same


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
