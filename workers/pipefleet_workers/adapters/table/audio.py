"""Tasks whose input or result is sound."""

from __future__ import annotations

from pipefleet_workers.adapters.audio.classification import AudioClassifier
from pipefleet_workers.adapters.audio.speech import SpeechRecogniser
from pipefleet_workers.adapters.audio.text_to_audio import TextToAudio
from pipefleet_workers.adapters.audio.zero_shot import ZeroShotAudio
from pipefleet_workers.adapters.table.row import SPEECH, WRITING, TaskRuntime

ROWS = {
    "automatic-speech-recognition": TaskRuntime(SpeechRecogniser, SPEECH),
    "audio-classification": TaskRuntime(AudioClassifier, SPEECH),
    "zero-shot-audio-classification": TaskRuntime(
        ZeroShotAudio, SPEECH, example_parameters={"candidate_labels": ["music", "a person speaking"]}
    ),
    "text-to-audio": TaskRuntime(TextToAudio, WRITING),
}
