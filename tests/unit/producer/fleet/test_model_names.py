"""The model of a call: names, paths, and objects that no worker can be given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipefleet.errors import ParameterError
from pipefleet.fleet.model_names import check_loading, model_name

LOADING = {"tokenizer", "feature_extractor", "trust_remote_code", "use_fast", "model_kwargs"}


def test_a_path_names_the_folder_or_the_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "models" / "tiny")
    for given in (tmp_path / "models" / "tiny", Path("models/tiny"), "./models/tiny"):
        assert model_name(given) == folder
    assert model_name(Path("org/name")) == "org/name"
    assert model_name("models/tiny") == "models/tiny"
    assert type(model_name(np.str_("org/name"))) is str
    assert model_name(None) is None


def test_an_object_is_refused_with_what_to_do() -> None:
    loaded = torch.nn.Linear(1, 1)
    loaded.name_or_path = "org/name"
    with pytest.raises(
        ParameterError, match=r"not an object of type Linear: .* pass model='org/name'; .*save_pretrained"
    ):
        model_name(loaded)
    with pytest.raises(ParameterError, match="the name of a pool's model"):
        model_name(torch.nn.Linear(1, 1))


DEFAULTS: list[dict[str, Any]] = [
    {"tokenizer": None, "feature_extractor": None}, {"trust_remote_code": False, "use_fast": True}, {"tokenizer": "org/name"},
    {"feature_extractor": Path("org/name")},
]  # fmt: skip


@pytest.mark.parametrize("given", DEFAULTS)
def test_what_changes_nothing_is_passed_over(given: dict[str, Any]) -> None:
    check_loading(given, LOADING, "org/name")


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer": "org/other"}, 'write `tokenizer = "org/other"` under its .* in fleet.toml'),
    ({"trust_remote_code": True}, "write `trust_remote_code = true` under"),
    ({"model_kwargs": {"a": 1}}, "no pool of fleet.toml takes 'a'"),
    ({"tokenizer": SimpleNamespace()}, "an object of type SimpleNamespace cannot be passed: save_pretrained"),
]


@pytest.mark.parametrize(("given", "message"), CHANGES)
def test_what_would_change_the_model_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        check_loading(given, LOADING, "org/name")
