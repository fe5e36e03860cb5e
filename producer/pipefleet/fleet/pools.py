"""`fleet.toml`, the description of the fleet: each pool of workers serves one task with one model.

The file comes in; a `Fleet` of `Pool`s goes out. Producers, `pipefleet up`, the workers and the scaler read it. FleetFileError
names a wrong key and the nearest right one. A model by hub name needs a revision, so that a fleet cannot change under its users.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipefleet.contract.messages import MAX_NAME, is_name
from pipefleet.errors import FleetFileError, UnknownModelError, UsageError, nearest
from pipefleet.fleet.loading import DTYPES, checked_attention, checked_model_kwargs, checked_quantization, misplaced
from pipefleet.foreign import MOST_NUMBER
from pipefleet.tasks import implied_parameters, task_spec

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?")
_MEMORY = re.compile(r"\d+(\.\d+)?[KMG]i?B")
_NAME_RULE = (
    f"a text of 1 to {MAX_NAME} characters without control characters and line breaks, since every job names it"
)
_OF_A_REVISION = {
    "model", "revision", "tokenizer", "processor", "parameters", "dtype", "quantization", "attn_implementation", "model_kwargs",
}  # fmt: skip
_MOST_PREVIOUS = 3
UNNAMED = _MOST_PREVIOUS + 1
"""The `Pool.generation` of a revision that no fleet file names: higher than any that a file can name."""


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


def with_revision(pool: Pool, model: str, revision: str | None, *, allow_unpinned: bool = False) -> Pool:
    """The revision of a pool for a worker that is started by hand. A revision that the fleet file lacks counts as retired.

    Raises FleetFileError for a hub model without a revision.
    """
    model = _resolve(model, Path.cwd())
    for option, name in (("--model", model), ("--revision", revision)):
        _require(name is None or is_name(name), option, "", _NAME_RULE)
    for one in (pool, *pool.previous):
        if one.serves(one.task, model, revision):
            return one
    if is_hub_name(model) and revision is None and not allow_unpinned:
        raise FleetFileError(f"model {model!r} has no revision; name one with --revision, or pass --allow-unpinned")
    return replace(pool, model=model, revision=revision, generation=len(pool.previous) + 1)


def model_label(model: str, revision: str | None) -> str:
    """`model@revision`, or the model alone if it has no revision."""
    return f"{model}@{revision}" if revision else model


def load_fleet(path: Path, *, allow_unpinned: bool = False) -> Fleet:
    """Read the fleet file `path`. Relative paths of models and tokenizers are relative to the file.

    Raises FleetFileError: file missing, not TOML, unknown key, value out of range, unpinned model.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FleetFileError(f"there is no fleet file {path}; name one with --fleet or PIPEFLEET_FLEET") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FleetFileError(f"cannot read the fleet file {path}: {error}") from None
    try:
        return parse_fleet(content, base=path.resolve().parent, allow_unpinned=allow_unpinned)
    except FleetFileError as error:
        raise FleetFileError(f"{path}: {error}") from None


def parse_fleet(content: Mapping[str, Any], *, base: Path, allow_unpinned: bool = False) -> Fleet:
    """A Fleet from the parsed TOML. Raises FleetFileError."""
    _known_keys("the file", content, {"pools"})
    tables = content.get("pools")
    if not isinstance(tables, Mapping) or not tables:
        raise FleetFileError("it describes no pool; add a table [pools.NAME] with task and model")
    pools = {name: _parse_pool(name, table, base) for name, table in tables.items()}
    for pool in Fleet(pools).revisions.values():
        if pool.is_hub and not pool.revision and not allow_unpinned:
            raise FleetFileError(
                f"pools.{pool.key}: model {pool.model!r} has no revision; pin one (a commit hash), name a folder that "
                "exists, or pass --allow-unpinned"
            )
        if not allow_unpinned:
            _check_parts(pool)
    _check_defaults(pools)
    return Fleet(pools)


def _check_parts(pool: Pool) -> None:
    """Raise FleetFileError for a tokenizer or processor of another repository on the hub without its own revision."""
    for key, name in (("tokenizer", pool.tokenizer), ("processor", pool.processor)):
        if name and name != pool.model and is_hub_name(name) and pinned(name)[1] is None:
            raise FleetFileError(f"pools.{pool.name}: {key} {name!r} has no revision; write it as {name}@REVISION")


def _check_defaults(pools: Mapping[str, Pool]) -> None:
    for task in {pool.task for pool in pools.values()}:
        serving = [pool for pool in pools.values() if pool.task == task]
        defaults = [pool.name for pool in serving if pool.default]
        names = ", ".join(sorted(pool.name for pool in serving))
        if len(defaults) > 1:
            raise FleetFileError(f"pools {', '.join(sorted(defaults))} are all the default of {task}; keep one")
        if len(serving) > 1 and not defaults:
            raise FleetFileError(f"pools {names} all serve {task}; mark one of them with default = true")


