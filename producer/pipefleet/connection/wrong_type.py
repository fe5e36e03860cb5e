"""Keys of pipefleet that hold another type of value, because another program wrote them.

Redis answers WRONGTYPE. The functions take that error and return one sentence with the key and the next step, or None.
"""

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
    """One sentence that names the key and the next step, if Redis answered WRONGTYPE; None for another error."""
    if "WRONGTYPE" not in str(error):
        return None
    keys = " or ".join(printable(key, 120) for key in _keys(error)) or "a key of pipefleet"
    return (
        f"{keys} holds another type of value than pipefleet keeps there, so something else wrote it; give that a Redis database "
        f"of its own, and remove the key with `redis-cli DEL`"
    )


@contextmanager
def passed_over(troubles: dict[str, str] | None, pool: str) -> Iterator[None]:
    """Pass over a pool with a key of another type: note the reason in `troubles`. Without `troubles` the error is raised."""
    from redis.exceptions import ResponseError

    try:
        yield
    except ResponseError as error:
        trouble = wrong_type(error)
        if troubles is None or not trouble:
            raise
        troubles[pool] = f"the pool {pool} cannot be read: {trouble}"


def is_wrong_type(error: BaseException) -> bool:
    """Whether an error of this package comes from such a key. A new try is of no use until somebody has removed the key."""
    return error.__context__ is not None and "WRONGTYPE" in str(error.__context__)


def _keys(error: Exception) -> list[str]:
    """The keys of the command that failed. redis-py names the command only in a pipeline; else its frame is searched."""
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
