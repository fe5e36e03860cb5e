"""How a pool's weights are loaded (dtype, quantization, attention), and the settings that the loaded model really uses.

    fleet.toml ─▶ arguments of from_pretrained ─▶ model ─▶ {dtype, device, attention, quantization, linears}

`load` calls it before and after loading; `build` calls `how_loaded`, whose answer becomes provenance. A missing package or an
unsafe setting raises ModelError.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipefleet.fleet.loading import OF_THE_CONFIG
from pipefleet.fleet.pools import Pool
from pipefleet.installed import is_installed
from pipefleet_workers.models.cache import ModelError
from pipefleet_workers.models.linears import by_onednn

log = logging.getLogger(__name__)
_CLASSES = {
    "auto-round": "AutoRoundConfig",
    "awq": "AwqConfig",
    "bitsandbytes": "BitsAndBytesConfig",
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "gptq": "GPTQConfig",
    "hqq": "HqqConfig",
    "mxfp4": "Mxfp4Config",
    "quanto": "QuantoConfig",
    "torchao": "TorchAoConfig",
}
"""transformers' class for each of `pipefleet.fleet.loading.METHODS`."""
_PACKAGES = {
    "auto-round": {"auto_round": "auto-round"},
    "awq": {"gptqmodel": "gptqmodel"},
    "bitsandbytes": {"bitsandbytes": "'pipefleet[bitsandbytes]'"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "hqq": {"hqq": "hqq"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
    "torchao": {"torchao": "'pipefleet[torchao]'"},
}
"""By method, the modules that it needs, and the package that pip installs for each."""
_FLASH = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
}
_HALF = (
    "'Half'",
    "'BFloat16'",
    "c10::Half",
    "c10::BFloat16",
    "Half and Float",
    "BFloat16 and Float",
    "Float and Half",
    "Float and BFloat16",
    "but got Half",
    "but found Half",
    "but found BFloat16",
    "same dtype",
)
"""Words of torch's error when an operation has no kernel for half precision, or mixes it with float32."""


def loading(pool: Pool, config: Any, model: Any, device: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the pool's settings except its dtype. `config` is the model's, `model` its class.

    Raises ModelError for a package that is not installed.
    """
    found = {name: one for name, one in pool.model_kwargs.items() if name not in OF_THE_CONFIG}
    _refuse_kernels(pool, config, model)
    if pool.attn_implementation:
        found["attn_implementation"] = pool.attn_implementation
    stored = quantized_by(getattr(config, "quantization_config", None))
    if pool.quantization:
        found["quantization_config"] = quantization_config(pool)
    elif stored in _PACKAGES:
        _require_packages(f"the weights of {pool.model} are quantized by {stored}", stored)
    if (pool.quantization or stored) and not pool.device_map:
        found["device_map"] = {"": device}  # without it some methods take the first GPU, whatever the pool says
    return found


def config_arguments(pool: Pool) -> dict[str, Any]:
    """The entries of `model_kwargs` that replace values of config.json."""
    return {name: one for name, one in pool.model_kwargs.items() if name in OF_THE_CONFIG}


def quantization_config(pool: Pool) -> Any:
    """The object of transformers for `quantization` of a pool. Raises ModelError if it cannot be made."""
    import transformers

    method = str(pool.quantization["method"])
    _require_packages(f"quantization by {method} is not possible here", method)
    fields = {name: one for name, one in pool.quantization.items() if name != "method"}
    if method == "torchao":
        fields = _of_torchao(fields)
    try:
        return getattr(transformers, _CLASSES[method])(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise ModelError(
            f"quantization cannot be set up ({str(error).splitlines()[0][:300]}); change it in fleet.toml"
        ) from None


def _of_torchao(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with the name of a torchao type replaced by its object, which takes `group_size`. Names come from an allow-list."""
    own = {"group_size": fields.pop("group_size")} if "group_size" in fields else {}
    kinds = importlib.import_module("torchao.quantization")
    return {**fields, "quant_type": getattr(kinds, fields["quant_type"])(**own)}


def _require_packages(what: str, method: str) -> None:
    needed = _PACKAGES.get(method, {})
    missing = [name for name in needed if not is_installed(name)]
    if missing:
        packages, are = " ".join(needed[name] for name in missing), "are" if missing[1:] else "is"
        raise ModelError(
            f"{what}: {' and '.join(missing)} {are} not installed; run pip install {packages} where the workers run, or choose "
            "another quantization or checkpoint"
        )


def _refuse_kernels(pool: Pool, config: Any, model: Any) -> None:
    """Raise ModelError if transformers would fetch a kernel for the attention from the hub: it is code of no pinned version."""
    wanted = pool.attn_implementation
    if wanted in _FLASH and not is_installed(_FLASH[wanted]):
        raise ModelError(
            f'attn_implementation = "{wanted}" needs the package flash-attn, which is not installed; install it where the workers '
            'run, or write attn_implementation = "sdpa"'
        )
    kept = getattr(model, "_compatible_flash_implementations", None) or ()
    if wanted in _FLASH and kept and wanted not in kept:
        raise ModelError(f'{model.__name__} takes no {wanted}; write attn_implementation = "sdpa", or leave it out')
    named = [one for one in _attentions(config) if "/" in one]
    if named and wanted is None and not pool.trust_remote_code:
        raise ModelError(
            f"the config of {pool.model} names the kernel {named[0]} of the hub, which is code that nobody has pinned; write "
            'attn_implementation = "sdpa" in the pool'
        )


def _attentions(config: Any) -> list[str]:
    """The implementations that a config and its parts ask for."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    return [str(one) for part in parts if (one := getattr(part, "_attn_implementation", None)) is not None]


def quantized_by(config: Any) -> str | None:
    """The method of a quantization config, given as an object or as in config.json; None without a config."""
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    if method is None:
        return None
    return str(getattr(method, "value", method))


def in_dtype(pool: Pool, load: Callable[[Any], Any]) -> Any:
    """The result of `load(dtype)` with the pool's dtype.

    As in transformers.pipeline, `auto` becomes float32 if the checkpoint's own dtype does not load.
    """
    if pool.dtype != "auto":
        return load(getattr(torch, pool.dtype))
    try:
        return load("auto")
    except (TypeError, ValueError, RuntimeError) as error:
        if "out of memory" in str(error).lower():
            raise
        try:
            found = load(torch.float32)
        except Exception:  # noqa: BLE001 - the first error tells more
            raise error from None
    log.warning("pool %s: %s does not load in its own dtype, it runs in float32", pool.name, pool.model)
    return found


def warn_of_half(pool: Pool, pipe: Any) -> None:
    """Log that a checkpoint runs in half precision on a CPU, where this is slow, unless the pool asks for it."""
    dtype, device = getattr(pipe.model, "dtype", None), torch.device(pipe.device).type
    if pool.dtype == "auto" and device == "cpu" and dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        log.warning(
            'pool %s: it runs in %s, as its checkpoint is stored; on a CPU dtype = "float32" in the pool is faster for most '
            "models, and takes twice the memory",
            pool.name, name,
        )  # fmt: skip


def how_loaded(pipe: Any) -> dict[str, str]:
    """The settings in use: `dtype` and `device`; `attention` if the model has a choice; `quantization` if it is quantized.

    `linears` names the library of its linear layers, where this is not torch's own.
    """
    model = pipe.model
    places = getattr(model, "hf_device_map", None) or {"": pipe.device}
    found = {
        "dtype": str(getattr(model, "dtype", None) or torch.float32).removeprefix("torch."),
        "device": ", ".join(sorted({_device_name(one) for one in places.values()})),
    }
    config = getattr(model, "config", None)
    if attention := getattr(config, "_attn_implementation", None):
        found["attention"] = str(attention)
    method = quantized_by(getattr(config, "quantization_config", None))
    # transformers ignores a method that it does not know, and then there is no quantizer.
    if method and getattr(model, "hf_quantizer", None) is not None:
        found["quantization"] = method
    if by_onednn(model):
        found["linears"] = "oneDNN"
    return found


def _device_name(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def half_advice(error: BaseException, model: Any) -> str | None:
    """Advice for an operation that fails because the model is in half precision; None for any other error."""
    dtype = getattr(model, "dtype", None)
    if dtype not in (torch.float16, torch.bfloat16) or not any(words in str(error) for words in _HALF):
        return None
    name = str(dtype).removeprefix("torch.")
    return f'an operation of the model has no form for {name} on this device; write dtype = "float32" in the pool'
