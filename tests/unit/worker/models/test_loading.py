"""How a model is loaded, as `fleet.toml` says it: what is read, what is refused, and with which words."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipefleet.client import Client
from pipefleet.contract.records import read_record
from pipefleet.errors import FleetFileError, ParameterError
from pipefleet.fleet.file import parse_fleet
from pipefleet.fleet.loading import METHODS
from pipefleet.fleet.model_names import check_loading
from pipefleet.fleet.pools import Pool
from pipefleet.pipelines.fleet_pipeline import pipeline
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.base import TOLERANCE
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.fleet.doctor.workers import _runs_with
from pipefleet_workers.fleet.local.edits import FleetEdits
from pipefleet_workers.fleet.render.pools import load_pools
from pipefleet_workers.models import precision
from pipefleet_workers.models.cache import ModelError
from pipefleet_workers.models.load import load_pipeline
from pipefleet_workers.models.precision import half_advice, how_loaded, quantization_config
from pipefleet_workers.models.warmup import warm_up
from pipefleet_workers.observe.service_fit import ServiceFit
from tests.checkpoints import build, cached
from tests.parity.half import in_dtype
from tests.parity.in_process_worker import working

TASK = "text-classification"
TEXT = "The food was very good."
EXAMPLES: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_type": "nf4"},
    "torchao": {"quant_type": "Int4WeightOnlyConfig", "group_size": 32},
    "quanto": {"weights": "int8"},
    "hqq": {"nbits": 4, "group_size": 64, "axis": 1},
    "gptq": {"bits": 4, "group_size": 128, "sym": True},
    "awq": {"bits": 4, "zero_point": True},
    "auto-round": {"bits": 4},
    "compressed-tensors": {"run_compressed": False},
    "fp8": {"weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
    "mxfp4": {"dequantize": True},
}


def read(**keys: Any) -> Pool:
    table = {"task": TASK, "model": "/models/x", **keys}
    return parse_fleet({"pools": {"texts": table}}, base=Path("/")).pool("texts")


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_becomes_the_object_of_transformers(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = read(quantization={"method": method, **EXAMPLES[method]})
    kind = getattr(transformers, precision._CLASSES[method])
    known = set(inspect.signature(kind.__init__).parameters) | {"group_size", "format"}
    assert set(METHODS[method]) <= known, "a field that transformers does not know"
    monkeypatch.setattr(precision, "is_installed", lambda module: True)
    if method in ("torchao", "compressed-tensors", "hqq"):  # their classes look for the package themselves
        return
    found = quantization_config(pool)
    assert type(found) is kind
    for name, value in EXAMPLES[method].items():
        mine = getattr(found, name)
        assert mine == (getattr(torch, value) if isinstance(mine, torch.dtype) else value) or list(mine) == value


@pytest.mark.parametrize("method", sorted(precision._PACKAGES))
def test_a_package_that_is_missing_is_named_with_what_installs_it(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "is_installed", lambda module: False)
    pool = Pool("texts", TASK, str(cached(TASK)), quantization={"method": method, **EXAMPLES[method]})
    with pytest.raises(
        ModelError, match=f"pool texts: quantization by {method} .* (is|are) not installed; run pip install "
    ):
        load_pipeline(pool)
    folder = build(TASK, tmp_path / "model")
    edit(folder, quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=f"the weights of .* are quantized by {method}.*; run pip install "):
        load_pipeline(Pool("texts", TASK, str(folder)))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WRONG = [
    ({"quantization": "bitsandbytes"}, "quantization must be a table with a method, like"),
    ({"quantization": {"load_in_4bit": True}}, "quantization must be a table with a method"),
    (
        {"quantization": {"method": "bitsandbites"}},
        r"method is 'bitsandbites' \(did you mean 'bitsandbytes'\?\); known",
    ),
    ({"quantization": {"method": "bitsandbytes"}}, "must say load_in_4bit = true or load_in_8bit = true"),
    ({"quantization": {"method": "bitsandbytes", "load_in_4bits": True}}, "did you mean 'load_in_4bit'"),
    ({"quantization": {"method": "bitsandbytes", "load_in_4bit": 1}}, "load_in_4bit must be true or false"),
    ({"quantization": {"method": "torchao"}}, "lacks quant_type, which must be one of Int4WeightOnlyConfig"),
    ({"quantization": {"method": "torchao", "quant_type": "os.system"}}, "quant_type must be one of"),
    ({"quantization": {"method": "gptq"}}, "lacks bits"),
    (
        {"attn_implementation": "spda"},
        r"attn_implementation is 'spda' \(did you mean 'sdpa'\?\); known are auto, eager",
    ),
    ({"attn_implementation": "org/kernel"}, "names a kernel of the hub, which is code that nobody has pinned"),
    ({"attn_implementation": "org/kernel@v1:fn"}, "names a kernel of the hub"),
    ({"attn_implementation": 3}, "attn_implementation is 3"),
    ({"model_kwargs": 3}, "model_kwargs must be a table"),
    (
        {"model_kwargs": {"trust_remote_code": True}},
        "it runs code of the model's repository: write trust_remote_code = true",
    ),
    ({"model_kwargs": {"use_kernels": True}}, "use_kernels is refused, since it runs code of the hub"),
    (
        {"model_kwargs": {"load_in_4bit": True}},
        r"write quantization = \{ method = \"bitsandbytes\", load_in_4bit = true",
    ),
    ({"model_kwargs": {"torch_dtype": "float16"}}, 'write dtype = "…"'),
    ({"model_kwargs": {"attn_implementation": "org/kernel"}}, 'write attn_implementation = "…"'),
    ({"model_kwargs": {"use_safetensors": False}}, "use_safetensors must be true: other forms of weights can run code"),
    ({"model_kwargs": {"variant": "../x"}}, "variant must be a short name"),
    ({"model_kwargs": {"problem_typ": "regression"}}, "did you mean 'problem_type'"),
    ({"model_kwargs": {"proxies": {"http": "x"}}}, "set HTTPS_PROXY where the workers run"),
    ({"model_kwargs": {"rope_scaling": {"rope_type": "yarn"}}}, "write it as rope_parameters"),
    ({"model_kwargs": {"max_position_embeddings": -5}}, "must be a whole number above 0"),
    ({"model_kwargs": {"max_position_embeddings": 10**30}}, "must be a whole number above 0"),
    ({"model_kwargs": {"rope_parameters": {"factor": float("nan")}}}, "must be a table of plain values"),
    ({"quantization": {"method": "hqq", "nbits": -4}}, "nbits must be a whole number above 0"),
    ({"quantization": {"method": "gptq", "bits": 4, "backend": "a\nb"}}, "backend must be a short text"),
    (
        {"quantization": {"method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": float("nan")}},
        "llm_int8_threshold must be a finite number",
    ),
    ({"atn_implementation": "sdpa"}, "did you mean 'attn_implementation'"),
]


@pytest.mark.parametrize(("keys", "sentence"), WRONG)
def test_what_a_pool_may_not_say(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FleetFileError, match=sentence) as caught:
        read(**keys)
    assert str(caught.value).startswith("pools.texts")


def test_a_retired_revision_may_be_loaded_in_another_way() -> None:
    before = {"model": "/models/old", "quantization": {}, "attn_implementation": "auto"}
    pool = read(
        quantization={"method": "bitsandbytes", "load_in_8bit": True}, attn_implementation="eager", previous=before
    )
    (old,) = pool.previous
    assert (old.quantization, old.attn_implementation) == ({}, None)
    assert pool.attn_implementation == "eager"


FILE = '[pools.texts]\ntask = "text-classification"\nmodel = "/models"\n'


@pytest.mark.parametrize(
    "line",
    [
        'quantization = { method = "bitsandbytes", load_in_8bit = true, llm_int8_threshold = 5.5 }',
        'quantization = { method = "fp8", weight_block_size = [64, 64] }',
        'attn_implementation = "eager"',
        'model_kwargs = { variant = "fp16", low_cpu_mem_usage = true }',
    ],
)
def test_another_way_to_load_is_another_duty_and_another_deployment(line: str, tmp_path: Path) -> None:
    """`up` replaces the workers, from a copy that says the same, and rendered files start them anew."""
    path = tmp_path / "fleet.toml"
    (tmp_path / "models").mkdir()
    path.write_text(FILE.replace("/models", str(tmp_path / "models")))
    plain = FleetEdits(path).read()
    text = FILE.replace("/models", "s3://bucket/models")
    path.write_text(text)
    digest = load_pools(path)[0].digest
    path.write_text(text + line)
    assert load_pools(path)[0].digest != digest
    path.write_text(FILE.replace("/models", str(tmp_path / "models")) + line)
    changed = FleetEdits(path).read()
    assert changed.duty("texts") != plain.duty("texts")
    assert changed.duty("texts").queues == plain.duty("texts").queues
    path.write_text(changed.to_toml())
    assert FleetEdits(path).read().duty("texts") == changed.duty("texts")


def test_what_a_pool_says_reaches_the_model(tmp_path: Path) -> None:
    kwargs = {"problem_type": "multi_label_classification", "low_cpu_mem_usage": True, "use_safetensors": True}
    ours = load_pipeline(Pool("texts", TASK, str(cached(TASK)), attn_implementation="eager", model_kwargs=kwargs))
    assert how_loaded(ours) == {"dtype": "float32", "device": str(ours.device), "attention": "eager"}
    told = {**kwargs, "attn_implementation": "eager"}
    theirs = transformers.pipeline(TASK, str(cached(TASK)), device=ours.device, model_kwargs=told)
    assert ours(TEXT, top_k=None) == theirs(TEXT, top_k=None)
    assert ours(TEXT, top_k=None) != load_pipeline(Pool("texts", TASK, str(cached(TASK))))(TEXT, top_k=None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"attn_implementation": "flash_attention_2"},
            'needs the package flash-attn, .* write attn_implementation = "sdpa"',
        ),
        ({"model_kwargs": {"sliding_window": 8}}, "is a bert, whose config has no sliding_window"),
        ({"model_kwargs": {"variant": "fp16"}}, r"fp16"),
        (
            {"model_kwargs": {"max_position_embeddings": 4}},
            "the sizes that its config names are not those of its weights",
        ),
        ({"quantization": {"method": "gptq", "bits": 4}}, "optimum and gptqmodel are not installed; run pip install"),
    ],
)
def test_what_the_model_cannot_do_is_one_sentence(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        load_pipeline(Pool("texts", TASK, str(cached(TASK)), **fields))
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("pool texts: ") == 1


def test_a_method_that_transformers_passes_over_is_not_said_to_be_used(tmp_path: Path) -> None:
    folder = build(TASK, tmp_path / "model")
    edit(folder, quantization_config={"quant_method": "of-tomorrow"})
    assert "quantization" not in how_loaded(load_pipeline(Pool("texts", TASK, str(folder), device="cpu")))


def test_a_config_that_names_a_kernel_of_the_hub_is_refused(tmp_path: Path) -> None:
    folder = build(TASK, tmp_path / "model")
    edit(folder, attn_implementation="org/kernel")
    with pytest.raises(ModelError, match="names the kernel org/kernel of the hub, which is code"):
        load_pipeline(Pool("texts", TASK, str(folder)))


def test_quantized_weights_load_as_transformers_loads_them(tmp_path: Path) -> None:
    """bitnet needs no package of its own."""
    folder = build("text-generation", tmp_path / "model")
    config = transformers.BitNetQuantConfig(modules_to_not_convert=["lm_head"]).to_dict()
    edit(folder, quantization_config=config | {"linear_class": "autobitlinear", "quantization_mode": "online"})
    theirs = transformers.pipeline("text-generation", str(folder), device="cpu")
    ours = load_pipeline(Pool("writer", "text-generation", str(folder), device="cpu"))
    assert how_loaded(ours)["quantization"] == "bitnet"
    asked = {"max_new_tokens": 5, "do_sample": False}
    with torch.compiler.set_stance("force_eager"):  # compiling takes 20 seconds
        assert ours(TEXT, **asked) == theirs(TEXT, **asked)


def test_auto_is_the_dtype_of_the_checkpoint_and_what_is_named_is_that(tmp_path: Path) -> None:
    folder = in_dtype(TASK, "float16", tmp_path / "model")
    assert how_loaded(load_pipeline(Pool("texts", TASK, str(folder), device="cpu")))["dtype"] == "float16"
    assert how_loaded(load_pipeline(Pool("texts", TASK, str(folder), dtype="float32")))["dtype"] == "float32"


@pytest.mark.parametrize(("stored", "said", "warned"), [("float16", "auto", True), ("float16", "float16", False)])
def test_a_checkpoint_in_half_precision_on_a_cpu_is_said_to_be_slow(
    stored: str, said: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = in_dtype(TASK, stored, tmp_path / "model")
    load_pipeline(Pool("texts", TASK, str(folder), device="cpu", dtype=said))
    assert (
        'pool texts: it runs in float16, as its checkpoint is stored; on a CPU dtype = "float32"' in caplog.text
    ) is warned


def test_a_checkpoint_in_single_precision_needs_no_word(caplog: pytest.LogCaptureFixture) -> None:
    load_pipeline(Pool("texts", TASK, str(cached(TASK)), device="cpu"))
    assert "on a CPU" not in caplog.text


def test_auto_falls_back_to_float32_as_transformers_does() -> None:
    asked: list[Any] = []

    def load(dtype: Any) -> str:
        asked.append(dtype)
        if dtype != torch.float32:
            raise RuntimeError("no bfloat16 here")
        return "model"

    assert precision.in_dtype(Pool("texts", TASK, "m"), load) == "model"
    assert asked == ["auto", torch.float32]
    with pytest.raises(RuntimeError, match="no bfloat16"):
        precision.in_dtype(Pool("texts", TASK, "m", dtype="bfloat16"), load)


@pytest.mark.parametrize(
    "words",
    [
        "\"slow_conv3d_cpu\" not implemented for 'Half'",
        "Input type (float) and bias type (c10::Half) should be the same",
        "mat1 and mat2 must have the same dtype, but got Float and Half",
    ],
)
def test_an_operation_without_half_precision_has_a_next_step(words: str) -> None:
    model = torch.nn.Linear(1, 1)
    model.dtype = torch.float16  # type: ignore[assignment]
    assert 'write dtype = "float32" in the pool' in str(half_advice(RuntimeError(words), model))
    assert half_advice(RuntimeError("index out of range"), model) is None
    model.dtype = torch.float32  # type: ignore[assignment]
    assert half_advice(RuntimeError(words), model) is None


def test_a_worker_whose_model_cannot_run_in_half_precision_says_so_before_its_first_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(Pool("texts", TASK, str(in_dtype(TASK, "float16", tmp_path / "model")), device="cpu"))
    adapter = RUNTIME[TASK].adapter(pipe)

    def lacks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    monkeypatch.setattr(pipe.model, "forward", lacks)
    with pytest.raises(ModelError, match=r'addmm_impl_cpu_.*write dtype = "float32" in the pool'):
        warm_up(adapter, task_spec(TASK), {}, ServiceFit(), 100)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_warm_up_proves_padding_in_half_precision(dtype: str, tmp_path: Path) -> None:
    pipe = load_pipeline(Pool("texts", TASK, str(in_dtype(TASK, dtype, tmp_path / "model")), device="cpu"))
    found = warm_up(RUNTIME[TASK].adapter(pipe), task_spec(TASK), {}, ServiceFit(), 100)
    assert found.pads
    assert found.tolerance == TOLERANCE[pipe.dtype]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"model_kwargs": {"attn_implementation": "sdpa"}}, 'attn_implementation = "sdpa"'),
        ({"model_kwargs": {"torch_dtype": torch.float16, "variant": "fp16"}}, 'dtype = "float16", model_kwargs = '),
        ({"model_kwargs": {"load_in_8bit": True}}, 'quantization = { method = "bitsandbytes", load_in_8bit = true }'),
        ({"model_kwargs": {"quantization_config": object()}}, 'quantization = { method = "…", … }'),
        ({"model_kwargs": {"max_position_embeddings": 64}}, "model_kwargs = { max_position_embeddings = 64 }"),
        ({"tokenizer": "org/name"}, 'tokenizer = "org/name"'),
        ({"trust_remote_code": True}, "trust_remote_code = true"),
    ],
)
def test_a_call_that_says_how_to_load_is_told_the_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(line)) as caught:
        pipeline(TASK, **given)
    assert "in fleet.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"token": "hf_secret"}, "set HF_TOKEN where the workers run"),
        ({"model_kwargs": {"token": "hf_secret"}}, "set HF_TOKEN where the workers run"),
        ({"model_kwargs": {"cache_dir": "/x"}}, "set HF_HOME"),
        ({"model_kwargs": {"local_files_only": True}}, "set HF_HUB_OFFLINE=1"),
        ({"use_fast": False}, "leave it out"),
        ({"pipeline_class": object}, "name the task"),
        ({"config": object()}, "save_pretrained"),
        ({"model_kwargs": {"ignore_mismatched_sizes": True}}, "it makes weights up"),
        ({"model_kwargs": {"torch_dtype": torch.float64}}, "dtype in a pool is one of auto, float32"),
        ({"model_kwargs": {"use_safetensors": False}}, "use_safetensors must be true"),
        ({"model_kwargs": {"attn_implementation": "org/kernel"}}, "names a kernel of the hub"),
        ({"attn_implementation": "spda"}, "did you mean 'sdpa'"),
        ({"model_kwargs": {"device_map": "cuda:0"}}, 'device_map = "auto" alone'),
        ({"model_kwargs": {"subfolder": "x", 3: 4}}, "no pool of fleet.toml takes 'subfolder'; leave it out"),
        ({"model_kwargs": [("a", 1)]}, "model_kwargs must be a dict"),
    ],
)
def test_a_call_is_told_no_line_that_a_fleet_file_refuses(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(words)) as caught:
        pipeline(TASK, **given)
    assert "write `" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("variant", "fp16", "has no key 'variant': write it as model_kwargs = { variant = … }"),
        ("low_cpu_mem_usage", True, "write it as model_kwargs = { low_cpu_mem_usage = … }"),
        ("load_in_4bit", True, 'write quantization = { method = "bitsandbytes", load_in_4bit = true }'),
        ("quantization_config", {}, 'write quantization = { method = "…", … }'),
        ("torch_dtype", "float16", 'write dtype = "…"'),
        ("token", "hf_secret", "set HF_TOKEN where the workers run"),
        ("use_fast", False, "so leave it out"),
        ("rope_scaling", {}, "write it as rope_parameters"),
        ("ignore_mismatched_sizes", True, "it makes weights up"),
        ("modle", "x", "did you mean 'model'"),
    ],
)
def test_an_argument_of_from_pretrained_in_a_pool_itself_is_told_its_place(key: str, value: Any, words: str) -> None:
    with pytest.raises(FleetFileError, match=re.escape(words)) as caught:
        read(**{key: value})
    assert "hf_secret" not in str(caught.value)
    assert "beside model_kwargs" not in str(caught.value)


def test_empty_model_kwargs_say_nothing() -> None:
    check_loading({"model_kwargs": {}}, {"model_kwargs"}, None)


def test_what_a_model_ran_with_is_read_from_a_record_and_shown() -> None:
    found = read_record({b"state": b"succeeded", b"loaded": b'{"dtype":"float16","device":"cpu"}'})
    assert found is not None
    assert found.loaded == {"dtype": "float16", "device": "cpu"}
    assert _runs_with({"loaded": found.loaded}) == "dtype float16, device cpu; "
    assert _runs_with({}) == _runs_with({"loaded": [3]}) == ""


def test_rows_and_records_tell_what_the_model_ran_with(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_dtype(TASK, "bfloat16", tmp_path / "model")
    path = tmp_path / "fleet.toml"
    path.write_text(f'[pools.texts]\ntask = "{TASK}"\nmodel = "{folder}"\nattn_implementation = "eager"\n')
    monkeypatch.setenv("PIPEFLEET_FLEET", str(path))
    used = {"dtype": "bfloat16", "device": "cpu", "attention": "eager"}
    with Client() as own, working(own.fleet, own.fleet.pool("texts"), own.settings) as built:
        job = own.submit(TASK, TEXT)
        theirs = transformers.pipeline(TASK, str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
        assert job.result(60) == theirs(TEXT)
        assert job.record().loaded == used
        run = own.map(TASK, [TEXT], output="s3://pipefleet/half/")
        run.wait(timeout=60)
        (row,) = run.results()
        assert {name: row["provenance"][name] for name in used} == used
        assert built.facts.to_json()["loaded"] == used
