"""The keys of a pool about loading its model: quantization, attention, arguments of `from_pretrained`. No I/O.

Each is an allow-list of plain values, so that a fleet file cannot name code by them. Arguments that are missing here could run code
or make weights up, or have a key of their own in the pool. `pools` checks with these functions, which raise FleetFileError;
`model_names` takes the advice of `instead`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from pipefleet.errors import FleetFileError, nearest

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""Implementations of attention that transformers or an installed package bring; `auto` leaves the choice to transformers."""
DTYPES = ("auto", "float32", "float16", "bfloat16")
_KERNEL = re.compile(r"[^/:]+/[^/:]+(@[^/:]+)?(:[^/:]+)?")

_Rule = tuple[Callable[[Any], bool], str]


_MOST = 1 << 31


def _is_number(value: Any) -> bool:
    """A finite one: nan differs from itself, so that a file with one would always seem changed."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _one_of(*choices: str) -> _Rule:
    return (lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | bool) or _is_number(value)


_BOOL: _Rule = (lambda value: isinstance(value, bool), "true or false")
_COUNT: _Rule = (lambda value: type(value) is int and 0 < value < _MOST, "a whole number above 0")
_WHOLE: _Rule = (lambda value: type(value) is int and -1 <= value < _MOST, "a whole number, or -1")
_NUMBER: _Rule = (_is_number, "a finite number")
_TEXT: _Rule = (lambda value: isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable(), "a short text")
_NAMES: _Rule = (_is_names, "a list of names of modules")
_SIZES: _Rule = (
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_COUNT[0], value)),
    "a list of two whole numbers above 0",
)
_TABLE: _Rule = (lambda value: isinstance(value, Mapping) and _is_plain(value), "a table of plain values")
_TRUE: _Rule = (lambda value: value is True, "true: other forms of weights can run code while they load")

METHODS: Mapping[str, Mapping[str, _Rule]] = {
    "bitsandbytes": {
        "load_in_8bit": _BOOL,
        "load_in_4bit": _BOOL,
        "llm_int8_threshold": _NUMBER,
        "llm_int8_skip_modules": _NAMES,
        "llm_int8_enable_fp32_cpu_offload": _BOOL,
        "llm_int8_has_fp16_weight": _BOOL,
        "bnb_4bit_compute_dtype": _one_of(*DTYPES[1:]),
        "bnb_4bit_quant_type": _one_of("fp4", "nf4"),
        "bnb_4bit_use_double_quant": _BOOL,
        "bnb_4bit_quant_storage": _one_of("uint8", "int8", "float16", "bfloat16", "float32", "float64"),
    },
    "torchao": {
        "quant_type": _one_of(
            "Int4WeightOnlyConfig",
            "Int8WeightOnlyConfig",
            "Int8DynamicActivationInt8WeightConfig",
            "Float8WeightOnlyConfig",
            "Float8DynamicActivationFloat8WeightConfig",
        ),
        "group_size": _WHOLE,
        "modules_to_not_convert": _NAMES,
        "include_input_output_embeddings": _BOOL,
        "untie_embedding_weights": _BOOL,
    },
    "quanto": {
        "weights": _one_of("float8", "int8", "int4", "int2"),
        "activations": _one_of("int8", "float8"),
        "modules_to_not_convert": _NAMES,
    },
    "hqq": {"nbits": _COUNT, "group_size": _WHOLE, "view_as_float": _BOOL, "axis": _WHOLE, "skip_modules": _NAMES},
    "gptq": {
        "bits": _COUNT,
        "group_size": _WHOLE,
        "desc_act": _BOOL,
        "sym": _BOOL,
        "backend": _TEXT,
        "format": _one_of("gptq", "gptq_v2"),
    },
    "awq": {
        "bits": _COUNT,
        "group_size": _WHOLE,
        "zero_point": _BOOL,
        "backend": _TEXT,
        "modules_to_not_convert": _NAMES,
    },
    "auto-round": {"bits": _COUNT, "group_size": _WHOLE, "sym": _BOOL, "backend": _TEXT},
    "compressed-tensors": {"run_compressed": _BOOL, "dequantize": _BOOL},
    "fp8": {
        "activation_scheme": _one_of("dynamic", "static"),
        "weight_block_size": _SIZES,
        "dequantize": _BOOL,
        "modules_to_not_convert": _NAMES,
    },
    "mxfp4": {"dequantize": _BOOL, "modules_to_not_convert": _NAMES},
}
"""For each method, the fields of transformers' class that a pool may set."""

