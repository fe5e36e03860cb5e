"""Calls of Lua scripts by digest: EVALSHA sends 40 characters in place of a script's text.

    EVALSHA digest ─▶ answer
          └─▶ NOSCRIPT or NOPERM ─▶ EVAL text ─▶ answer, and the server knows the script from then on

A server that was restarted, flushed or replaced does not know the script. A user of an earlier `users.acl` may run EVAL alone.
Redis refuses EVALSHA before the script begins, so nothing runs twice. Callers get redis-py's errors.

Not for pipelines and MULTI: a refused script is known only once the commands beside it have run. ScriptBatch is for many scripts
at once; a script in a transaction is sent as text (see `queues.revision_notes`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

_WITH_TEXT: WeakSet[Any] = WeakSet()
"""Connection pools whose user may run EVAL and not EVALSHA. Redis writes each refusal into its ACL log, so one is enough."""


@functools.cache
def digest(script: str) -> str:
    """The name of a script in EVALSHA."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def never_began(error: object) -> bool:
    """Whether the answer to EVALSHA says that the script did not begin: EVAL with its text may help."""
    from redis.exceptions import NoPermissionError, NoScriptError

    # What a script itself may not do is a plain ResponseError.
    return isinstance(error, NoScriptError | NoPermissionError)


def must_send_text(redis: Any) -> bool:
    """Whether the user of this client was refused EVALSHA before."""
    return redis.connection_pool in _WITH_TEXT


def note_answer(redis: Any, refusal: object, answer: object) -> None:
    """Note that EVAL had `answer` where EVALSHA had met `refusal`: who may run EVAL alone is not refused again."""
    from redis.exceptions import NoPermissionError

    if isinstance(refusal, NoPermissionError) and not isinstance(answer, NoPermissionError):
        _WITH_TEXT.add(redis.connection_pool)


def run_script(redis: Any, script: str, keys: Sequence[Any], *arguments: Any) -> Any:
    """Run a script on a client of redis-py and return its answer."""
    refusal: Exception | None = None
    if not must_send_text(redis):
        try:
            return redis.evalsha(digest(script), len(keys), *keys, *arguments)
        except Exception as error:
            if not never_began(error):
                raise
            refusal = error
    answer = redis.eval(script, len(keys), *keys, *arguments)
    note_answer(redis, refusal, answer)
    return answer


class ScriptBatch:
    """Calls of scripts that share a round trip. Each is atomic by itself; the batch is not."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self._calls: list[tuple[str, tuple[Any, ...]]] = []

    def add(self, script: str, keys: Sequence[Any], *arguments: Any) -> None:
        """Put a call into the batch."""
        self._calls.append((script, (len(keys), *keys, *arguments)))

    def run(self) -> list[Any]:
        """Send the batch. The answers in its order; an error is the answer of the call that it is about.

        Calls that the server refused unrun come after the others. Raises redis-py's errors about the connection.
        """
        places = range(len(self._calls))
        if must_send_text(self._redis):
            return self._send(places, with_text=True)
        answers = self._send(places, with_text=False)
        refused = [place for place in places if never_began(answers[place])]
        for place, answer in zip(refused, self._send(refused, with_text=True), strict=True):
            note_answer(self._redis, answers[place], answer)
            answers[place] = answer
        return answers

    def _send(self, places: Sequence[int], *, with_text: bool) -> list[Any]:
        pipe = self._redis.pipeline(transaction=False)
        for script, rest in (self._calls[place] for place in places):
            pipe.execute_command("EVAL", script, *rest) if with_text else pipe.execute_command(
                "EVALSHA", digest(script), *rest
            )
        found: list[Any] = pipe.execute(raise_on_error=False)
        return found
