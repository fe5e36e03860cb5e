"""Fixtures of the tutorials: the fleet, models whose parts lie apart, and the bucket."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf

from pipefleet.client import Client
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.stack import Stack
from tests.checkpoints import cached
from tests.integration.tutorials.tutorial import SERVED, Tutorial


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorials")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Path:
    """A model that AutoBackbone can read, with its image processor."""
    config = hf.Dinov2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        hf.AutoModel.from_config(config).eval().save_pretrained(folder / "dinov2")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "dinov2")
    return folder / "dinov2"


@pytest.fixture(scope="module")
def apart(folder: Path) -> tuple[Path, Path]:
    """A classifier without its tokenizer, and the tokenizer in a folder of its own."""
    model, tokenizer = folder / "model", folder / "tokenizer"
    shutil.copytree(cached("text-classification"), model)
    tokenizer.mkdir()
    for path in [*model.glob("*token*"), *model.glob("vocab*"), *model.glob("merges*")]:
        path.rename(tokenizer / path.name)
    return model, tokenizer


@pytest.fixture(scope="module")
def stack(folder: Path, backbone: Path, apart: tuple[Path, Path]) -> Iterator[Stack]:
    tables = [
        f'[pools.{pool}]\ntask = "{checkpoint.partition(":")[0]}"\nmodel = "{cached(checkpoint)}"\n'
        + ("default = true\n" if pool in ("classify", "speech") else "")
        for pool, checkpoint in SERVED.items()
    ]
    model, tokenizer = apart
    tables.append(f'[pools.apart]\ntask = "text-classification"\nmodel = "{model}"\ntokenizer = "{tokenizer}"\n')
    tables.append(f'[pools.backbone]\ntask = "image-feature-extraction"\nmodel = "{backbone}"\n')
    fleet = folder / "fleet.toml"
    fleet.write_text("\n".join(tables))
    with Stack(folder / "data", fleet=fleet, pools=(), flower=False) as one, in_environment(one.environment()):
        yield one


@pytest.fixture(scope="module")
def fleet(stack: Stack) -> Iterator[Tutorial]:
    with Client() as client:
        one = Tutorial(client)
        yield one
        one.close()


@pytest.fixture
def store(stack: Stack) -> ObjectStore:
    return ObjectStore()