OF_THE_CONFIG: Mapping[str, _Rule] = {
    "max_position_embeddings": _COUNT,
    "problem_type": _one_of("regression", "single_label_classification", "multi_label_classification"),
    "rope_parameters": _TABLE,
    "sliding_window": _COUNT,
}
"""Arguments of `from_pretrained` that replace values of the model's config.json."""
OF_THE_WEIGHTS: Mapping[str, _Rule] = {
    "experts_implementation": _one_of("eager", "batched_mm", "grouped_mm"),
    "low_cpu_mem_usage": _BOOL,
    "offload_buffers": _BOOL,
    "use_safetensors": _TRUE,
    "variant": (
        lambda value: isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9_-]{1,40}", value)),
        "a short name",
    ),
    "weights_only": _TRUE,
}
_OF_THE_WORKERS = {
    "cache_dir": "set HF_HOME where the workers run",
    "config": "the workers read the config of the model's folder, so save_pretrained() a changed one there",
    "local_files_only": "set HF_HUB_OFFLINE=1 where the workers run",
    "pipeline_class": "the workers run the pipeline of the task, so name the task",
    "proxies": "set HTTPS_PROXY where the workers run",
    "token": "set HF_TOKEN where the workers run",
    "use_auth_token": "set HF_TOKEN where the workers run",
    "use_fast": "the workers take what the model's folder names, so leave it out",
}
"""Arguments of transformers without a key in a pool, and what to do instead."""
_ELSEWHERE = {
    **_OF_THE_WORKERS,
    "attn_implementation": 'write attn_implementation = "…" beside model_kwargs',
    "device_map": 'write device_map = "auto" beside model_kwargs',
    "dtype": 'write dtype = "…" beside model_kwargs',
    "load_in_4bit": 'write quantization = { method = "bitsandbytes", load_in_4bit = true } beside model_kwargs',
    "load_in_8bit": 'write quantization = { method = "bitsandbytes", load_in_8bit = true } beside model_kwargs',
    "max_memory": "write max_memory = { … } beside model_kwargs",
    "offload_folder": 'write offload_folder = "…" beside model_kwargs',
    "quantization_config": 'write quantization = { method = "…", … } beside model_kwargs',
    "revision": 'write revision = "…" beside model_kwargs',
    "rope_scaling": "write it as rope_parameters in model_kwargs",
    "torch_dtype": 'write dtype = "…" beside model_kwargs',
    "trust_remote_code": "it runs code of the model's repository: write trust_remote_code = true beside model_kwargs if you have "
    "read that code",
}
_REFUSED = {
    "allow_all_kernels": "it runs code of the hub that nobody has pinned",
    "code_revision": "it names code of the hub",
    "ignore_mismatched_sizes": "it makes weights up where the checkpoint's do not fit",
    "kernel_config": "it runs code of the hub that nobody has pinned",
    "use_kernels": "it runs code of the hub that nobody has pinned",
}


def checked_quantization(where: str, value: Any) -> dict[str, Any]:
    """The table `quantization` of a pool; an empty one quantizes nothing. Raises FleetFileError."""
    if value == {}:
        return {}
    if not isinstance(value, Mapping) or not isinstance(value.get("method"), str):
        raise FleetFileError(
            f'{where} must be a table with a method, like {{ method = "bitsandbytes", load_in_4bit = true }}'
        )
    method = value["method"]
    if method not in METHODS:
        raise FleetFileError(
            f"{where}.method is {method!r}{nearest(method, METHODS)}; known are {', '.join(sorted(METHODS))}"
        )
    _check(where, {name: one for name, one in value.items() if name != "method"}, METHODS[method])
    if method == "bitsandbytes" and (value.get("load_in_4bit"), value.get("load_in_8bit")).count(True) != 1:
        raise FleetFileError(f"{where} must say load_in_4bit = true or load_in_8bit = true")
    needed = {"torchao": "quant_type", "gptq": "bits"}.get(method)
    if needed and needed not in value:
        raise FleetFileError(f"{where} lacks {needed}, which must be {METHODS[method][needed][1]}")
    return dict(value)


def checked_attention(where: str, value: Any) -> str | None:
    """The value of `attn_implementation`, None for `auto`. Raises FleetFileError."""
    if value == "auto":
        return None
    if isinstance(value, str) and value in ATTENTIONS:
        return value
    known = f"known are auto, {', '.join(ATTENTIONS)}"
    if isinstance(value, str) and _KERNEL.fullmatch(value):
        raise FleetFileError(f"{where} names a kernel of the hub, which is code that nobody has pinned; {known}")
    raise FleetFileError(f"{where} is {value!r}{nearest(str(value), ATTENTIONS)}; {known}")


