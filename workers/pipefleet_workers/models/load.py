"""Loads a pool's model: from the hub by name and revision, from a folder, or from an `s3://` prefix. Safetensors only.

    config → architecture that suits the task → weights, all of them → pipeline

`build` calls `load_pipeline`. transformers would serve a model of another task, or a model whose head is not in the checkpoint,
after a warning; both raise ModelError here.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipefleet.errors import PipefleetError, UsageError
from pipefleet.fleet.pools import Pool, pinned
from pipefleet_workers.models.cache import ModelError, cache_folder, downloaded_model, require_safetensors
from pipefleet_workers.models.errors import explained, said
from pipefleet_workers.models.precision import config_arguments, in_dtype, loading, warn_of_half

__all__ = ["ModelError", "load_pipeline", "local_model", "require_folder"]

log = logging.getLogger(__name__)
_UNREAD = ("masked_spec_embed",)
"""Weights that only training reads."""
_BARE = {"▁"}
"""The tokens of a tokenizer of SentencePiece's kind that was made from nothing."""
_POOLER = "pooler."
_FEATURES = ("feature-extraction", "image-feature-extraction")
"""Tasks that read the tokens of a model, and its pooler only if a request asks for it."""


def load_pipeline(pool: Pool, *, device: str | None = None) -> Any:
    """The transformers pipeline of a pool, in evaluation mode, on its device.

    Raises ModelError, and the errors of the object store.
    """
    from pipefleet_workers.adapters.table import RUNTIME

    task, chosen = RUNTIME[pool.task].transformers_task or pool.task, device or pool.device
    try:
        chosen = _device(chosen)
        require_folder(pool)
        source = local_model(pool.model)
        if Path(source).is_dir():
            require_safetensors(source, [path.name for path in Path(source).iterdir()])
        pipe = _pipeline(pool, source, task, _model(pool, source, task, chosen), chosen)
    except PipefleetError as error:
        if error.retryable:
            raise
        raise ModelError(f"pool {pool.name}: {error}") from None
    except Exception as error:
        raise ModelError(explained(pool, chosen, error)) from error
    pipe.model.eval()
    warn_of_half(pool, pipe)
    return pipe


def local_model(model: str) -> str:
    """A folder for an `s3://` model, downloaded once for each version; any other name unchanged."""
    return str(downloaded_model(model)) if model.startswith("s3://") else model


def require_folder(pool: Pool) -> None:
    """Raise UsageError when a pool names a folder that does not exist."""
    if pool.model.startswith(("/", ".", "~")) and not Path(pool.model).is_dir():
        raise UsageError(f"there is no model folder {pool.model}; check the pool {pool.name}")


def _device(wanted: str) -> str:
    import torch

    count = torch.cuda.device_count()
    if wanted == "auto":
        return "cuda:0" if count else "cpu"
    if wanted.startswith("cuda") and int(wanted.partition(":")[2] or 0) >= count:
        raise ModelError(f"there is no device {wanted}, torch sees {count} GPUs; name another, or auto")
    return wanted


def _model(pool: Pool, source: str, task: str, device: str) -> Any:
    """The model with all its weights; with a device map, on the devices of the map."""
    hub = {"revision": pool.revision, "trust_remote_code": pool.trust_remote_code}
    config = _config(pool, source, hub)
    architecture = _architecture(pool, task, config)
    safe = {"use_safetensors": True, "weights_only": True}
    further = {**_placement(pool), **loading(pool, config, _concrete(architecture, config), device), **safe}
    model, report = in_dtype(
        pool,
        lambda dtype: architecture.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **hub, **further
        ),
    )
    _require_weights(pool, model, report)
    return model


def _config(pool: Pool, source: str, hub: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, __version__

    content, _ = PretrainedConfig.get_config_dict(source, revision=pool.revision)
    if content == {}:
        raise ModelError(f"{pool.model} has no config.json; name the folder that save_pretrained wrote")
    if not isinstance(content, dict):
        raise ModelError(f"the config.json of {pool.model} holds no object; copy the model again")
    kind, own = str(content.get("model_type")), "auto_map" in content or bool(content.get("custom_pipelines"))
    if own and not pool.trust_remote_code and (kind not in CONFIG_MAPPING or content.get("custom_pipelines")):
        raise ModelError(
            f"{pool.model} brings code of its own, which is not run; use a model that transformers knows, or set "
            "trust_remote_code = true for this pool if you have read that code"
        )
    if content.get("model_type") is None and not own:
        raise ModelError(
            f"the config.json of {pool.model} names no model_type; name the folder that save_pretrained wrote"
        )
    if kind not in CONFIG_MAPPING and not own:
        raise ModelError(f"{pool.model} is of the type {kind!r}, which transformers {__version__} does not know")
    wanted = config_arguments(pool)
    config, unused = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **hub, **wanted)
    if unknown := sorted(unused.keys() & wanted.keys()):
        raise ModelError(f"{pool.model} is a {kind}, whose config has no {unknown[0]}; take it out of model_kwargs")
    return config


