"""Tasks whose input or result is sound."""

from __future__ import annotations

from pipefleet_workers.adapters.speech import SpeechRecogniser
from pipefleet_workers.runtime.row import SPEECH, TaskRuntime

ROWS = {
    "automatic-speech-recognition": TaskRuntime(SpeechRecogniser, SPEECH),
}
