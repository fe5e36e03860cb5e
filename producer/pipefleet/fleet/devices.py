"""The devices that a pool uses on each host, and how many workers share one: `devices` and `workers_per_device`. Pure.

`file` checks the keys of a fleet file here, and `pipefleet worker` its option `--devices`. Whether a host has these devices is not
asked here. Wrong values raise FleetFileError.
"""

from __future__ import annotations

import re
from typing import Any

from pipefleet.errors import FleetFileError

Devices = str | int | tuple[str, ...]
"""`all`, a number of GPUs, or the names of devices."""
ALL = "all"
"""Every GPU of the host; on a host without one, its CPU."""
MOST = 64
"""Devices of a host, and workers of a device."""
CPU = "cpu"
_NAME = re.compile(r"cpu|mps|(cuda|xpu):(0|[1-9][0-9]{0,2})")
_FORMS = f'"all", a whole number from 1 to {MOST}, or a list of devices like ["cuda:0", "cuda:2"]'


def checked_devices(where: str, value: Any) -> Devices:
    """The value of `devices`. Raises FleetFileError, whose sentence begins with `where`."""
    if value == ALL:
        return ALL
    if type(value) is int and 1 <= value <= MOST:
        return value
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST:
        raise FleetFileError(f"{where} must be {_FORMS}")
    return _checked_names(where, tuple(value))


def _checked_names(where: str, names: tuple[Any, ...]) -> tuple[str, ...]:
    for name in names:
        if name == ALL:
            raise FleetFileError(f'{where} must be "all" alone, or a list of names without it')
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise FleetFileError(f"{where} names {name!r}, which is no device; write cuda:N, xpu:N, mps or cpu")
        if names.count(name) > 1:
            raise FleetFileError(
                f"{where} names {name} twice; several workers share a device with workers_per_device = 2, or more"
            )
    if len(kinds := {name.partition(":")[0] for name in names}) > 1:
        raise FleetFileError(
            f"{where} must name devices of one kind, since the workers of a pool count as equally fast, "
            f"not {' and '.join(sorted(kinds))}"
        )
    return names


def read_devices(option: str, text: str) -> Devices:
    """The value of an option: `all`, `4` or `cuda:0,cuda:2`. Raises FleetFileError."""
    text = text.strip()
    if text == ALL:
        return ALL
    if re.fullmatch(r"-?[0-9]{1,9}", text):
        return checked_devices(option, int(text))
    return checked_devices(option, [name.strip() for name in text.split(",")])


def number_of(devices: Devices) -> int | None:
    """How many devices these are; None for `all`, whose number only the host knows."""
    if isinstance(devices, str):
        return None
    return devices if isinstance(devices, int) else len(devices)


def shown(devices: Devices) -> str:
    """The value as a user writes it for `--devices`."""
    return ",".join(devices) if isinstance(devices, tuple) else str(devices)
