"""The memory of this process: what it may still take, of the machine, of its control group, and of its own limit.

The adapters ask `available_bytes` before a model on the CPU gets a large picture or a long recording. A system that cannot tell
gives None; nothing is raised. `worker` calls `settle` once.
"""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

YOUNG_OBJECTS = 2000
"""So many objects are made, less those that are gone again, before the collector looks at them."""
_MEMINFO = Path("/proc/meminfo")
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available_bytes() -> int | None:
    """Bytes that may still be taken; None on a system that cannot tell."""
    found = [one for one in (_of_machine(), *_of_groups(), _of_process()) if one is not None]
    return max(0, min(found)) if found else None


def settle() -> None:
    """Let the garbage collector pass over everything that is here now: the modules and the model stay for the whole life.

    Looking at these million objects takes a third of a second, with Python's lock held, once for about 10,000 small items. The
    objects of an item free themselves as its job ends, so the collector may also look less often: at its usual pace it finds the
    objects of the items inside alive, again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


def _of_machine() -> int | None:
    for line in _text(_MEMINFO).splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _of_groups() -> list[int]:
    """Free bytes of the control groups.

    Cached files count as used here, though the kernel would free them, so the result is too low.
    """
    limits = [(_text(most).strip(), _text(taken).strip()) for most, taken in _GROUPS]
    return [int(most) - int(taken) for most, taken in limits if most.isdigit() and taken.isdigit()]


def _of_process() -> int | None:
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = _text(Path("/proc/self/statm")).split()
    if most == resource.RLIM_INFINITY or not taken:
        return None
    return most - int(taken[0]) * os.sysconf("SC_PAGE_SIZE")


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
