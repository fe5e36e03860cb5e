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
from pipefleet.fleet.devices import Devices, number_of

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
    """One pool of workers, which pin `model` and serve `task`."""

    name: str
    task: str
    model: str
    revision: str | None = None
    default: bool = False
    tokenizer: str | None = None
    device: str = "auto"
    device_map: str | None = None
    dtype: str = "auto"
    """`auto` is the dtype of the checkpoint, on every device, as in transformers.pipeline."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    max_batch_cost: int | None = None
    """Padded cost of a batch; None measures it at warm-up."""
    max_batch_items: int = 64
    workers: WorkerRange = field(default_factory=WorkerRange)
    wait_slo: float = 600.0
    """Seconds that a job may wait before the pool counts as too small."""
    trust_remote_code: bool = False
    processor: str | None = None
    """The processor of recordings and pictures, if it does not lie beside the model. `tokenizer` is the same for texts."""
    max_memory: Mapping[str, str] = field(default_factory=dict)
    """With `device_map`: the memory, such as "20GiB", that it may use of each GPU (by number) and of the host (`cpu`). The rest of
    the weights goes to disk."""
    offload_folder: str | None = None
    """With `device_map`: the folder for the rest of the weights; None for a folder in the cache."""
    compile: bool = False
    """Whether torch.compile compiles the model before the first job; for models that answer in one forward."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """`method` and fields of its class in transformers (see `fleet.loading.METHODS`). An empty table changes no weights."""
    attn_implementation: str | None = None
    """One of `fleet.loading.ATTENTIONS`; None leaves the choice to transformers."""
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `from_pretrained`: those of `OF_THE_CONFIG` and `OF_THE_WEIGHTS` in `fleet.loading`."""
    previous: tuple[Pool, ...] = ()
    """The revisions that are being retired, newest first. They serve jobs that name them, and no others."""
    generation: int = 0
    """0 for the revision of new work, 1 and more for those in `previous`."""
    queue: str | None = None
    """The queue that a worker announces for its pool; None if the fleet file decides (see `fleet.routing`)."""
    revision_queue: str | None = None
    """The queue that a worker announces for its revision; None as above."""
    devices: Devices | None = None
    """The devices of each host that get workers; None for one worker, on `device`."""
    workers_per_device: int = 1

    @classmethod
    def announced(cls, name: str, content: Mapping[str, Any]) -> Pool:
        """The pool that a worker announces. Unknown fields, of a later version, are passed over.

        Raises TypeError for an entry without a task or a model.
        """
        known = {one.name for one in fields(cls)} - {"name", "previous", "generation"}
        generation = 1 if content.get("retired") else 0
        return cls(name=name, generation=generation, **{key: one for key, one in content.items() if key in known})

    @property
    def key(self) -> str:
        """The name of the pool. A retired revision has `@previous` (or `@previous-2`, …) behind it."""
        number = "" if self.generation < 2 else f"-{self.generation}"
        return f"{self.name}@previous{number}" if self.generation else self.name

    @property
    def workers_per_host(self) -> int | None:
        """How many workers one host, container or pod has; None for `devices = "all"`, whose number only the host knows."""
        number = 1 if self.devices is None else number_of(self.devices)
        return None if number is None else number * self.workers_per_device

    def serves(self, task: str, model: str, revision: str | None) -> bool:
        """Whether a job for this model goes to this pool. A job without a revision takes any revision."""
        return (self.task, self.model) == (task, model) and revision in (None, self.revision)

    @property
    def is_hub(self) -> bool:
        """True if `model` is a name on the hub, not a folder or an s3:// prefix."""
        return is_hub_name(self.model)

    def to_json(self) -> dict[str, Any]:
        """The fields that a worker announces of its pool. With its queue they suffice for routing."""
        return {"task": self.task, "model": self.model, "revision": self.revision, "default": self.default}


def pinned(name: str) -> tuple[str, str | None]:
    """Name and revision of a tokenizer or processor of the form `org/name@revision`; folders and prefixes have no revision."""
    if not is_hub_name(name):
        return name, None
    plain, _, revision = name.partition("@")
    return plain, revision or None


def is_hub_name(name: str) -> bool:
    """True for a name on the hub; False for a folder or an s3:// prefix."""
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
        """The pool of this name, or the retired revision of this key. Raises FleetFileError, which names the nearest one."""
        revisions = self.revisions
        if name not in revisions:
            known = ", ".join(sorted(revisions)) or "none"
            raise FleetFileError(f"the fleet has no pool {name!r}{nearest(name, revisions)}; its pools: {known}")
        return revisions[name]

    def default_pool(self, task: str) -> Pool:
        """The pool that serves `task` for calls without a model. Raises UnknownModelError if there is none."""
        serving = [pool for pool in self.pools.values() if pool.task == task and not pool.generation]
        chosen = next((pool for pool in serving if pool.default or len(serving) == 1), None)
        if chosen is None:
            raise UnknownModelError(f"no pool of the fleet serves {task}; {self._served()}")
        return chosen

    def find(self, task: str, model: str, revision: str | None) -> Pool:
        """The pool that serves `model` for `task`. Raises UnknownModelError, which lists the served models."""
        found = [pool for pool in self.revisions.values() if pool.serves(task, model, revision)]
        if found:  # the default pool first, as for a call that names no model; a retired pool comes last
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
    """`model@revision`, or the model alone if it has no revision."""
    return f"{model}@{revision}" if revision else model
