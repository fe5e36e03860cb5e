"""Models of the hub: loaded at their revision, and refused with one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from pipefleet_workers.models.load import load_pipeline
from tests.checkpoints import build, cached
from tests.unit.fake_hub import COMMIT, TOKEN, Hub, serving
from tests.unit.model_folders import TASK, TEXT, pool, refusal

pytestmark = pytest.mark.usefixtures("cache")

Ask = Callable[..., dict[str, Any]]
LOAD = """
import json, os, sys
from pipefleet.fleet.pools import Pool
from pipefleet_workers.models.load import load_pipeline
for line in sys.stdin:
    case = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(case.pop("environment", {}))
    try:
        print(json.dumps({"result": load_pipeline(Pool("texts", **case))("The food was very good.")}), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Ask]]:
    """A hub, and a function that loads a pool from it in a process of its own; the hub stops before the last one."""
    unsafe = build(TASK, tmp_path_factory.mktemp("hub") / "unsafe")
    torch.save(load_file(unsafe / "model.safetensors"), unsafe / "pytorch_model.bin")
    (unsafe / "model.safetensors").unlink()
    folders = {"org/texts": cached(TASK), "org/gated": cached(TASK), "org/unsafe": unsafe}
    cache = tmp_path_factory.mktemp("home")
    with serving(Hub(folders, frozenset({"org/gated"}))) as served:
        environment = {**os.environ, "HF_ENDPOINT": served.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        with subprocess.Popen(
            [sys.executable, "-c", LOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None

            def ask(model: str, revision: str | None = COMMIT, **case: Any) -> dict[str, Any]:
                process.stdin.write(json.dumps({"task": TASK, "model": model, "revision": revision, **case}) + "\n")
                process.stdin.flush()
                return dict(json.loads(process.stdout.readline()))

            yield served, ask
            process.stdin.close()
            process.wait(30)


def test_a_model_of_the_hub_is_loaded_at_its_revision(hub: tuple[Hub, Ask]) -> None:
    served, ask = hub
    (mine,), (theirs,) = ask("org/texts")["result"], load_pipeline(pool(cached(TASK)))(TEXT)
    assert mine == {"label": theirs["label"], "score": pytest.approx(theirs["score"], abs=1e-5)}
    files = [path for path in served.asked if "/resolve/" in path]
    assert files
    assert all(f"/resolve/{COMMIT}/" in path for path in files)


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        ("org/gated", COMMIT, "it is gated: accept its terms on the hub, and set HF_TOKEN"),
        ("org/none", COMMIT, "there is no such repository, or it is private: check the name, or set HF_TOKEN"),
        ("org/texts", 40 * "1", "it has no such revision; check the pool's revision"),
        ("org/unsafe", COMMIT, "it has no weights as safetensors, and other forms can run code"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub: tuple[Hub, Ask], model: str, revision: str, words: str) -> None:
    error = hub[1](model, revision)["error"]
    assert error.startswith(f"ModelError: pool texts: cannot load {model}@{revision} for {TASK} on "), error
    assert words in error
    assert "\n" not in error


def test_a_gated_model_is_read_with_the_token(hub: tuple[Hub, Ask]) -> None:
    answer = hub[1]("org/gated", environment={"HF_TOKEN": TOKEN})
    assert answer.get("result"), answer
    wrong = hub[1]("org/gated", 40 * "2", environment={"HF_TOKEN": "hf_wrong"})["error"]
    assert "it is gated" in wrong
    assert "hf_wrong" not in wrong


def test_a_model_that_is_not_there_and_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "not in the cache and the hub cannot be reached; check the network" in refusal(
        pool("org/none", revision=COMMIT)
    )
