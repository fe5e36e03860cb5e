"""The fleet: which pool of workers serves which task with which model, and which of them a job is for. Pure.

A Fleet comes from `fleet.toml` (see `file`) or from what workers announce (see `announcements`). Lookups raise UnknownModelError,
or FleetFileError for the name of a pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pipefleet.errors import FleetFileError, UnknownModelError, nearest

MOST_PREVIOUS = 3
"""Retired revisions of a pool."""
UNNAMED = MOST_PREVIOUS + 1
"""`Pool.generation` of a revision that no fleet file names: behind all that one may name."""


@dataclass(frozen=True, slots=True)
class WorkerRange:
    """How many workers a pool may have: at least `min`, at most `max`."""

    min: int = 0
    max: int = 1


@dataclass(frozen=True, slots=True)
class Pool:
    """One pool of workers: they pin `model` and serve `task`."""

    name: str
    task: str
    model: str
    revision: str | None = None
    default: bool = False
    tokenizer: str | None = None
    device: str = "auto"
    device_map: str | None = None
    dtype: str = "auto"
    """`auto` is that of the checkpoint, on every device, as transformers.pipeline takes it."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    max_batch_cost: int | None = None
    """Padded cost of a batch; None measures it at warm-up."""
    max_batch_items: int = 64
    workers: WorkerRange = field(default_factory=WorkerRange)
    wait_slo: float = 600.0
    """Seconds that a job may wait before the pool counts as too small."""
    trust_remote_code: bool = False
    processor: str | None = None
    """What makes inputs of recordings and pictures, where it does not lie beside the model; `tokenizer` does so for texts."""
    max_memory: Mapping[str, str] = field(default_factory=dict)
    """With `device_map`: what it may use of each GPU, by its number, and of the host, as `cpu`: "20GiB". The disk has the rest."""
    offload_folder: str | None = None
    """With `device_map`: where the rest of the weights lies; None for a folder in the cache."""
    compile: bool = False
    """Whether the model goes through torch.compile before the first job; for models that answer in one forward."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """`method` and the fields of its class in transformers (see `loading.METHODS`); empty leaves the weights as they are."""
    attn_implementation: str | None = None
    """One of `loading.ATTENTIONS`; None leaves the choice to transformers."""
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `from_pretrained`: those of `loading.OF_THE_CONFIG` and `loading.OF_THE_WEIGHTS`."""
    previous: tuple[Pool, ...] = ()
    """The revisions that are being retired, newest first: served where a job names them, never by default."""
    generation: int = 0
    """0 for the revision that new work goes to, 1 and more for those in `previous`."""
    queue: str | None = None
    """The queue that a worker announces for its pool; None where the fleet file decides (see `routing`)."""
    revision_queue: str | None = None
    """The same for its revision."""

    @classmethod
    def announced(cls, name: str, content: Mapping[str, Any]) -> Pool:
        """The pool that a worker announces. What a later version announces besides is passed over.

        Raises TypeError for an entry without a task or a model.
        """
        known = {one.name for one in fields(cls)} - {"name", "previous", "generation"}
        generation = 1 if content.get("retired") else 0
        return cls(name=name, generation=generation, **{key: one for key, one in content.items() if key in known})

    @property
    def key(self) -> str:
        """The name of the pool, for a retired revision with `@previous` (or `@previous-2`, …) behind it."""
        number = "" if self.generation < 2 else f"-{self.generation}"
        return f"{self.name}@previous{number}" if self.generation else self.name

    def serves(self, task: str, model: str, revision: str | None) -> bool:
        """Whether a job that wants this model is for this pool; one that names no revision takes any."""
        return (self.task, self.model) == (task, model) and revision in (None, self.revision)

    @property
    def is_hub(self) -> bool:
        """True when `model` is a name on the hub rather than a folder or an s3:// prefix."""
        return is_hub_name(self.model)

    def to_json(self) -> dict[str, Any]:
        """What a worker announces of its pool; with the name of its queue, enough to route by."""
        return {"task": self.task, "model": self.model, "revision": self.revision, "default": self.default}


def pinned(name: str) -> tuple[str, str | None]:
    """Name and revision of a tokenizer or processor given as `org/name@revision`; folders and prefixes have none."""
    if not is_hub_name(name):
        return name, None
    plain, _, revision = name.partition("@")
    return plain, revision or None


def is_hub_name(name: str) -> bool:
    """True for a name on the hub rather than a folder or an s3:// prefix."""
    return not (name.startswith(("s3://", "/", ".", "~")) or Path(name).is_dir())


@dataclass(frozen=True, slots=True)
class Fleet:
    """Every pool by name."""

    pools: Mapping[str, Pool]

    @property
    def revisions(self) -> dict[str, Pool]:
        """Every revision of every pool, by `Pool.key`."""
        return {one.key: one for pool in self.pools.values() for one in (pool, *pool.previous)}

    def pool(self, name: str) -> Pool:
        """The pool of this name, or the retired revision of this key. Raises FleetFileError with the nearest one."""
        revisions = self.revisions
        if name not in revisions:
            known = ", ".join(sorted(revisions)) or "none"
            raise FleetFileError(f"the fleet has no pool {name!r}{nearest(name, revisions)}; its pools: {known}")
        return revisions[name]

    def default_pool(self, task: str) -> Pool:
        """The pool that serves `task` when no model is named. Raises UnknownModelError where there is none."""
        serving = [pool for pool in self.pools.values() if pool.task == task and not pool.generation]
        chosen = next((pool for pool in serving if pool.default or len(serving) == 1), None)
        if chosen is None:
            raise UnknownModelError(f"no pool of the fleet serves {task}; {self._served()}")
        return chosen

    def find(self, task: str, model: str, revision: str | None) -> Pool:
        """The pool that serves `model` for `task`. Raises UnknownModelError that lists what is served."""
        found = [pool for pool in self.revisions.values() if pool.serves(task, model, revision)]
        if (
            found
        ):  # the first of the foremost: the default pool, as for a call that names no model; retired ones come last
            return max(found, key=lambda pool: (not pool.generation, pool.default))
        wanted = model + (f"@{revision}" if revision else "")
        raise UnknownModelError(f"no pool of the fleet serves {wanted} for {task}; {self._served()}")

    def idle_pools(self) -> dict[str, str]:
        """By name why a pool gets no job of any client: a job names a task, a model and a revision, and another pool has these."""
        found: dict[str, str] = {}
        for name, pool in self.pools.items():
            taken = self.find(pool.task, pool.model, pool.revision).name
            if taken != name and not pool.default:
                label = model_label(pool.model, pool.revision)
                found[name] = (
                    f"pool {name} gets no jobs: those for {label} go to the pool {taken}, which serves it for {pool.task} too; "
                    "take one of the two out, or copy the model into another folder for the second"
                )
        return found

    def _served(self) -> str:
        served = ", ".join(f"{p.task}: {model_label(p.model, p.revision)}" for p in self.revisions.values())
        return f"served are: {served}" if served else "no pool is served at all: is a worker running?"


def model_label(model: str, revision: str | None) -> str:
    """`model@revision`, or the model alone where it needs no revision."""
    return f"{model}@{revision}" if revision else model
