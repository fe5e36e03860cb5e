"""Checkpoints on disk: each is built once per version of the builders, then copied."""

import contextlib
import filecmp
import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.checkpoints.registry import CHECKPOINTS

SEED = 1234

#: Names the folder that keeps built checkpoints between runs; default: a folder under the temporary one.
CACHE_VARIABLE = "PIPEFLEET_TEST_CACHE"

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def build(key: str, directory: Path) -> Path:
    """Put the checkpoint `key` into `directory`, which must be absent, empty or hold it already; returns it.

    The files come from the cache and are the caller's to change. Safe under several processes, also with
    the same directory: it appears whole or not at all. Raises KeyError for an unknown key and
    FileExistsError when the directory holds other files.
    """
    source = cached(key)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _staging(directory) as staged:
        shutil.copytree(source, staged, dirs_exist_ok=True)
        _publish(staged, directory)
    return directory


def cached(key: str) -> Path:
    """The cached folder of the checkpoint `key`, built if need be: for reading only.

    Safe under several processes: two may build the same checkpoint, the first to finish publishes it.
    Raises KeyError for an unknown key.
    """
    if key not in CHECKPOINTS:
        raise KeyError(f"no checkpoint {key!r}; the keys are {', '.join(CHECKPOINTS)}")
    target = _cache_folder() / key.replace(":", "--")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staging(target) as staged:
            write(key, staged)
            _publish(staged, target)
    return target


def write(key: str, directory: Path) -> None:
    """Build the checkpoint `key` into the existing folder `directory`, without the cache.

    The global random states are set for the build and restored afterwards: not thread-safe.
    """
    with _seeded():
        CHECKPOINTS[key].build(directory)


def _cache_folder() -> Path:
    root = os.environ.get(CACHE_VARIABLE)
    base = Path(root) if root else Path(tempfile.gettempdir()) / f"pipefleet-checkpoints-{os.getuid()}"
    return base / _builders_digest()


@cache
def _builders_digest() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library}=={version(library)}\0".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    # Beside the target, because only a rename inside one file system is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        staged = Path(folder) / "checkpoint"
        staged.mkdir()
        yield staged


def _publish(staged: Path, target: Path) -> None:
    try:
        staged.rename(target)
    except OSError:
        if not same_files(staged, target):
            reason = f"{target} holds other files than the checkpoint; pass an empty folder"
            raise FileExistsError(reason) from None


def same_files(left: Path, right: Path) -> bool:
    """Whether two folders hold the same file names with the same bytes (no subfolders)."""
    if not (left.is_dir() and right.is_dir()):
        return False
    names = sorted(file.name for file in left.iterdir())
    if names != sorted(file.name for file in right.iterdir()):
        return False
    return filecmp.cmpfiles(left, right, names, shallow=False)[0] == names


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