def _concrete(architecture: Any, config: Any) -> Any:
    """The model's own class, found through an auto class."""
    mapping = getattr(architecture, "_model_mapping", None)
    found = architecture if mapping is None or type(config) not in mapping else mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _architecture(pool: Pool, task: str, config: Any) -> Any:
    """The class to load with: the task's own class for this config, else the class that the checkpoint was saved with."""
    import transformers
    from transformers.pipelines import check_task

    try:
        classes = check_task(task)[1]["pt"]
    except KeyError:
        raise ModelError(f"transformers {transformers.__version__} has no task {task}; install a newer one") from None
    if task == "decision" and type(config) in transformers.MODEL_FOR_DECISION_MAPPING:
        return transformers.MODEL_FOR_DECISION_MAPPING[type(config)]
    remote = getattr(config, "auto_map", None) or {} if pool.trust_remote_code else {}
    for one in classes:
        if type(config) in one._model_mapping or one.__name__ in remote:
            return one
    saved = (getattr(transformers, name, None) for name in config.architectures or ())
    found = next((one for one in saved if one is not None), None)
    if found is None:
        raise _wrong_task(pool, str(config.model_type))
    return found  # a few pipelines take models that their task does not list; `_pipeline` checks this


def _wrong_task(pool: Pool, model: str) -> ModelError:
    return ModelError(
        f"{pool.model} is a {model}, which cannot do {pool.task}; name its task in the pool, or another model"
    )


def _placement(pool: Pool) -> dict[str, Any]:
    """Arguments that spread a model over devices, the host's memory and the disk."""
    if not pool.device_map:
        return {}
    folder = Path(pool.offload_folder) if pool.offload_folder else cache_folder() / "offload" / pool.name
    folder.mkdir(parents=True, exist_ok=True)
    bounds = {int(name) if name.isdigit() else name: size for name, size in pool.max_memory.items()}
    return {"device_map": pool.device_map, "offload_folder": str(folder), **({"max_memory": bounds} if bounds else {})}


def _require_weights(pool: Pool, model: Any, report: Mapping[str, Any]) -> None:
    """Raise ModelError if transformers made up weights that results depend on, because the checkpoint does not hold them."""
    missing = sorted(name for name in report["missing_keys"] if not name.endswith(_UNREAD))
    if pool.task in _FEATURES and any(_POOLER in name for name in missing):
        missing = [name for name in missing if _POOLER not in name]
        log.warning("%s holds no pooler: its tokens are right, what a pooler makes of them is not", pool.model)
    if missing:
        raise ModelError(
            f"{pool.model} holds no weights for {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''} of "
            f"{type(model).__name__}; it was not trained for {pool.task}, or files are missing"
        )


def _pipeline(pool: Pool, source: str, task: str, model: Any, device: str) -> Any:
    implementation = _strict(pool, task)
    placed = {"device": model.device if pool.device_map else device}
    if getattr(model, "hf_device_map", None):  # absent if everything fits on one device
        placed, model.hf_device_map = {}, _main_first(model.hf_device_map)
    _require_known(pool, task, implementation, model)
    parts = {**_parts(pool, source, implementation), **_vocoder(pool, source, model)}
    return implementation(model=model, task=task, **placed, **parts)


def _require_known(pool: Pool, task: str, implementation: Any, model: Any) -> None:
    """Raise ModelError for a model of another task if the pipeline itself accepts any model."""
    from transformers.pipelines import check_task

    if pool.trust_remote_code or _asks(implementation):
        return
    if not any(type(model.config) in one._model_mapping for one in check_task(task)[1]["pt"]):
        raise _wrong_task(pool, type(model).__name__)


def _asks(implementation: Any) -> bool:
    """Whether a pipeline class checks its model. A class that checks it does so in its `__init__`."""
    made = [vars(one)["__init__"] for one in implementation.__mro__ if "__init__" in vars(one) and one is not object]
    return any("check_model_type" in one.__code__.co_names for one in made)


def _strict(pool: Pool, task: str) -> Any:
    """The task's pipeline class, changed to raise an error for an unsupported model instead of logging a line."""
    from transformers.pipelines import check_task

    def refuse(self: Any, supported: Any) -> None:
        names = supported if isinstance(supported, list) else _class_names(supported)
        if type(self.model).__name__ not in names and not pool.trust_remote_code:
            raise _wrong_task(pool, type(self.model).__name__)

    implementation = check_task(task)[1]["impl"]
    if isinstance(implementation, str):
        module, _, name = implementation.rpartition(".")
        implementation = getattr(importlib.import_module(module), name)
    return type(implementation.__name__, (implementation,), {"check_model_type": refuse})


