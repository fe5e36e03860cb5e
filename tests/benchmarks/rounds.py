"""Contenders in interleaved rounds (A B C A B C): whatever the machine does meanwhile meets all of them alike.

A section's record is a dictionary that goes into the JSON: `contenders` with their `runs` (or why one is `missing`, or its
`failures`), and `rounds` with the load of the machine. It is saved after each run, so an interrupt loses one run at most, and
`measure` goes on where the record ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.benchmarks import load

Measure = Callable[[], Mapping[str, Any]]
"""One run of a contender: what the record shall hold of it, JSON-ready."""
Record = dict[str, Any]


def order(done: Mapping[str, int], rounds: int) -> list[list[str]]:
    """For each round the contenders that have fewer runs than its number, in their order; `done` counts the runs so far."""
    return [[name for name, runs in done.items() if runs < number] for number in range(1, rounds + 1)]


def measure(
    section: str, record: Record, contenders: Mapping[str, Measure | str], rounds: int, save: Callable[[], None]
) -> None:
    """Fill `record` with `rounds` runs of each contender; of a contender that cannot run, the string says why.

    A contender that fails is told and recorded, and the others go on.
    """
    rows = record.setdefault("contenders", {})
    for name, one in contenders.items():
        if isinstance(one, str):
            rows[name] = {"missing": one}
        elif "runs" not in rows.get(name, {}):
            rows[name] = {"runs": []}
    able = {name: one for name, one in contenders.items() if not isinstance(one, str)}
    done = {name: len(rows[name]["runs"]) for name in able}
    for number, names in enumerate(order(done, rounds), start=1):
        if names:
            _round(section, record, {name: able[name] for name in names}, number, save)


def _round(section: str, record: Record, able: Mapping[str, Measure], number: int, save: Callable[[], None]) -> None:
    loads = record.setdefault("rounds", [])
    noted: dict[str, Any] = {"round": number, "contenders": []}
    try:
        with load.observed() as found:
            for name, one in able.items():
                _run(record["contenders"][name], name, one, number)
                noted["contenders"].append(name)
                save()
    finally:
        loads.append(noted | found)
        save()
    if load.is_foreign(loads[-1]):
        print(f"  WARNING: {load.warning(section, loads[-1])}", flush=True)


def _run(row: Record, name: str, one: Measure, number: int) -> None:
    try:
        with load.observed() as found:
            run = one()
    except Exception as error:  # noqa: BLE001 - one contender's failure must not cost the others' figures
        row.setdefault("failures", []).append({"round": number, "error": str(error)[-1500:]})
        print(f"  {name} FAILED in round {number}: {error}", flush=True)
        return
    row["runs"].append({"round": number, "foreign_cores": found["foreign_cores"] + found["stolen_cores"], **run})
    print(f"  round {number}  {name:11} {_told(run)}", flush=True)


def _told(run: Mapping[str, Any]) -> str:
    """The figures of a run that are short enough for a line."""
    return ", ".join(f"{key} {value:.4g}" for key, value in run.items() if isinstance(value, int | float))
