"""Loading models from folders: what is refused and with which words, and how much memory it takes."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipefleet.errors import UsageError
from pipefleet_workers.models.load import load_pipeline, require_folder
from tests.checkpoints import build, cached
from tests.checkpoints.text import llama_config
from tests.checkpoints.vocabularies import chat_tokenizer
from tests.unit.model_folders import SPEECH, TASK, TEXT, pool, refusal

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier of texts that a test may change."""
    return build(TASK, tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_loaded_whole_and_ready(folder: Path) -> None:
    pipe = load_pipeline(pool(folder))
    assert not pipe.model.training
    assert pipe.dtype == torch.float32
    assert isinstance(pipe, transformers.TextClassificationPipeline)
    assert pipe(TEXT) == transformers.pipeline(TASK, model=str(folder), device="cpu")(TEXT)


def test_the_dtype_of_the_pool_is_the_models(folder: Path) -> None:
    assert load_pipeline(pool(folder, dtype="bfloat16")).dtype == torch.bfloat16


def test_weights_that_can_run_code_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    assert "holds weights only as pytorch_model.bin, a form that can run code while it loads" in refusal(pool(folder))
    (folder / "pytorch_model.bin").unlink()
    assert "holds no weights; name the folder that save_pretrained wrote" in refusal(pool(folder))


def test_a_damaged_or_half_copied_file_is_told(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "a file of its weights is damaged or cut short; copy it again" in refusal(pool(folder))


def test_a_missing_shard_is_told(tmp_path: Path, folder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert load_pipeline(pool(folder))(TEXT)
    next(folder.glob("model-00002-*.safetensors")).unlink()
    assert "model-00002" in refusal(pool(folder))


def test_a_checkpoint_that_lacks_what_the_task_reads_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    save_file({name: one for name, one in load_file(weights).items() if "classifier" not in name}, weights)
    sentence = refusal(pool(folder))
    assert "holds no weights for classifier.bias and 1 more of BertForSequenceClassification" in sentence


def test_tokens_need_no_pooler(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_pipeline(pool(cached("fill-mask"), "feature-extraction"))(TEXT)
    assert "holds no pooler" in caplog.text


@pytest.mark.parametrize(
    ("task", "checkpoint", "words"),
    [
        (TASK, f"{SPEECH}:whisper", "is a WhisperForConditionalGeneration, which cannot do text-classification"),
        (
            "object-detection",
            "image-classification",
            "is a ViTForImageClassification, which cannot do object-detection",
        ),
        (SPEECH, TASK, f"is a BertForSequenceClassification, which cannot do {SPEECH}"),
        ("image-classification", "image-feature-extraction", "it was not trained for image-classification"),
    ],
)
def test_a_model_of_another_task_is_refused(task: str, checkpoint: str, words: str) -> None:
    assert words in refusal(pool(cached(checkpoint), task))


def test_a_folder_that_is_not_one_of_a_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="there is no model folder"):
        require_folder(pool(tmp_path / "none"))
    assert "there is no model folder" in refusal(pool(tmp_path / "none"))
    edit_config(folder, model_type="gpt-17")
    assert "is of the type 'gpt-17', which transformers" in refusal(pool(folder))
    (folder / "config.json").unlink()
    assert "has no config.json; name the folder that save_pretrained wrote" in refusal(pool(folder))


CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path({marker!r}).touch()
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder whose model comes with code, and the file that the code makes when it runs."""
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    edit_config(folder, model_type="own", auto_map=classes, architectures=["OwnModel"])
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder, marker


def test_code_of_a_model_runs_only_where_the_pool_trusts_it(with_code: tuple[Path, Path]) -> None:
    folder, marker = with_code
    sentence = refusal(pool(folder))
    assert "brings code of its own, which is not run" in sentence
    assert "trust_remote_code = true" in sentence
    assert not marker.exists()
    assert load_pipeline(pool(folder, trust_remote_code=True))(TEXT)
    assert marker.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_a_pipeline_or_tokenizer_with_code_of_its_own(folder: Path, tmp_path: Path, trusted: bool) -> None:
    """A known architecture beside foreign code: the code is refused or not needed, and never runs by accident."""
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    if not trusted:
        edit_config(folder, custom_pipelines={TASK: {"impl": "own.Own", "pt": ["AutoModel"]}})
        assert "brings code of its own, which is not run" in refusal(pool(folder))
    else:  # auto_map beside a model type that transformers knows: its own class serves
        edit_config(folder, auto_map={"AutoModelForSequenceClassification": "own.OwnModel"})
        assert load_pipeline(pool(folder))(TEXT)
    assert not marker.exists()


def test_a_tokenizer_and_a_processor_named_apart(folder: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.mkdir()
    for file in folder.glob("*token*"):
        shutil.move(file, words)
    assert "holds no tokenizer, which text-classification needs" in refusal(pool(folder))
    assert load_pipeline(pool(folder, tokenizer=str(words)))(TEXT) == load_pipeline(pool(cached(TASK)))(TEXT)
    speech = build(SPEECH, tmp_path / "speech")
    ears = tmp_path / "ears"
    ears.mkdir()
    shutil.move(speech / "preprocessor_config.json", ears)
    assert "as processor in the pool" in refusal(pool(speech, SPEECH))
    assert load_pipeline(pool(speech, SPEECH, processor=str(ears))).feature_extractor.sampling_rate == 16_000


def test_a_part_that_the_task_does_not_use_is_refused(folder: Path) -> None:
    assert "uses no processor" in refusal(pool(folder, processor=str(folder)))
    pictures = cached("image-classification")
    assert "name a processor in the pool instead" in refusal(
        pool(pictures, "image-classification", tokenizer=str(folder))
    )


def test_a_device_that_is_not_there_is_told(folder: Path) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    assert f"there is no device {missing}, torch sees" in refusal(pool(folder, device=missing))


def test_a_model_that_makes_spectrograms_brings_its_vocoder(tmp_path: Path) -> None:
    speaker = speech_t5(tmp_path)
    assert "brings no vocoder; save one as safetensors into its folder vocoder" in refusal(
        pool(speaker, "text-to-audio")
    )
    sizes = {"upsample_initial_channel": 16, "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8]}
    small = {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]], "model_in_dim": 80}
    transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**sizes, **small)).save_pretrained(
        speaker / "vocoder"
    )
    pipe = load_pipeline(pool(speaker, "text-to-audio"))
    voice = {"speaker_embeddings": torch.zeros(1, 16), "maxlenratio": 2.0}
    assert pipe("yes", forward_params=voice)["audio"].ndim == 1


def speech_t5(folder: Path) -> Path:
    vits = cached("text-to-audio")
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in {"layers": 1, "ffn_dim": 32, "attention_heads": 2}.items()}  # fmt: skip
    config = transformers.SpeechT5Config(
        vocab_size=64, hidden_size=16, speech_decoder_prenet_units=16, speech_decoder_postnet_units=16,
        speaker_embedding_dim=16, encoder_layerdrop=0.0, decoder_layerdrop=0.0, **sizes,
    )  # fmt: skip
    transformers.SpeechT5ForTextToSpeech(config).save_pretrained(folder / "speaker")
    for file in vits.glob("*token*"):
        shutil.copy(file, folder / "speaker")
    shutil.copy(vits / "vocab.json", folder / "speaker")
    return folder / "speaker"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 85 MB in small shards."""
    folder = tmp_path_factory.mktemp("large")
    tokenizer = chat_tokenizer(512)
    config = llama_config(tokenizer)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 64}
    for name, value in {**sizes, "num_attention_heads": 8, "num_key_value_heads": 8}.items():
        setattr(config, name, value)
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20MB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("bound", "places"), [("30MB", {"cpu", "disk"}), ("1MB", {"disk"}), ("4GB", set())])
def test_a_model_above_the_memory_limit_answers_as_the_whole_one(large: Path, bound: str, places: set[str]) -> None:
    whole = load_pipeline(pool(large, "text-generation"))
    bounded = pool(large, "text-generation", device_map="auto", max_memory={"cpu": bound})
    spread = load_pipeline(bounded)
    device_map = getattr(spread.model, "hf_device_map", {})
    assert {str(place) for module, place in device_map.items() if module != "inputs"} == places
    call = {"do_sample": False, "max_new_tokens": 6}
    assert spread(TEXT, **call) == whole(TEXT, **call)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(spread.model(ids).logits, whole.model(ids).logits)


def peak() -> float:
    """The most memory that was resident since `/proc/self/clear_refs` was written, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not measure peaks anew")
def test_loading_takes_no_second_copy_and_offloading_stays_below_its_bound(large: Path) -> None:
    size = sum(file.stat().st_size for file in large.glob("*.safetensors")) / 2**20
    grown: dict[str, float] = {}
    for name, extra in (("offloaded", {"device_map": "auto", "max_memory": {"cpu": "20MB"}}), ("whole", {})):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        pipe = load_pipeline(pool(large, "text-generation", **extra))
        grown[f"loading {name}"] = peak() - before
        pipe(TEXT, do_sample=False, max_new_tokens=2)
        grown[name] = peak() - before
        del pipe
    assert grown["loading whole"] < 0.5 * size, "the weights are mapped, not copied"
    assert grown["whole"] > 0.9 * size, "else the measure shows nothing"
    assert grown["offloaded"] < 0.6 * size, grown
