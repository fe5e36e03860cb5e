"""The audio tasks' own rules: where padding is exact, what is drawn at random, which labels and voices are taken."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipefleet.errors import ParameterError, UsageError
from pipefleet.tasks import TASKS
from pipefleet.tasks.parameters import called_parameters
from pipefleet_workers.adapters.audio import zero_shot
from pipefleet_workers.adapters.audio.classification import AudioClassifier
from pipefleet_workers.adapters.audio.encoding import encode_one_by_one
from pipefleet_workers.adapters.audio.speech import SpeechRecogniser
from pipefleet_workers.adapters.audio.text_to_audio import TextToAudio
from pipefleet_workers.adapters.audio.zero_shot import ZeroShotAudio, content_seed
from pipefleet_workers.items import Audio, Outcome
from pipefleet_workers.models.warmup import example_units, warm_up
from pipefleet_workers.observe.service_fit import ServiceFit
from tests.checkpoints import audio as checkpoints
from tests.checkpoints.media import audio
from tests.checkpoints.parts import amplify, labels, save
from tests.checkpoints.vocabularies import from_vocab_file
from tests.parity.harness import Call, assert_same, load, recording, running
from tests.unit.worker.models.test_models import speech_t5

SPEECH = "automatic-speech-recognition"
CLASSIFY = "audio-classification"
ZERO_SHOT = "zero-shot-audio-classification"
SPEAK = "text-to-audio"


def failure(outcome: Outcome) -> tuple[str, str]:
    assert outcome.failure is not None
    return outcome.failure.code, outcome.failure.message


# --- cost


@pytest.mark.parametrize(("asked", "times"), [({}, 1), ({"num_beams": 1}, 1), ({"num_beams": 20}, 4)])
def test_more_beams_than_usual_take_more_of_a_batch(asked: dict[str, Any], times: int) -> None:
    adapter = SpeechRecogniser(load(f"{SPEECH}:whisper"))
    (usual,) = example_units(adapter, TASKS[SPEECH], {}, 20)
    (unit,) = example_units(adapter, TASKS[SPEECH], asked, 20)
    assert usual.fixed == unit.fixed
    assert unit.length == usual.length * times
    assert unit.features["sounding"] == usual.length


def test_on_a_cpu_recordings_go_through_the_encoder_one_by_one() -> None:
    model = copy.deepcopy(load(f"{SPEECH}:whisper").model)
    sounds = torch.randn(3, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    encoder = type(model.get_encoder()).forward.__get__(model.get_encoder())
    together = encoder(sounds, output_hidden_states=True)
    seen: list[int] = []
    model.get_encoder().conv1.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    encode_one_by_one(model)
    apart = model.get_encoder()(sounds, output_hidden_states=True)
    assert seen == [1, 1, 1]
    torch.testing.assert_close(apart.last_hidden_state, together.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert len(apart.hidden_states) == len(together.hidden_states)
    for mine, other in zip(apart.hidden_states, together.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# --- padding


def test_padding_is_proven_for_layer_normalisation() -> None:
    adapter = SpeechRecogniser(load(f"{SPEECH}:ctc-masked"))
    found = warm_up(adapter, TASKS[SPEECH], {}, ServiceFit(), 1000)
    assert found.pads, found.describe()
    assert 0 < found.difference <= found.tolerance


def test_a_model_that_normalises_over_time_is_never_padded() -> None:
    adapter = SpeechRecogniser(load(SPEECH))
    assert not adapter.pads, "known from its config, also without a warm-up"
    adapter.pads = True
    found = warm_up(adapter, TASKS[SPEECH], {}, ServiceFit(), 1000)
    assert not found.pads
    assert found.difference > 100 * found.tolerance


def test_a_model_whose_frames_are_counted_wrongly_is_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = SpeechRecogniser(load(f"{SPEECH}:ctc-masked"))
    count = adapter.pipe.model._get_feat_extract_output_lengths
    monkeypatch.setattr(adapter.pipe.model, "_get_feat_extract_output_lengths", lambda samples: count(samples) - 1)
    assert not warm_up(adapter, TASKS[SPEECH], {}, ServiceFit(), 1000).pads


def test_the_moments_of_words_are_proven_or_recordings_that_ask_for_them_run_alone() -> None:
    adapter = recording(SpeechRecogniser, load(f"{SPEECH}:whisper"))
    found = warm_up(adapter, TASKS[SPEECH], {}, ServiceFit(), 1000)
    assert found.moments <= found.tolerance
    assert adapter.times_together
    del adapter.pipe.model._extract_token_timestamps  # that of transformers itself is in use again
    found = warm_up(adapter, TASKS[SPEECH], {}, ServiceFit(), 1000)
    assert found.moments > found.tolerance
    assert "word timestamps alone" in found.describe()
    words = {"return_timestamps": "word", "generate_kwargs": {"num_beams": 1, "max_new_tokens": 5}}
    with running(adapter, SPEECH) as engine:
        engine.run_together([Call(audio(1.0, seed=seed), words) for seed in (1, 2)])
    assert {len(batch.units) for batch in adapter.batches} == {1}


def test_no_more_of_the_attention_is_held_than_times_the_words() -> None:
    adapter = recording(SpeechRecogniser, load(f"{SPEECH}:whisper"))
    model, held = adapter.pipe.model, list[int]()
    positions = model.config.max_source_positions

    def weigh(*_: Any) -> None:
        tensors = (one for one in gc.get_objects() if type(one) is torch.Tensor and one.dim() == 4)
        held.append(sum(one.numel() for one in tensors if one.shape[-1] == positions))

    model.register_forward_hook(weigh)
    words = {"return_timestamps": "word", "generate_kwargs": {"num_beams": 1, "max_new_tokens": 4}}
    sound = audio(31.0)
    with running(adapter, SPEECH) as engine:
        (outcome,) = engine.run([Call(sound, words)])
    prompt, heads = 4, len(model.generation_config.alignment_heads)
    assert 0 < max(held) <= (prompt + 4) * heads * positions, "that of one half minute, of these heads"
    assert_same(outcome.output, load(f"{SPEECH}:whisper")(sound, **copy.deepcopy(words)))


MODEL_CARD = {
    "max_new_tokens": 6,
    "num_beams": 1,
    "condition_on_prev_tokens": False,
    "compression_ratio_threshold": 1.35,
    "temperature": (0.0, 0.2),
    "logprob_threshold": -100.0,
    "no_speech_threshold": 0.6,
    "return_timestamps": True,
    "forced_decoder_ids": None,
}
"""As the card of whisper-large-v3 writes it, with one of the older arguments."""


@pytest.mark.parametrize("given", [MODEL_CARD, {"max_new_tokens": 6, "return_timestamps": "word"}])
@pytest.mark.parametrize("beside", [{}, {"return_timestamps": False}, {"return_timestamps": True}])
def test_timestamps_are_also_asked_for_inside_generate_kwargs(given: dict[str, Any], beside: dict[str, Any]) -> None:
    pipe, sound = load(f"{SPEECH}:whisper"), audio(1.0, "speech")
    asked = {"generate_kwargs": given, **beside}
    wanted = pipe(sound.copy(), **copy.deepcopy(asked))
    called = called_parameters(TASKS[SPEECH], {**asked, "seed": 0})
    with running(recording(SpeechRecogniser, pipe), SPEECH) as engine:
        (outcome,) = engine.run([Call(sound, called)])
    assert outcome.failure is None, outcome.failure
    assert_same(outcome.output, wanted)


def test_what_generate_kwargs_may_not_hold_is_said_with_its_reason() -> None:
    with pytest.raises(
        ParameterError, match="may not hold 'forced_decoder_ids': it is an older way to say the language"
    ):
        TASKS[SPEECH].check({"generate_kwargs": {"forced_decoder_ids": [[1, 2]]}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"language": "xx"}, "Unsupported language: xx"),
        ({"language": "spanish"}, "<|es|> is not supported by this specific model"),
        ({"max_new_tokens": 600}, "max_new_tokens"),
        ({"prompt_ids": [5], "prompt_condition_type": "all-segments"}, "condition_on_prev_tokens=True"),
    ],
)
def test_a_parameter_that_the_model_refuses_is_the_callers_mistake(given: dict[str, Any], words: str) -> None:
    calls = [Call(audio(1.0, seed=seed), {"generate_kwargs": {"max_new_tokens": 6, **given}}) for seed in (1, 2)]
    with running(recording(SpeechRecogniser, load(f"{SPEECH}:whisper")), SPEECH) as engine:
        outcomes = engine.run_together(calls)
    for outcome in outcomes:
        assert failure(outcome)[0] == "bad_parameter"
        assert "the model refuses the parameters: " in failure(outcome)[1]
        assert words in failure(outcome)[1]


@pytest.fixture
def moonshine(tmp_path: Path) -> Any:
    """A model that is neither Whisper nor CTC: it writes with generate() itself."""
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    sizes = {
        f"{half}_{name}": 1 for half in ("encoder", "decoder") for name in ("num_hidden_layers", "num_attention_heads")
    }
    config = transformers.MoonshineConfig(
        vocab_size=len(letters), hidden_size=16, intermediate_size=32, pad_token_id=0, **sizes
    )
    torch.manual_seed(1)
    tokenizer = from_vocab_file(transformers.Wav2Vec2CTCTokenizer, {one: place for place, one in enumerate(letters)})
    model = transformers.MoonshineForConditionalGeneration(config)
    save(tmp_path, model, tokenizer, checkpoints._waveforms(masked=True))
    return transformers.pipeline(SPEECH, model=str(tmp_path), device="cpu")


def test_a_seed_is_what_torch_is_seeded_with_before_a_call_of_any_model_that_draws(moonshine: Any) -> None:
    sound, how = audio(1.0, "speech"), {"do_sample": True, "num_beams": 1, "max_new_tokens": 12}
    wanted = []
    for seed in (3, 4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wanted.append(moonshine(sound.copy(), **how))
    assert wanted[0] != wanted[1]
    adapter = recording(SpeechRecogniser, moonshine)
    with running(adapter, SPEECH) as engine:
        drawn = engine.run_together([Call(sound, {**how, "seed": seed}) for seed in (3, 4, 3)])
        assert {len(batch.units) for batch in adapter.batches} == {1}
        engine.run_together([Call(sound, {**how, "do_sample": False}) for _ in range(3)])
    assert [one.output for one in drawn] == [wanted[0], wanted[1], wanted[0]]
    assert len(adapter.batches[-1].units) == 3, "what draws nothing shares a batch"


def test_a_seed_is_refused_by_a_model_that_draws_nothing() -> None:
    with running(recording(SpeechRecogniser, load(SPEECH)), SPEECH) as engine:
        (outcome,) = engine.run([Call(audio(1.0), {"seed": 1})])
    assert failure(outcome) == ("bad_parameter", "this model draws nothing at random; leave out seed")


@pytest.fixture
def masked_classifier(tmp_path: Path) -> Any:
    """Like wav2vec2-large with a head: layer norm, and a mask from the extractor."""
    norm = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    config = transformers.Wav2Vec2Config(vocab_size=32, **checkpoints._WAV2VEC2, **norm, **labels("yes", "no", "up"))
    torch.manual_seed(1)
    model = amplify(transformers.Wav2Vec2ForSequenceClassification(config), "classifier", 5.0)
    save(tmp_path, model, checkpoints._waveforms(masked=True))
    pipe = transformers.pipeline(CLASSIFY, model=str(tmp_path), device="cpu")
    pipe.model.eval()
    return pipe


def test_a_classifier_with_a_mask_takes_recordings_of_all_lengths_together(masked_classifier: Any) -> None:
    adapter = recording(AudioClassifier, masked_classifier)
    assert warm_up(adapter, TASKS[CLASSIFY], {}, ServiceFit(), 1000).pads
    calls = [Call(audio(seconds, "speech", seed=index)) for index, seconds in enumerate((0.4, 3.1, 1.7, 2.2))]
    wanted = [masked_classifier(call.inputs.copy()) for call in calls]
    adapter.batches.clear()
    with running(adapter, CLASSIFY) as engine:
        found = engine.run_together(calls)
    for one, result in zip(found, wanted, strict=True):
        assert_same(one.output, result)
    assert max(len(batch.units) for batch in adapter.batches) == 4


# --- zero-shot


@pytest.fixture(scope="module")
def clap() -> Any:
    return load(ZERO_SHOT)


def test_the_part_of_a_long_recording_that_is_heard_follows_from_its_content(clap: Any) -> None:
    sound = audio(14.0, "speech", 48_000, seed=2)
    call = Call(sound, {"candidate_labels": ["rain", "a dog", "speech"]})
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    with running(recording(ZeroShotAudio, clap), ZERO_SHOT) as engine:
        first = [outcome.output for outcome in engine.run([call] * 3)]
    with running(recording(ZeroShotAudio, clap), ZERO_SHOT) as engine:
        again = engine.run([call])[0].output
    for one in first:
        assert_same(one, again)
    assert np.array_equal(np.random.get_state()[1], before), "everybody else's numbers are left alone"
    heard = {tuple(clap(sound, candidate_labels=["rain", "a dog"])[0].items()) for _ in range(6)}
    assert len(heard) > 1, "else the test shows nothing: the pipeline itself chooses anew at every call"
    assert content_seed(sound) != content_seed(sound[:-1])


def test_labels_come_as_a_list_or_as_one_text(clap: Any) -> None:
    sound = audio(1.0, "chirp", 48_000)
    forms = [["rain", "a dog"], "rain, a dog", " rain,a dog ,"]
    with running(recording(ZeroShotAudio, clap), ZERO_SHOT) as engine:
        outcomes = engine.run([Call(sound, {"candidate_labels": form}) for form in forms])
        for outcome in outcomes:
            assert_same(outcome.output, outcomes[0].output)
        bad = [{}, {"candidate_labels": []}, {"candidate_labels": " , "}]
        for outcome in engine.run([Call(sound, parameters) for parameters in bad]):
            code, message = failure(outcome)
            assert (code, "candidate_labels is missing or empty" in message) == ("bad_parameter", True)
        code, message = failure(engine.run([Call(sound, {"candidate_labels": ["rain " * 600]})])[0])
    assert (code, "the model takes" in message) == ("too_long", True)


def test_texts_are_embedded_once_and_not_kept_for_ever(clap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "KEPT_TEXTS", 4)
    monkeypatch.setattr(zero_shot, "TEXTS_AT_ONCE", 3)
    adapter = ZeroShotAudio(clap)
    embedded: list[int] = []
    embed = adapter._embed
    monkeypatch.setattr(adapter, "_embed", lambda texts: (embedded.append(len(texts)), embed(texts))[1])
    texts = [(0, 5, 2), (0, 5, 6, 2), (0, 7, 2), (0, 8, 9, 10, 2), (0, 11, 2)]
    with torch.inference_mode():
        first = adapter._embedded(set(texts))
        again = adapter._embedded(set(texts[:1] + texts[-1:]))
    assert sum(embedded) >= 5
    assert max(embedded) == 3
    assert len(adapter._known) == 4
    assert all(torch.allclose(again[one], first[one], atol=1e-6) for one in again)


def test_a_model_without_two_towers_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a model that compares sounds with texts, not BertModel"):
        ZeroShotAudio(load("feature-extraction"))


# --- text to audio


def test_what_is_drawn_follows_from_the_request_alone() -> None:
    calls = [Call("Good evening."), Call("Good evening."), Call("Good evening.", {"seed": 4})]
    with running(recording(TextToAudio, load(SPEAK)), SPEAK) as engine:
        first, again = engine.run(calls), engine.run(calls)
    sounds = [outcome.output["audio"].samples for outcome in first]
    for one, other in zip(first, again, strict=True):
        assert_same(one.output, other.output)
    assert all(sounds[0].shape != one.shape or not np.array_equal(sounds[0], one) for one in sounds[1:])


def test_neighbours_draw_their_own_numbers() -> None:
    """The same request beside two different neighbours, in one call of MusicGen each."""
    pipe = load(f"{SPEAK}:musicgen")
    asked = {"generate_kwargs": {"max_new_tokens": 12}}
    mine = Call("A slow piano.", {**asked, "seed": 9})
    others = [Call("drums", {**asked, "seed": seed}) for seed in (9, 10)]
    found = []
    for other in others:
        adapter = recording(TextToAudio, pipe)
        with running(adapter, SPEAK) as engine:
            found.append([outcome.output["audio"].samples for outcome in engine.run_together([mine, other])])
        assert max(len(batch.units) for batch in adapter.batches) == 2
    assert np.allclose(found[0][0], found[1][0], atol=1e-5)
    assert not np.allclose(found[0][1], found[1][1], atol=1e-3)
    assert isinstance(found[0][0], np.ndarray)


def test_a_voice_travels_as_a_list_of_numbers(tmp_path: Path) -> None:
    torch.manual_seed(2)
    pipe = transformers.pipeline(SPEAK, model=str(speech_t5(tmp_path)), vocoder=_vocoder(), device="cpu")
    pipe.model.eval()
    voices = [[0.5] * 16, [[-0.5] * 16]]
    calls = [
        Call("yes", {"seed": 1, "forward_params": {"speaker_embeddings": one, "maxlenratio": 3.0}}) for one in voices
    ]
    for call in calls:
        TASKS[SPEAK].check(call.parameters)
    with running(recording(TextToAudio, pipe), SPEAK) as engine:
        found = engine.run_together(calls)
    for call, outcome in zip(calls, found, strict=True):
        torch.manual_seed(1)
        asked = copy.deepcopy(call.parameters["forward_params"])
        asked["speaker_embeddings"] = torch.tensor(asked["speaker_embeddings"]).reshape(1, 16)
        assert outcome.failure is None, outcome.failure
        assert_same(outcome.output, pipe(call.inputs, forward_params=asked))
    assert isinstance(found[0].output["audio"], Audio)


def _vocoder() -> Any:
    sizes = {"upsample_initial_channel": 16, "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8]}
    small = {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]], "model_in_dim": 80}
    return transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**sizes, **small)).eval()


def test_a_model_that_does_not_write_step_by_step_says_so() -> None:
    with running(recording(TextToAudio, load(SPEAK)), SPEAK) as engine:
        bad, good = engine.run([Call("yes", {"generate_kwargs": {"do_sample": False}}), Call("yes", {"seed": 1})])
    assert failure(bad)[0] == "bad_parameter"
    assert "pass forward_params instead of generate_kwargs" in failure(bad)[1]
    assert good.failure is None


def test_a_long_piece_ends_with_its_job_and_shows_signs_of_life() -> None:
    adapter = recording(TextToAudio, load(f"{SPEAK}:musicgen"))
    ticks: list[int] = []
    with running(adapter, SPEAK) as engine:
        jobs: list[Any] = []

        def counted() -> None:
            ticks.append(1)
            if len(ticks) == 5:
                jobs[0].cancelled = True

        adapter.on_tick = counted
        adapter.gate.clear()
        job, sink = engine.submit([Call("wind", {"generate_kwargs": {"max_new_tokens": 200}})])
        jobs.append(job)
        adapter.gate.set()
        sink.wait(60)
        (outcome,) = sink.in_order()
    assert failure(outcome)[0] == "cancelled"
    assert len(ticks) == 5


# --- parameters


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        (CLASSIFY, {"top_k": None, "function_to_apply": "softmax"}),
        (ZERO_SHOT, {"candidate_labels": ["a"], "hypothesis_template": "a sound of {} there"}),
        (SPEAK, {"seed": -3, "forward_params": {"speaker_id": 4, "speaking_rate": 1.2}}),
        (SPEAK, {"generate_kwargs": {"do_sample": True, "temperature": 0.7, "guidance_scale": 3, "top_k": 250}}),
    ],
)
def test_what_people_know_is_taken(task: str, parameters: dict[str, Any]) -> None:
    TASKS[task].check(parameters)


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        (CLASSIFY, {"function_to_apply": "default"}),
        (ZERO_SHOT, {"hypothesis_template": "no place"}),
        (ZERO_SHOT, {"hypothesis_template": "{} and {}"}),
        (ZERO_SHOT, {"hypothesis_template": "{0}"}),
        (SPEAK, {"forward_params": {"speaker_embeddings": "voice.npz"}}),
        (SPEAK, {"forward_params": {"voice_preset": "v2/en_speaker_6"}}),
        (SPEAK, {"generate_kwargs": {"speaker_embeddings": [1.0]}}),
        (SPEAK, {"preprocess_params": {"max_length": 3}}),
        (SPEAK, {"seed": 1.5}),
    ],
)
def test_what_is_out_of_bounds_is_refused(task: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        TASKS[task].check(parameters)
