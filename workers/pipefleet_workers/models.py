"""Loading a pool's model: from the hub by name and revision, from a folder, or from an `s3://` prefix. Safetensors only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pipefleet.errors import PipefleetError, UsageError
from pipefleet.fleet import Pool
from pipefleet.objects import ObjectStore
from pipefleet.storage import directory_uri


class ModelError(PipefleetError):
    """The model of a pool cannot be loaded; the message says which, why and what to do."""

    code = "bad_model"


def load_pipeline(pool: Pool, *, device: str | None = None) -> Any:
    """The transformers pipeline of a pool, in evaluation mode on its device. Raises ModelError."""
    import torch
    from transformers import pipeline

    from pipefleet_workers.runtime import RUNTIME

    chosen = device or pool.device
    if chosen == "auto":
        chosen = "cuda:0" if torch.cuda.is_available() else "cpu"
    folder = local_model(pool.model)
    dtype = "float32" if chosen == "cpu" and pool.dtype == "auto" else pool.dtype  # half precision is slow on CPUs
    placement = {"device_map": pool.device_map} if pool.device_map else {"device": chosen}
    try:
        pipe = pipeline(
            RUNTIME[pool.task].transformers_task or pool.task,
            model=folder,
            tokenizer=pool.tokenizer,
            revision=pool.revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=pool.trust_remote_code,
            model_kwargs={"use_safetensors": True},
            **placement,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(_explain(pool, error)) from error
    pipe.model.eval()
    return pipe


def local_model(model: str) -> str:
    """A folder for an `s3://` model, downloaded once for each version; any other name as it is."""
    return str(_downloaded(model)) if model.startswith("s3://") else model


def _downloaded(uri: str) -> Path:
    store, prefix = ObjectStore(), directory_uri(uri)
    bucket, root = prefix.removeprefix("s3://").split("/", 1)
    entries = list(store.list(prefix))
    if not entries:
        raise ModelError(f"no model lies under {prefix}; upload the folder that save_pretrained wrote")
    version = hashlib.sha256("".join(f"{one.key}{one.etag}" for one in entries).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pipefleet" / "models" / version
    for entry in entries:
        target = cache / entry.key.removeprefix(root)
        if not target.resolve().is_relative_to(cache.resolve()):
            raise ModelError(f"the key {entry.key!r} under {prefix} leads out of the model's folder")
        if target.exists() and target.stat().st_size == entry.size:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        partial.write_bytes(store.get(f"s3://{bucket}/{entry.key}"))
        partial.replace(target)
    return cache


def _explain(pool: Pool, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    hint = ""
    if "safetensors" in str(error):
        hint = "; convert the weights to safetensors, other formats can run code while they load"
    elif pool.is_hub:
        hint = "; check name and revision, and HF_TOKEN for a gated model"
    return f"pool {pool.name}: cannot load {pool.model!r} for {pool.task}: {lines[0][:300]}{hint}"


def require_folder(pool: Pool) -> None:
    """Raise UsageError when a pool names a folder that is not there."""
    if pool.model.startswith(("/", ".", "~")) and not Path(pool.model).is_dir():
        raise UsageError(f"pool {pool.name}: there is no model folder {pool.model}")
