"""The rights of this process's Redis user.

Code that can do with less asks here before it runs a command, because Redis logs every refused command as an attack.
deploy/redis/users.acl has the roles of a fleet: producer, operator, worker, control. `require` raises AccessDeniedError.
"""

from __future__ import annotations

import re
from typing import Any

from pipefleet.connection.scripts import run_script
from pipefleet.contract.messages import encode_json
from pipefleet.errors import AccessDeniedError

ROLES = "deploy/redis/users.acl"
_MAY = """
if not redis.acl_check_cmd then return 1 end
for _, command in ipairs(cjson.decode(ARGV[1])) do
  if not redis.acl_check_cmd(unpack(command)) then return 0 end
end
return 1
"""
"""ARGV: a JSON list of commands, each a list of texts. Redis before 7.0 cannot be asked; there every right counts as given."""
_COMMAND = re.compile(r"'([a-z]+(?:[|-][a-z]+)*)' command")


def may(redis: Any, *commands: tuple[str, ...]) -> bool:
    """Whether the user of `redis` may run every one of these commands. One round trip; raises redis-py's errors."""
    return bool(run_script(redis, _MAY, [], encode_json([list(one) for one in commands])))


def require(redis: Any, what: str, role: str, *commands: tuple[str, ...]) -> None:
    """Raise AccessDeniedError unless the user may run all commands. It names the first missing command, and `role` for `what`."""
    for name, *arguments in () if may(redis, *commands) else commands:
        if not may(redis, (name, *arguments)):
            raise AccessDeniedError(
                f"{what} needs {name} on {arguments[0]}, which the Redis user {user_of(redis)!r} may not run; use the role "
                f"{role} of {ROLES} in PIPEFLEET_REDIS_URL"
            )


def user_of(redis: Any) -> str:
    """The name of the Redis user of a client."""
    return str(redis.connection_pool.connection_kwargs.get("username") or "default")


def refused_command(error: Exception) -> str | None:
    """The command that Redis refused to this user, also in a script. Empty where Redis names none; None for another error."""
    text = str(error)
    denied = type(error).__name__ == "NoPermissionError"
    in_script = "ACL failure in script" in text or "The user executing the script can't" in text
    if not denied and not in_script:
        return None
    found = _COMMAND.search(text)
    return found[1] if found else ""


_ACTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "queue jobs": (("LPUSH", "pipefleet.x", ""), ("HSET", "pipefleet:job:x", "state", "")),
    "plan runs": (("SETBIT", "pipefleet:run:x", "0", "1"), ("SET", "pipefleet:run:x:planner", "")),
    "read messages": (("LRANGE", "pipefleet.x", "0", "-1"), ("HGETALL", "pipefleet:unacked:x")),
    "requeue dead letters": (("LREM", "pipefleet:dead:x", "1", ""), ("HDEL", "pipefleet:job:x", "error")),
    "move runs": (("LREM", "pipefleet.x", "1", ""), ("HDEL", "pipefleet:unacked:x", "")),
    "take jobs": (("RPOP", "pipefleet.x"), ("HSET", "pipefleet:workers", "", "")),
    "steer workers": (("PUBLISH", "/0.celery.pidbox", ""),),
}


def describe(redis: Any) -> str:
    """One sentence that lists what the user of `redis` may do, and what it may not. Raises redis-py's errors."""
    able = {act: may(redis, *commands) for act, commands in _ACTS.items()}
    lists = [", ".join(act for act in able if able[act] is wanted) for wanted in (True, False)]
    return f"user {user_of(redis)} may {lists[0] or 'do nothing'}" + (f"; it may not {lists[1]}" if lists[1] else "")
