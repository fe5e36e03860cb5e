"""The tiny checkpoints as people save theirs for GPUs: in float16 or bfloat16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import cached


def in_dtype(key: str, dtype: str, folder: Path) -> Path:
    """A copy of a checkpoint in `folder`, its weights and its config in `dtype`."""
    shutil.copytree(cached(key), folder)
    for file in folder.rglob("*.safetensors"):
        wanted = getattr(torch, dtype)
        weights = {name: one.to(wanted) if one.is_floating_point() else one for name, one in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    for file in folder.rglob("config.json"):
        file.write_text(json.dumps(_renamed(json.loads(file.read_text()), dtype)))
    return folder


def _renamed(value: Any, dtype: str) -> Any:
    if isinstance(value, dict):
        return {name: dtype if name == "dtype" and one else _renamed(one, dtype) for name, one in value.items()}
    return [_renamed(one, dtype) for one in value] if isinstance(value, list) else value
