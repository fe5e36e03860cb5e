"""Models under an `s3://` prefix: each version is downloaded once, and verified whenever it is used.

    listing (names, sizes, ETags) = the version ─▶ lock ─▶ <version>.partial, file by file ─▶ verify ─▶ one rename ─▶ <version>

A prefix that was written again is another version. Files of an interrupted download are never used. `load` calls it; a model that
is not there or not safe raises ModelError.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

from pipefleet.contract.references import directory_uri
from pipefleet.errors import PipefleetError
from pipefleet.storage.store import ListedObject, ObjectStore, s3_errors

log = logging.getLogger(__name__)
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".ot")
"""Formats of weights that are never loaded: most of them can run code while they load."""
_UNUSED = (*UNSAFE, ".onnx", ".tflite", ".gguf", ".mlmodel")
_ADAPTER = "adapter_model"
_MANIFEST = ".pipefleet.json"
_AT_ONCE = 4
"""Files that are downloaded or verified at once, such as the shards of a large model."""
_PIECE = 4 << 20


class ModelError(PipefleetError):
    """The model of a pool cannot be loaded; the message names the model, the reason and the remedy."""

    code = "bad_model"


def cache_folder() -> Path:
    """The folder of models and of their offloaded weights: `pipefleet` under XDG_CACHE_HOME, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pipefleet"


def downloaded_model(uri: str) -> Path:
    """The folder with the present version of the model under `uri`, complete and verified.

    Takes constant memory. Safe in several processes: the second waits for the download of the first. Raises ModelError, and the
    errors of the object store.
    """
    store, prefix = ObjectStore(), directory_uri(uri)
    files = _files(store, prefix)
    version = hashlib.sha256(json.dumps([(n, f.etag, f.size) for n, f in files.items()]).encode()).hexdigest()[:24]
    folder = cache_folder() / "models" / version
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not _is_whole(folder, files):
            shutil.rmtree(folder, ignore_errors=True)
            _download(store, prefix, files, folder)
    return folder


def _files(store: ObjectStore, prefix: str) -> dict[str, ListedObject]:
    """The files of a model by their path below `prefix`."""
    root = prefix.removeprefix("s3://").split("/", 1)[1]
    listed = {one.key.removeprefix(root): one for one in store.list(prefix) if not one.key.endswith("/")}
    if not listed:
        raise ModelError(f"no model lies under {prefix}; upload the folder that save_pretrained wrote")
    for name in listed:
        if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
            raise ModelError(f"the key {name!r} under {prefix} leads out of the model's folder")
    require_safetensors(prefix, listed)
    return {name: one for name, one in sorted(listed.items()) if not name.endswith(_UNUSED)}


def require_safetensors(where: str, names: Sequence[str] | Mapping[str, object]) -> None:
    """Raise ModelError unless one of the files `names` holds weights as safetensors."""
    safe = [name for name in names if name.endswith(".safetensors")]
    if safe and all(name.rpartition("/")[2].startswith(_ADAPTER) for name in safe):
        raise ModelError(
            f"{where} holds an adapter (LoRA) and no model; merge the two where you trained it (merge_and_unload), and name the "
            "folder that save_pretrained wrote then"
        )
    if safe:
        return
    unsafe = next((name for name in names if name.endswith(UNSAFE)), None)
    if unsafe is None:
        raise ModelError(f"{where} holds no weights; name the folder that save_pretrained wrote")
    raise ModelError(
        f"{where} holds weights only as {unsafe}, a form that can run code while it loads; convert them to safetensors "
        "(load and save_pretrained them where you trust them)"
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the kernel's lock on `path`; the kernel frees it when this process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(folder: Path, files: Mapping[str, ListedObject]) -> bool:
    """Whether a folder holds every file, with the size and the bytes of the download."""
    try:
        digests = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    sizes = all((folder / name).is_file() and (folder / name).stat().st_size == one.size for name, one in files.items())
    if not sizes or set(digests) != set(files):
        log.warning("the cached model %s is incomplete; downloading it again", folder)
        return False
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        found = dict(zip(files, threads.map(lambda name: _digest(folder / name), files), strict=True))
    if found != digests:
        log.warning("the cached model %s is damaged; downloading it again", folder)
    return bool(found == digests)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _download(store: ObjectStore, prefix: str, files: Mapping[str, ListedObject], folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was ended; this process has the lock
    partial.mkdir()
    total, free = sum(one.size for one in files.values()), shutil.disk_usage(partial).free
    if total > free:
        raise ModelError(
            f"{prefix} has {total} bytes and {partial.parent} room for {free}; set XDG_CACHE_HOME elsewhere"
        )
    log.info("downloading %s: %d files, %d bytes", prefix, len(files), total)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        digests = list(threads.map(lambda name: _fetch(store, prefix, files[name], partial / name), files))
    (partial / _MANIFEST).write_text(json.dumps(dict(zip(files, digests, strict=True))))
    partial.replace(folder)


def _fetch(store: ObjectStore, prefix: str, entry: ListedObject, target: Path) -> str:
    """Write the listed version of one object to `target`. Returns the digest of its bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    bucket = prefix.removeprefix("s3://").split("/", 1)[0]
    uri = f"s3://{bucket}/{entry.key}"
    digest, checksum = hashlib.blake2b(), hashlib.md5(usedforsecurity=False)
    with s3_errors(uri), target.open("wb") as file:
        found = store.client.get_object(Bucket=bucket, Key=entry.key, IfMatch=f'"{entry.etag}"')
        with closing(found["Body"]) as body:
            for piece in body.iter_chunks(_PIECE):
                file.write(piece)
                digest.update(piece)
                checksum.update(piece)
    size = target.stat().st_size
    # The ETag of a multipart upload, or of an encrypted object, is no digest of the bytes.
    plain = len(entry.etag) == 32 and found.get("ServerSideEncryption") in (None, "AES256")
    if size != entry.size or (plain and checksum.hexdigest() != entry.etag):
        raise ModelError(f"{uri} arrived damaged ({size} of {entry.size} bytes); start the worker again")
    return digest.hexdigest()
