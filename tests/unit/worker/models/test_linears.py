"""Linear layers through oneDNN: the same numbers, only where it is faster, and only for layers that are nothing but linear."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pipefleet_workers.models import linears
from pipefleet_workers.models.linears import FEWEST_ROWS, OneDnnLinear, faster_linears
from pipefleet_workers.models.precision import how_loaded
from tests.parity.harness import load


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN counts as faster, whatever this machine is."""
    monkeypatch.setattr(linears, "FASTER", 0.0)


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("shape", [(FEWEST_ROWS, 24), (2, 70, 24), (3, 24), (0, 24), (24,), (2, 3, 40, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_the_same_numbers_for_inputs_of_every_shape(shape: tuple[int, ...], bias: bool) -> None:
    plain = nn.Linear(24, 40, bias=bias)
    model = copy.deepcopy(nn.Sequential(plain))
    faster_linears(model)
    assert type(model[0]) is OneDnnLinear
    rows = torch.randn(shape)
    for given in (rows, rows.transpose(0, -2).contiguous().transpose(0, -2) if rows.ndim > 1 else rows):
        with torch.inference_mode():
            torch.testing.assert_close(model(given), plain(given), rtol=1e-5, atol=1e-5)
    assert model(rows.requires_grad_()).requires_grad == plain(rows).requires_grad


@pytest.mark.usefixtures("faster")
def test_layers_of_a_class_of_their_own_and_of_other_types_stay() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.ModuleList([Doubled(8, 8), nn.Linear(8, 8).half(), nn.Linear(8, 8)])
    faster_linears(model)
    assert [type(layer) for layer in model] == [Doubled, nn.Linear, OneDnnLinear]


class _Quantised(torch.Tensor):
    """Weights as torchao keeps them: float32 by their looks, integers inside, known to few operators."""

    def __new__(cls, weights: torch.Tensor) -> _Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, weights.shape, dtype=weights.dtype)  # type: ignore[no-any-return, attr-defined]

    def __init__(self, weights: torch.Tensor) -> None:
        self.scale = weights.abs().max() / 127
        self.levels = (weights / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            rows, weights, *bias = args
            return nn.functional.linear(rows, weights.levels.float() * weights.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"no {func} of quantized weights")


@pytest.mark.usefixtures("faster")
def test_layers_with_weights_of_a_class_of_their_own_stay() -> None:
    quantized = nn.Linear(8, 8)
    quantized.weight = nn.Parameter(_Quantised(quantized.weight.data), requires_grad=False)
    model = nn.Sequential(
        quantized, nn.Linear(8, 64)
    )  # the second layer is the costly one, so it is the one that is tried
    rows = torch.randn(FEWEST_ROWS, 8)
    with torch.inference_mode():
        wanted = model(rows)
        faster_linears(model)
        assert [type(layer) for layer in model] == [nn.Linear, OneDnnLinear]
        torch.testing.assert_close(model(rows), wanted, rtol=1e-5, atol=1e-5)


def _slower(layer: nn.Linear) -> float:
    return 1.1


def _wrong(input: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
    return nn.functional.linear(input, weight, bias) + 1.0


def _missing(*_: Any) -> torch.Tensor:
    raise AttributeError("no such operator")


@pytest.mark.parametrize(("name", "fake"), [("_gain", _slower), ("_product", _wrong), ("_product", _missing)])
def test_a_model_stays_as_it_is_where_onednn_is_slow_wrong_or_missing(
    name: str, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linears, name, fake)
    model = nn.Sequential(nn.Linear(64, 64))
    assert faster_linears(model) == 1.0
    assert type(model[0]) is nn.Linear
    assert faster_linears(nn.Sequential(nn.ReLU())) == 1.0


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("task", ["text-classification", "text-generation", "image-classification"])
def test_a_whole_model_gives_the_same_logits(task: str) -> None:
    model = copy.deepcopy(load(task).model)
    named = "pixel_values" if task.startswith("image") else "input_ids"
    size = getattr(model.config, "image_size", 32)
    given = torch.randn(2, 3, size, size) if named == "pixel_values" else torch.arange(5, 69).remainder(32)[None]
    with torch.inference_mode():
        wanted = model(**{named: given}).logits
        faster_linears(model)
        assert any(isinstance(layer, OneDnnLinear) for layer in model.modules())
        torch.testing.assert_close(model(**{named: given}).logits, wanted, rtol=1e-4, atol=1e-5)


def test_workers_say_where_onednn_multiplies(faster: None) -> None:
    pipe = load("text-classification")
    before = how_loaded(pipe)
    faster_linears(pipe.model)
    assert how_loaded(pipe) == {**before, "linears": "oneDNN"}
