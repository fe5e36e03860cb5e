"""Models under a prefix of object storage: downloaded once, whole, and never out of the cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipefleet.errors import ObjectChangedError
from pipefleet.storage.store import ListedObject, ObjectStore
from pipefleet_workers.models import cache as model_cache
from pipefleet_workers.models.cache import ModelError, downloaded_model
from pipefleet_workers.models.load import load_pipeline
from tests.checkpoints import cached
from tests.unit.model_folders import TASK, TEXT, pool, refusal

pytestmark = pytest.mark.usefixtures("cache")


def upload(store: ObjectStore, folder: Path, prefix: str) -> None:
    for file in folder.iterdir():
        store.put(f"{prefix}{file.name}", file.read_bytes(), content_type="application/octet-stream")


def test_a_model_under_a_prefix_is_downloaded_once(store: ObjectStore, prefix: str, cache: Path) -> None:
    upload(store, cached(TASK), prefix)
    store.put(f"{prefix}pytorch_model.bin", b"never fetched")
    first = load_pipeline(pool(prefix))
    assert first(TEXT) == load_pipeline(pool(cached(TASK)))(TEXT)
    folder = downloaded_model(prefix)
    inode = (folder / "model.safetensors").stat().st_ino
    assert (downloaded_model(prefix.rstrip("/")) / "model.safetensors").stat().st_ino == inode
    assert not (folder / "pytorch_model.bin").exists()
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == [folder]


def test_a_prefix_that_was_written_again_is_another_version(store: ObjectStore, prefix: str) -> None:
    upload(store, cached(TASK), prefix)
    before = downloaded_model(prefix)
    config = (before / "config.json").read_bytes()
    store.put(f"{prefix}config.json", config.replace(b"POSITIVE", b"positive") + b" ")
    after = downloaded_model(prefix)
    assert after != before
    assert (before / "config.json").read_bytes() == config
    assert (after / "config.json").read_bytes() != config


@pytest.mark.parametrize("damage", ["a byte", "the end", "a file", "the manifest"])
def test_a_damaged_copy_is_never_used(store: ObjectStore, prefix: str, damage: str) -> None:
    upload(store, cached(TASK), prefix)
    folder = downloaded_model(prefix)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    match damage:
        case "a byte":
            weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "the end":
            weights.write_bytes(whole[:-1])
        case "a file":
            weights.unlink()
        case _:
            (folder / ".pipefleet.json").unlink()
    assert downloaded_model(prefix) == folder
    assert weights.read_bytes() == whole


def test_what_an_interrupted_download_left_is_not_used(
    store: ObjectStore, prefix: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(store, cached(TASK), prefix)
    fetch, done = model_cache._fetch, []

    def interrupted(*args: Any) -> str:
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return fetch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(model_cache, "_fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            downloaded_model(prefix)
    left = [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".partial"]
    (left[0] / "surplus.json").write_text("{}")
    folder = downloaded_model(prefix)
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == [folder]
    assert {path.name for path in folder.iterdir()} == {
        *(path.name for path in cached(TASK).iterdir()),
        ".pipefleet.json",
    }


def test_workers_that_start_together_download_once(
    store: ObjectStore, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(store, cached(TASK), prefix)
    fetch, fetched, folders = model_cache._fetch, [], []

    def counted(*args: Any) -> str:
        fetched.append(args)
        return fetch(*args)

    monkeypatch.setattr(model_cache, "_fetch", counted)
    threads = [threading.Thread(target=lambda: folders.append(downloaded_model(prefix))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert len(fetched) == len(list(cached(TASK).iterdir()))


def test_bytes_that_do_not_match_the_listing_are_refused(store: ObjectStore, prefix: str, tmp_path: Path) -> None:
    uri = f"{prefix}config.json"
    store.put(uri, b"{}")
    (entry,) = store.list(prefix)
    assert model_cache._fetch(store, prefix, entry, tmp_path / "whole")
    with pytest.raises(ModelError, match="arrived damaged"):
        model_cache._fetch(store, prefix, replace(entry, size=3), tmp_path / "short")
    with pytest.raises(ObjectChangedError):
        model_cache._fetch(store, prefix, ListedObject(entry.key, 2, 32 * "0"), tmp_path / "other")


def test_prefixes_that_hold_no_model(store: ObjectStore, prefix: str) -> None:
    assert f"no model lies under {prefix}" in refusal(pool(prefix))
    store.put(f"{prefix}config.json", b"{}")
    assert "holds no weights" in refusal(pool(prefix))
    store.put(f"{prefix}pytorch_model.bin", b"x")
    assert "holds weights only as pytorch_model.bin" in refusal(pool(prefix))
    store.put(f"{prefix}model.safetensors", b"x")
    assert "damaged or cut short" in refusal(pool(prefix)) or "config.json" in refusal(pool(prefix))


def test_keys_never_lead_out_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hostile:
        def list(self, prefix: str) -> Iterator[ListedObject]:
            yield ListedObject("models/../../escaped.safetensors", 1, 32 * "0")

    monkeypatch.setattr(model_cache, "ObjectStore", Hostile)
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        downloaded_model("s3://bucket/models/")
