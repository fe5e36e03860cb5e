"""Whisper in several lanes: the answers of one lane, whatever runs at the same time in the other."""

from __future__ import annotations

import threading

import torch

from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.audio.speech import SpeechRecogniser
from pipefleet_workers.adapters.writing.leaving import LeavingRows
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.models.lanes import choose_lanes, lanes_of
from pipefleet_workers.models.warmup import example_units
from tests.checkpoints.media import audio
from tests.parity.harness import Call, assert_same, load, recording, running

SPEECH = "automatic-speech-recognition"
ASKED = (
    {"generate_kwargs": {"max_new_tokens": 12}},
    {"return_timestamps": True, "generate_kwargs": {"max_new_tokens": 12}},
    {"return_timestamps": "word", "generate_kwargs": {"max_new_tokens": 12}},
    {"generate_kwargs": {"do_sample": True, "max_new_tokens": 12}, "seed": 5},
    {"generate_kwargs": {"temperature": [0.0, 0.6], "logprob_threshold": 0.0, "max_new_tokens": 12}, "seed": 6},
)
"""Plain answers may share the device. Timed words switch the attention of the whole model, and draws take torch's own numbers."""


def test_every_kind_of_call_gets_the_answer_of_one_lane() -> None:
    sounds = [audio(seconds, "speech") for seconds in (0.4, 1.0, 2.3, 5.1)]
    calls = [Call(sound, asked) for sound in sounds for asked in ASKED]
    with running(recording(SpeechRecogniser, load(f"{SPEECH}:whisper")), SPEECH) as one:
        wanted = one.run(calls)
    assert not [outcome.failure for outcome in wanted if outcome.failure]
    adapter = recording(SpeechRecogniser, load(f"{SPEECH}:whisper"))
    lanes, limits = lanes_of(torch.device("cpu"), 2), BatchLimits(max_cost=1 << 40, max_items=2, max_age=60.0)
    with running(adapter, SPEECH, limits=limits, lanes=lanes) as two:
        for _ in range(2):
            for mine, other in zip(two.run(calls), wanted, strict=True):
                assert mine.failure is None
                assert_same(mine.output, other.output)


def test_the_proof_of_lanes_compares_what_whisper_writes() -> None:
    adapter = SpeechRecogniser(load(f"{SPEECH}:whisper"))
    examples = [unit for size in (5, 23) for unit in example_units(adapter, task_spec(SPEECH), {}, size)]
    assert choose_lanes(adapter, examples, examples[:1], asked=2, tolerance=1e-4).count == 2

    step = adapter.pipe.model.forward
    calls = iter(range(1 << 30))

    def drifting(*arguments: object, **named: object) -> object:
        output = step(*arguments, **named)
        output.logits = output.logits + float(next(calls))
        return output

    adapter.pipe.model.forward = drifting
    assert choose_lanes(adapter, examples, examples[:1], asked=2, tolerance=1e-4).count == 1


def test_rows_that_leave_in_one_thread_do_not_disturb_the_forward_of_another() -> None:
    model = load(f"{SPEECH}:whisper").model
    ended, errors = threading.Event(), list[Exception]()

    def enter_and_leave() -> None:
        while not ended.is_set():
            with LeavingRows(model, [0]):
                pass

    def forward() -> None:
        sound = torch.zeros(1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        try:
            with torch.inference_mode():
                for _ in range(100):
                    model(input_features=sound, decoder_input_ids=torch.ones(1, 1, dtype=torch.long))
        except Exception as error:  # noqa: BLE001 - shown below
            errors.append(error)
        finally:
            ended.set()

    threads = [threading.Thread(target=target) for target in (enter_and_leave, forward)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert ended.is_set()
    assert not errors
