"""The doctor's checks of this machine: the libraries that decode pictures and sound, and the device.

`report` runs the checks that `checks_of_machine` lists. Each check returns a sentence.
A missing library or picture format raises an error, which fails the check. Without torch no worker can run
here: then a single check says so, and no other check runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from pipefleet.errors import PipefleetError
from pipefleet.installed import is_installed
from pipefleet.settings import Settings


def checks_of_machine() -> list[tuple[str, Callable[[Settings], str]]]:
    """Name and function of each check; without torch, a single check that says so."""
    if not is_installed("torch"):
        return [("this machine", _no_torch)]
    return [("images", check_images), ("audio", check_audio), ("device", check_device)]


def _no_torch(settings: Settings) -> str:
    return "torch is not installed, so no worker can run here; for one: pip install 'pipefleet[workers]'"


def check_images(settings: Settings) -> str:
    """The version and the formats of Pillow. Raises PipefleetError if a format is missing."""
    from PIL import features

    missing = [name for name in ("jpg", "zlib", "webp") if not features.check(name)]
    if missing:
        raise PipefleetError(f"Pillow lacks {', '.join(missing)}; install its binary wheel")
    return f"Pillow {importlib.import_module('PIL').__version__} with JPEG, PNG and WebP"


def check_audio(settings: Settings) -> str:
    """The versions of the libraries that decode sound. Raises ImportError if one is missing."""
    soundfile, av = importlib.import_module("soundfile"), importlib.import_module("av")
    return f"libsndfile {soundfile.__libsndfile_version__}, FFmpeg through PyAV {av.__version__}"


def check_device(settings: Settings) -> str:
    """The GPUs, or the threads of the CPU."""
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return f"torch {torch.__version__}, {torch.cuda.device_count()} x {', '.join(sorted(names))}"
    return f"torch {torch.__version__}, no GPU: models run on {torch.get_num_threads()} CPU threads"