def _parse_pool(name: str, table: Any, base: Path) -> Pool:
    where = f"pools.{name}"
    if not _NAME.fullmatch(name):
        raise FleetFileError(f"{where}: a pool's name has 1 to 63 of a-z, 0-9 and '-'")
    if not isinstance(table, Mapping):
        raise FleetFileError(f"{where} must be a table")
    known = {one.name for one in fields(Pool)} - {"name", "generation", "queue", "revision_queue"}
    for key in sorted(table.keys() - known):
        if hint := misplaced(key):
            raise FleetFileError(f"{where} has no key {key!r}: {hint}")
    _known_keys(where, table, known)
    for required in ("task", "model"):
        if required not in table:
            raise FleetFileError(f"{where} lacks {required}")
    values = {key: _value(where, key, value) for key, value in table.items()}
    try:
        spec = task_spec(values["task"])
        spec.check(values.get("parameters", {}))
    except UsageError as error:
        raise FleetFileError(f"{where}: {error}") from None
    values["parameters"] = {**implied_parameters(values["task"]), **values.get("parameters", {})}
    values["task"] = spec.name
    for key in ("model", "tokenizer", "processor", "offload_folder"):
        if key in values:
            values[key] = _resolve(values[key], base)
    _require(is_name(values["model"]), where, "model", _NAME_RULE)
    for key in ("max_memory", "offload_folder"):
        _require(key not in values or "device_map" in values, where, key, 'left out, or beside device_map = "auto"')
    previous = values.pop("previous", ())
    pool = Pool(name=name, **values)
    return replace(pool, previous=_previous(f"{where}.previous", pool, previous, base))


def _previous(where: str, pool: Pool, tables: Any, base: Path) -> tuple[Pool, ...]:
    """The retired revisions of a pool. Keys that a table lacks are as in the pool."""
    found: list[Pool] = []
    for generation, table in enumerate([tables] if isinstance(tables, Mapping) else tables, 1):
        _require(
            isinstance(table, Mapping), where, "", 'a table like { model = "org/name", revision = "…" }, or a list'
        )
        _known_keys(where, table, _OF_A_REVISION)
        _require("model" in table, where, "", 'a table with model, like { model = "org/name", revision = "…" }')
        values: dict[str, Any] = {"revision": None} | {key: _value(where, key, one) for key, one in table.items()}
        for key in ("model", "tokenizer", "processor"):
            if values.get(key):
                values[key] = _resolve(values[key], base)
        _require(is_name(values["model"]), where, "model", _NAME_RULE)
        parameters = {**implied_parameters(pool.task), **values.pop("parameters", pool.parameters)}
        workers = WorkerRange(0, pool.workers.max)
        one = replace(pool, **values, parameters=parameters, workers=workers, generation=generation)
        if any((one.model, one.revision) == (other.model, other.revision) for other in (pool, *found)):
            label = model_label(one.model, one.revision)
            raise FleetFileError(f"{where} names {label}, which the pool serves already; take it out")
        found.append(one)
    _require(len(found) <= _MOST_PREVIOUS, where, "", f"at most {_MOST_PREVIOUS} revisions")
    return tuple(found)


def _resolve(model: str, base: Path) -> str:
    if model.startswith(("./", "../", "~")):
        return str((base / Path(model).expanduser()).resolve())
    return model


def _value(where: str, key: str, value: Any) -> Any:
    """The value of one key, checked against its type and bounds."""
    match key:
        case "workers":
            return _workers(f"{where}.workers", value)
        case "max_batch_cost":
            return None if value == "auto" else _positive(where, key, value)
        case "max_batch_items":
            return _positive(where, key, value)
        case "wait_slo":
            return float(_positive(where, key, value))
        case "default" | "trust_remote_code" | "compile":
            _require(isinstance(value, bool), where, key, "true or false")
        case "parameters":
            _require(isinstance(value, Mapping), where, key, "a table")
        case "previous":
            _require(
                isinstance(value, Mapping | list), where, key, "a table with model and revision, or a list of such"
            )
        case "max_memory":
            _require(_is_memory(value), where, key, 'a table like { 0 = "20GiB", cpu = "60GiB" }')
        case "device":
            _require(isinstance(value, str) and bool(_DEVICE.fullmatch(value)), where, key, "auto, cpu or cuda:N")
        case "dtype":
            _require(value in DTYPES, where, key, f"one of {', '.join(DTYPES)}")
        case "quantization":
            return checked_quantization(f"{where}.{key}", value)
        case "attn_implementation":
            return checked_attention(f"{where}.{key}", value)
        case "model_kwargs":
            return checked_model_kwargs(f"{where}.{key}", value)
        case "device_map":
            _require(value == "auto", where, key, "auto (or absent)")
        case "revision":
            _require(is_name(value), where, key, _NAME_RULE)
        case _:
            _require(isinstance(value, str) and bool(value), where, key, "a text")
    return value


def _is_memory(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    names = all(name == "cpu" or name.isdecimal() for name in value)
    return names and all(isinstance(one, str) and bool(_MEMORY.fullmatch(one)) for one in value.values())


def _workers(where: str, value: Any) -> WorkerRange:
    _require(isinstance(value, Mapping), where, "", "a table like { min = 0, max = 20 }")
    _known_keys(where, value, {"min", "max"})
    defaults = {one.name: one.default for one in fields(WorkerRange) if one.default is not MISSING}
    low, high = (value.get(key, defaults[key]) for key in ("min", "max"))
    ok = type(low) is int and type(high) is int and 0 <= low <= high and high >= 1
    _require(ok, where, "", "whole numbers with 0 <= min <= max and max >= 1")
    return WorkerRange(low, high)


def _positive(where: str, key: str, value: Any) -> Any:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MOST_NUMBER
    ok = ok and (key == "wait_slo" or isinstance(value, int))
    _require(ok, where, key, "a number above 0" if key == "wait_slo" else "a whole number above 0")
    return value


def _require(ok: bool, where: str, key: str, what: str) -> None:
    if not ok:
        raise FleetFileError(f"{where}{'.' if key else ''}{key} must be {what}")


def _known_keys(where: str, table: Mapping[str, Any], known: set[str]) -> None:
    for key in table:
        if key not in known:
            allowed = ", ".join(sorted(known))
            raise FleetFileError(f"{where} has an unknown key {key!r}{nearest(key, known)}; known are {allowed}")
