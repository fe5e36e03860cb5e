"""A key of ours that holds another type of value than ours: found from what Redis answered, and told in one sentence."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipefleet.printable import printable

_PIPELINED = re.compile(r"^Command # \d+ \((\S+) (.*?)(?: [^)]*)?\) of pipeline caused error", re.DOTALL)
_MOST_KEYS = 5


def wrong_type(error: Exception) -> str | None:
    """One sentence that names the key and the next step, where Redis said WRONGTYPE; None for another error."""
    if "WRONGTYPE" not in str(error):
        return None
    keys = " or ".join(printable(key, 120) for key in _keys(error)) or "a key of pipefleet"
    return (
        f"{keys} holds another type of value than pipefleet keeps there, so something else wrote it; give that a Redis database "
        f"of its own, and remove the key with `redis-cli DEL`"
    )


@contextmanager
def passed_over(troubles: dict[str, str] | None, pool: str) -> Iterator[None]:
    """Note in `troubles` why `pool` cannot be read, where a key of it holds another type; without `troubles` that is raised."""
    from redis.exceptions import ResponseError

    try:
        yield
    except ResponseError as error:
        trouble = wrong_type(error)
        if troubles is None or not trouble:
            raise
        troubles[pool] = f"the pool {pool} cannot be read: {trouble}"


def is_wrong_type(error: BaseException) -> bool:
    """Whether an error of ours came of such a key: trying again is of no use until somebody has removed it."""
    return error.__context__ is not None and "WRONGTYPE" in str(error.__context__)


def _keys(error: Exception) -> list[str]:
    """The keys of the command that failed. redis-py names a command only where it was one of a pipeline."""
    if found := _PIPELINED.match(str(error)):
        return [found[2]]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "execute_command":
            return _named(frame.f_locals.get("args") or ())
    return []


def _named(command: tuple[Any, ...]) -> list[str]:
    words = [one.decode(errors="replace") if isinstance(one, bytes) else str(one) for one in command]
    if words and words[0].upper() in ("EVAL", "EVALSHA") and len(words) > 3:
        return words[
            3 : 3 + min(int(words[2]) or _MOST_KEYS, _MOST_KEYS)
        ]  # without KEYS, a script that reads has them in ARGV
    return words[1:2]
