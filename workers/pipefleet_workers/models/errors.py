"""Turns any error of transformers, huggingface_hub, safetensors or torch during loading into one sentence.

`load` passes the pool, the device and the error to `explained`, and raises the sentence as ModelError. Nothing is raised here; the
traceback of an unknown error goes to the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pipefleet.fleet.loading import OF_THE_CONFIG
from pipefleet.fleet.pools import Pool

log = logging.getLogger(__name__)
_TOKEN = "set HF_TOKEN to a token that may read it"
_HUB = {
    "GatedRepoError": f"it is gated: accept its terms on the hub, and {_TOKEN}",
    "RevisionNotFoundError": "it has no such revision; check the pool's revision",
    "RepositoryNotFoundError": f"there is no such repository, or it is private: check the name, or {_TOKEN}",
    "LocalEntryNotFoundError": "it is not in the cache and the hub cannot be reached; check the network, or name a folder",
    "OfflineModeIsEnabled": "it is not in the cache and HF_HUB_OFFLINE forbids to fetch it; unset that, or name a folder",
}
"""By class of huggingface_hub. Special classes come first: a gated repository is also a repository that was not found."""
_WORDS = {
    "trust_remote_code": "it brings code of its own, which is not run; use a model that transformers knows, or set "
    "trust_remote_code = true for this pool if you have read that code",
    "model.safetensors": "it has no weights as safetensors, and other forms can run code while they load; convert them "
    "(load and save_pretrained them where you trust them), into model.safetensors or shards with their index",
    "ignore_mismatched_sizes": "the sizes that its config names are not those of its weights; take those that differ out of "
    "model_kwargs, or copy the model again",
    "out of memory": 'its weights do not fit there; choose a smaller dtype, or device_map = "auto"',
    "couldn't connect to": _HUB["LocalEntryNotFoundError"],
    "offload": "it does not fit within max_memory and could not be offloaded; raise max_memory, or name an offload_folder",
}


_BARE = (KeyError, AttributeError, TypeError, IndexError, AssertionError, ArithmeticError, RecursionError)
"""Errors of Python if transformers relies on a wrong value of a file or of the pool. Their texts name no cause."""


def explained(pool: Pool, device: str, error: Exception) -> str:
    """One sentence: the model, its error, and the next step. No traceback; at most 300 characters of foreign text.

    The traceback of an error without a sentence of its own goes to the log.
    """
    model = f"{pool.model}@{pool.revision}" if pool.revision else pool.model
    reason = _known_reason(error)
    if reason is None:
        log.info("pool %s: loading %s failed so", pool.name, model, exc_info=error)
        reason = _values(pool, error) if isinstance(error, _BARE) else said(error)
    return f"pool {pool.name}: cannot load {model} for {pool.task} on {device}: {reason}"


def said(error: BaseException) -> str:
    """The class of an error and its first line that is not blank, at most 300 characters. A colon at its end adds the next line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _known_reason(error: Exception) -> str | None:
    causes = list(_chain(error))
    for name, sentence in _HUB.items():
        if any(name in [kind.__name__ for kind in type(one).__mro__] for one in causes):
            return sentence
    if any(type(one).__name__ == "SafetensorError" for one in causes):
        return "a file of its weights is damaged or cut short; copy it again"
    if any(type(one).__name__ == "JSONDecodeError" for one in causes):
        return f"one of its files should be JSON and is not ({said(error)}); copy it again"
    return next((sentence for words, sentence in _WORDS.items() if any(words in str(one) for one in causes)), None)


def _values(pool: Pool, error: Exception) -> str:
    """The values that may be to blame: the values that the pool lays over config.json, else the values of that file."""
    own = " and ".join(sorted(pool.model_kwargs.keys() & OF_THE_CONFIG.keys()))
    if own:
        return f"transformers cannot use {own} of model_kwargs ({said(error)}); correct it, or take it out"
    return f"transformers cannot use a value in its config.json or another of its files ({said(error)}); copy it again"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
