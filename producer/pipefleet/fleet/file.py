"""Reading `fleet.toml`: TOML becomes a Fleet, or one sentence that names the file, the pool, the key and what is allowed there.

The tables below are the keys of the file, each with the rule that its error quotes. Relative folders are relative to the file.
`pipefleet up`, the workers, the scaler and clients call `load_fleet`. It raises FleetFileError and nothing else.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipefleet.contract.messages import MAX_NAME, is_name
from pipefleet.errors import FleetFileError, UsageError, nearest
from pipefleet.fleet.devices import MOST, checked_devices
from pipefleet.fleet.loading import DTYPES, checked_attention, checked_model_kwargs, checked_quantization, misplaced
from pipefleet.fleet.pools import MOST_PREVIOUS, Fleet, Pool, WorkerRange, is_hub_name, model_label, pinned
from pipefleet.foreign import MOST_NUMBER
from pipefleet.tasks import implied_parameters, task_spec

_POOL_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_NAME_RULE = (
    f"a text of 1 to {MAX_NAME} characters without control characters and line breaks, since every job names it"
)
_FOLDERS = ("model", "tokenizer", "processor", "offload_folder")
"""Keys whose value may be a folder."""
_LIKE = '{ model = "org/name", revision = "…" }'


def _named(value: str | None) -> str | None:
    if value is not None and not is_name(value):
        raise ValueError(_NAME_RULE)
    return value


def _workers(value: Any) -> WorkerRange:
    """By hand: the bounds are a rule over both keys."""
    if not isinstance(value, Mapping):
        raise FleetFileError("workers must be a table like { min = 0, max = 20 }")
    if unknown := value.keys() - {"min", "max"}:
        raise FleetFileError(_unknown("workers", min(unknown), ("min", "max")))
    found = WorkerRange(**value)
    whole = type(found.min) is int and type(found.max) is int
    if not (whole and 0 <= found.min <= found.max and found.max >= 1):
        raise FleetFileError("workers must be whole numbers with 0 <= min <= max and max >= 1")
    return found


def _rule(words: str, **bounds: Any) -> Any:
    """The bounds of a key, and the words for them in its error."""
    return Field(description=words, **bounds)


_Text = Annotated[str | None, _rule("a text", min_length=1)]
_Flag = Annotated[bool, _rule("true or false")]
_Count = Annotated[int | None, _rule("a whole number above 0", gt=0, lt=int(MOST_NUMBER))]
_Memory = Annotated[str, Field(pattern=r"^\d+(\.\d+)?[KMG]i?B$")]
_Place = Annotated[str, Field(pattern=r"^(cpu|\d+)$")]


class _Revision(BaseModel):
    """A table of `previous`: what a revision may have of its own."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: Annotated[str, _rule("a text", min_length=1)]
    revision: Annotated[str | None, AfterValidator(_named), _rule(_NAME_RULE)] = None
    tokenizer: _Text = None
    processor: _Text = None
    parameters: Annotated[dict[str, Any], _rule("a table")] = {}
    dtype: Annotated[str, _rule(f"one of {', '.join(DTYPES)}", pattern=f"^({'|'.join(DTYPES)})$")] = "auto"
    # Checked by hand: the tables of rules in `loading` also answer calls of `pipeline()`, and depend on the method.
    quantization: Annotated[Any, AfterValidator(partial(checked_quantization, "quantization"))] = None
    attn_implementation: Annotated[Any, AfterValidator(partial(checked_attention, "attn_implementation"))] = None
    model_kwargs: Annotated[Any, AfterValidator(partial(checked_model_kwargs, "model_kwargs"))] = None