def _class_names(supported: Mapping[Any, Any]) -> set[str]:
    """Names of classes in one of transformers' mappings from configs, or from their types."""
    found: set[str] = set()
    for one in supported.values():
        names = one if isinstance(one, tuple | list) else (one,)
        found |= {name if isinstance(name, str) else name.__name__ for name in names}
    return found


def _main_first(device_map: Mapping[str, Any]) -> dict[str, Any]:
    """A device map whose first entry is the device for inputs: the pipeline reads only the first entry."""
    order = {"cpu": 1, "disk": 2}
    ordered = dict(sorted(device_map.items(), key=lambda entry: order.get(str(entry[1]), 0)))
    first = next(iter(ordered.values()), "cpu")
    return {"inputs": "cpu", **ordered} if first == "disk" else ordered


def _parts(pool: Pool, source: str, implementation: Any) -> dict[str, Any]:
    """Tokenizer and processors that the pipeline needs: from the model's folder, or as the pool names them."""
    import transformers

    # By their modules: at the top of older versions, stand-ins that ask for torchvision have the same names.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    loaders = {
        "tokenizer": (pool.tokenizer, transformers.AutoTokenizer),
        "feature_extractor": (pool.processor, transformers.AutoFeatureExtractor),
        "image_processor": (pool.processor, AutoImageProcessor),
        "video_processor": (pool.processor, AutoVideoProcessor),
        "processor": (pool.processor, transformers.AutoProcessor),
    }
    found: dict[str, Any] = {}
    for part, (name, loader) in loaders.items():
        wanted = getattr(implementation, f"_load_{part}")  # None if the pipeline works without this part
        if wanted is not False:
            place, revision = _pinned_source(pool, name) if name else (source, pool.revision)
            with _required(pool, part, place) if wanted else contextlib.suppress(Exception):
                one = loader.from_pretrained(place, revision=revision, trust_remote_code=pool.trust_remote_code)
                if part == "tokenizer" and set(one.get_vocab()) - set(one.all_special_tokens) <= _BARE:
                    raise ValueError("made without any vocabulary, since the folder holds none")
                if part != "processor" or isinstance(one, transformers.ProcessorMixin):
                    found[part] = one
    if pool.tokenizer and "tokenizer" not in found:
        raise ModelError(f"{pool.task} takes its tokenizer from a processor; name a processor in the pool instead")
    if pool.processor and not set(found) - {"tokenizer"}:
        raise ModelError(f"{pool.task} uses no processor; leave it out of the pool")
    return found


@contextlib.contextmanager
def _required(pool: Pool, part: str, place: str) -> Iterator[None]:
    """Raise ModelError if a folder lacks a part, or if the part is damaged. Errors of a part from the hub pass unchanged."""
    try:
        yield
    except Exception as error:
        if not Path(place).is_dir() or isinstance(error, ImportError) or "trust_remote_code" in str(error):
            raise
        words = part.replace("_", " ")
        if not isinstance(error, OSError | ValueError) or "JSON" in f"{type(error).__name__} {error}":
            raise ModelError(f"the {words} in {place} cannot be read ({said(error)}); copy the model again") from error
        key = "tokenizer" if part == "tokenizer" else "processor"
        raise ModelError(
            f"{place} holds no {words}, which {pool.task} needs; name a model for this task, or the folder of its {words} "
            f"as {key} in the pool"
        ) from None


def _pinned_source(pool: Pool, name: str) -> tuple[str, str | None]:
    """The place of a part, and its revision: the revision of the model if the part lies in the model's repository, else its own."""
    source, revision = pinned(name)
    return local_model(source), pool.revision if source == pool.model else revision


def _vocoder(pool: Pool, source: str, model: Any) -> dict[str, Any]:
    """The vocoder, which turns a model's spectrogram into sound, from the model's folder `vocoder`.

    transformers alone would take one from the hub, in any version and as pickle.
    """
    from transformers import SpeechT5HifiGan
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES

    if pool.task != "text-to-audio" or type(model).__name__ not in MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES.values():
        return {}
    try:
        vocoder = SpeechT5HifiGan.from_pretrained(
            source, subfolder="vocoder", revision=pool.revision, use_safetensors=True, dtype=model.dtype
        )
    except OSError:
        raise ModelError(
            f"{pool.model} makes spectrograms and brings no vocoder; save one as safetensors into its folder vocoder"
        ) from None
    return {"vocoder": vocoder.eval().to(model.device)}