def checked_model_kwargs(where: str, value: Any) -> dict[str, Any]:
    """The table `model_kwargs` of a pool. Raises FleetFileError."""
    if not isinstance(value, Mapping):
        raise FleetFileError(f'{where} must be a table like {{ variant = "fp16" }}')
    for name in value:
        if name in _ELSEWHERE:
            raise FleetFileError(f"{where}.{name} has a place of its own: {_ELSEWHERE[name]}")
        if name in _REFUSED:
            raise FleetFileError(f"{where}.{name} is refused, since {_REFUSED[name]}; take it out")
    _check(where, value, {**OF_THE_CONFIG, **OF_THE_WEIGHTS})
    return dict(value)


def _check(where: str, table: Mapping[str, Any], rules: Mapping[str, _Rule]) -> None:
    for name, value in table.items():
        if name not in rules:
            known = ", ".join(sorted(rules))
            raise FleetFileError(f"{where} has an unknown key {name!r}{nearest(name, rules)}; known are {known}")
        allowed, what = rules[name]
        if not allowed(value):
            raise FleetFileError(f"{where}.{name} must be {what}")


def misplaced(name: str) -> str | None:
    """The advice for an argument of `from_pretrained` that stands in a pool's table itself; None for any other name."""
    if name in OF_THE_CONFIG or name in OF_THE_WEIGHTS:
        return f"write it as model_kwargs = {{ {name} = … }}"
    if name in _REFUSED:
        return f"it is refused, since {_REFUSED[name]}; take it out"
    return _OF_THE_WORKERS.get(name) or _ELSEWHERE.get(name, "").removesuffix(" beside model_kwargs") or None


def instead(name: str, value: Any) -> str:
    """The advice for an argument of `pipeline()` that says how a model is loaded, such as the line for the fleet file."""
    parts = {str(key): one for key, one in value.items()} if name == "model_kwargs" else {name: value}
    for key, one in parts.items():
        if why := _without_line(_KEYS.get(key, key), one):
            return why
    lines = ", ".join(_line(_KEYS.get(key, key), one) for key, one in parts.items())
    return f"write `{lines}` under its [pools.NAME] in fleet.toml, not in pipeline()"


def _without_line(name: str, value: Any) -> str | None:
    """The advice for an argument that no line of a pool can say; None if one can."""
    if name in _OF_THE_WORKERS:
        return _OF_THE_WORKERS[name]
    if name in _REFUSED:
        return f"{name} is refused, since {_REFUSED[name]}; leave it out"
    rules = {**OF_THE_CONFIG, **OF_THE_WEIGHTS}
    try:
        if name == "attn_implementation":
            checked_attention(name, value)
        elif name in rules:
            _check("model_kwargs", {name: value}, rules)
        elif name == "device_map" and value != "auto":
            return 'a pool is spread over devices by device_map = "auto" alone, or bound to one by device = "…"'
        elif name == "dtype" and str(value).removeprefix("torch.") not in DTYPES:
            return f"dtype in a pool is one of {', '.join(DTYPES)}"
    except FleetFileError as error:
        return str(error)
    if name in rules or name in _LINES:
        return None
    return f"no pool of fleet.toml takes {name!r}; leave it out"


def _line(name: str, value: Any) -> str:
    if name in ("load_in_4bit", "load_in_8bit"):
        return f'quantization = {{ method = "bitsandbytes", {name} = true }}'
    if name == "quantization_config":
        return 'quantization = { method = "…", … }'
    if name in OF_THE_WEIGHTS or name in OF_THE_CONFIG:
        return f"model_kwargs = {{ {name} = {_toml(value)} }}"
    return f"{name} = {_toml(value)}"


_KEYS = {"torch_dtype": "dtype", "feature_extractor": "processor", "image_processor": "processor"}
"""Arguments of transformers whose key in a pool has another name."""
_LINES = (
    "attn_implementation", "device_map", "dtype", "load_in_4bit", "load_in_8bit", "max_memory", "offload_folder", "processor",
    "quantization_config", "revision", "tokenizer", "trust_remote_code",
)  # fmt: skip


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    text = str(value).removeprefix("torch.")  # the text of a torch dtype begins so
    plain = isinstance(value, str) or text != str(value)
    return (
        f'"{text}"'
        if plain and len(text) <= 100 and '"' not in text and "\\" not in text and text.isprintable()
        else "…"
    )