class _Pool(_Revision):
    """A table `[pools.NAME]`."""

    task: Annotated[str, _rule("a text", min_length=1)]
    default: _Flag = False
    device: Annotated[str, _rule("auto, cpu or cuda:N", pattern=r"^(auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?)$")] = "auto"
    devices: Annotated[Any, AfterValidator(partial(checked_devices, "devices"))] = None
    workers_per_device: Annotated[int, _rule(f"a whole number from 1 to {MOST}", ge=1, le=MOST)] = 1
    device_map: Annotated[str | None, _rule("auto (or absent)", pattern="^auto$")] = None
    max_batch_cost: Annotated[_Count, BeforeValidator(lambda value: None if value == "auto" else value)] = None
    max_batch_items: _Count = None
    workers: Annotated[Any, AfterValidator(_workers)] = None
    wait_slo: Annotated[float, _rule("a number above 0", gt=0, lt=MOST_NUMBER)] = 600.0
    trust_remote_code: _Flag = False
    max_memory: Annotated[
        dict[_Place, _Memory], _rule('a table like { 0 = "20GiB", cpu = "60GiB" }', min_length=1)
    ] = {}
    offload_folder: _Text = None
    compile: _Flag = False
    previous: Annotated[dict[str, Any] | list[Any], _rule("a table with model and revision, or a list of such")] = []


def fingerprint(path: Path) -> tuple[int, ...]:
    """Numbers that change with the file, or with the file that its name leads to; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def load_fleet(path: Path, *, allow_unpinned: bool = False) -> Fleet:
    """Read `path`. Model folders and tokenizers given as relative paths are relative to the file.

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
    if unknown := content.keys() - {"pools"}:
        raise FleetFileError(_unknown("the file", min(unknown), ["pools"]))
    tables = content.get("pools")
    if not isinstance(tables, Mapping) or not tables:
        raise FleetFileError("it describes no pool; add a table [pools.NAME] with task and model")
    fleet = Fleet({name: _pool(name, table, base) for name, table in tables.items()})
    if not allow_unpinned:
        for pool in fleet.revisions.values():
            _check_pinned(pool)
    _check_defaults(fleet.pools)
    return fleet


def with_revision(pool: Pool, model: str, revision: str | None, *, allow_unpinned: bool = False) -> Pool:
    """The revision of a pool that a worker is started for by hand: one that the fleet file names, or any other, as a retired one.

    Raises FleetFileError for a hub model without a revision.
    """
    model = _resolve(model, Path.cwd())
    for option, name in (("--model", model), ("--revision", revision)):
        if name is not None and not is_name(name):
            raise FleetFileError(f"{option} must be {_NAME_RULE}")
    for one in (pool, *pool.previous):
        if one.serves(one.task, model, revision):
            return one
    if is_hub_name(model) and revision is None and not allow_unpinned:
        raise FleetFileError(f"model {model!r} has no revision; name one with --revision, or pass --allow-unpinned")
    return replace(pool, model=model, revision=revision, generation=len(pool.previous) + 1)


def _pool(name: str, table: Any, base: Path) -> Pool:
    where = f"pools.{name}"
    if not _POOL_NAME.fullmatch(name):
        raise FleetFileError(f"{where}: a pool's name has 1 to 63 of a-z, 0-9 and '-'")
    if not isinstance(table, Mapping):
        raise FleetFileError(f"{where} must be a table")
    for key in sorted(table.keys() - _Pool.model_fields):
        if hint := misplaced(key):
            raise FleetFileError(f"{where} has no key {key!r}: {hint}")
    values = _values(where, _Pool, table, base)
    try:
        spec = task_spec(values.pop("task"))
        spec.check(values.get("parameters", {}))
    except UsageError as error:
        raise FleetFileError(f"{where}: {error}") from None
    for key in ("max_memory", "offload_folder"):
        if key in values and "device_map" not in values:
            raise FleetFileError(f'{where}.{key} must be left out, or beside device_map = "auto"')
    _check_devices(where, values)
    values["parameters"] = {**implied_parameters(spec.name), **values.get("parameters", {})}
    previous = values.pop("previous", [])
    pool = _with_room(where, Pool(name=name, task=spec.name, **values), table)
    return replace(pool, previous=_previous(f"{where}.previous", pool, previous, base))


