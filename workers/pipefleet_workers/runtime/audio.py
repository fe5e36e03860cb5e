"""Tasks whose input or result is sound."""

from __future__ import annotations

from pipefleet_workers.adapters.audio_classification import AudioClassifier
from pipefleet_workers.adapters.speech import SpeechRecogniser
from pipefleet_workers.adapters.text_to_audio import TextToAudio
from pipefleet_workers.adapters.zero_shot_audio import ZeroShotAudio
from pipefleet_workers.runtime.row import SPEECH, WRITING, TaskRuntime

ROWS = {
    "automatic-speech-recognition": TaskRuntime(SpeechRecogniser, SPEECH),
    "audio-classification": TaskRuntime(AudioClassifier, SPEECH),
    "zero-shot-audio-classification": TaskRuntime(
        ZeroShotAudio, SPEECH, example_parameters={"candidate_labels": ["music", "a person speaking"]}
    ),
    "text-to-audio": TaskRuntime(TextToAudio, WRITING),
}