def _check_devices(where: str, values: Mapping[str, Any]) -> None:
    """Raise FleetFileError for keys that say different things about devices."""
    if "devices" not in values:
        if "workers_per_device" in values:
            raise FleetFileError(f"{where}.workers_per_device must be left out, or beside devices")
        return
    if "device" in values:
        raise FleetFileError(f"{where} has device and devices; keep one of the two")
    if "device_map" in values:
        raise FleetFileError(f"{where} has devices and device_map, which spreads one model over all GPUs; keep one")


def _with_room(where: str, pool: Pool, table: Mapping[str, Any]) -> Pool:
    """The pool, whose most workers are at least those of one host, since these start and end together."""
    least = pool.workers_per_host or 1
    if pool.workers.max >= least:
        return pool
    if "max" in table.get("workers", {}):
        raise FleetFileError(f"{where}.workers must have max >= {least}: devices gives each host {least} workers")
    return replace(pool, workers=WorkerRange(pool.workers.min, least))


def _previous(where: str, pool: Pool, tables: Any, base: Path) -> tuple[Pool, ...]:
    """The retired revisions of a pool: what a table does not say is as in the pool."""
    found = [pool]
    for table in [tables] if isinstance(tables, Mapping) else tables:
        if not isinstance(table, Mapping):
            raise FleetFileError(f"{where} must be a table like {_LIKE}, or a list")
        if not table.keys() - _Revision.model_fields and "model" not in table:
            raise FleetFileError(f"{where} must be a table with model, like {_LIKE}")
        values = {"revision": None, **_values(where, _Revision, table, base)}
        values["parameters"] = {**implied_parameters(pool.task), **values.get("parameters", pool.parameters)}
        one = replace(pool, **values, workers=WorkerRange(0, pool.workers.max), generation=len(found))
        if any((one.model, one.revision) == (other.model, other.revision) for other in found):
            label = model_label(one.model, one.revision)
            raise FleetFileError(f"{where} names {label}, which the pool serves already; take it out")
        found.append(one)
    if len(found) > 1 + MOST_PREVIOUS:
        raise FleetFileError(f"{where} must be at most {MOST_PREVIOUS} revisions")
    return tuple(found[1:])


def _values(where: str, kind: type[_Revision], table: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The keys that a table has, checked, with absolute folders."""
    try:
        checked = kind.model_validate(table)
    except ValidationError as error:
        raise FleetFileError(_sentence(where, kind, error)) from None
    values = {key: getattr(checked, key) for key in table}
    values |= {key: _resolve(values[key], base) for key in _FOLDERS if values.get(key)}
    if not is_name(values["model"]):
        raise FleetFileError(f"{where}.model must be {_NAME_RULE}")
    return values


_FIRST = ("extra_forbidden", "missing")
"""Errors that are told before others: a key that is misspelt is often the one that is missing."""


def _sentence(where: str, kind: type[_Revision], error: ValidationError) -> str:
    """One sentence about one of the errors."""
    found = min(error.errors(), key=lambda one: _FIRST.index(one["type"]) if one["type"] in _FIRST else len(_FIRST))
    key, cause = str(found["loc"][0]), found.get("ctx", {}).get("error")
    if isinstance(cause, FleetFileError):
        return f"{where}.{cause}"
    if found["type"] == "extra_forbidden":
        return _unknown(where, key, kind.model_fields)
    if found["type"] == "missing":
        return f"{where} lacks {key}"
    return f"{where}.{key} must be {kind.model_fields[key].description}"


def _unknown(where: str, key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    return f"{where} has an unknown key {key!r}{nearest(key, known)}; known are {', '.join(known)}"


def _resolve(model: str, base: Path) -> str:
    if model.startswith(("./", "../", "~")):
        return str((base / Path(model).expanduser()).resolve())
    return model


def _check_pinned(pool: Pool) -> None:
    """Raise FleetFileError for a model on the hub, or a tokenizer or processor of another repository, without a revision."""
    if pool.is_hub and not pool.revision:
        raise FleetFileError(
            f"pools.{pool.key}: model {pool.model!r} has no revision; pin one (a commit hash), name a folder that "
            "exists, or pass --allow-unpinned"
        )
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
