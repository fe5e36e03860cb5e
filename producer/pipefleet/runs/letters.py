"""The jobs inside of dead letters: reading what they ask for, and queueing them again.

`pipefleet dead-letters` calls both. Workers read letters too, to end the jobs inside. After `requeue` the result appears in the
usual place: in the job's record, or in the run. Any text is readable: wrong fields are left out. `requeue` raises
ServiceUnavailableError.
"""

from __future__ import annotations

import base64
import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipefleet.connection.errors import redis_errors
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import Shard, is_reply
from pipefleet.contract.records import FINISH
from pipefleet.contract.references import map_refs
from pipefleet.errors import ContractError, RunError, UsageError
from pipefleet.queues import dead_letters
from pipefleet.runs.run import Run

if TYPE_CHECKING:
    from pipefleet.queues.dead_letters import DeadLetter
    from pipefleet.session import Session

MOST_INPUT = 10_000
"""Most characters of an input that `read_content` returns."""

BURY = f"""
local letter = table.remove(ARGV)
if not redis.call('LPOS', KEYS[2], letter) and not redis.call('LPOS', KEYS[3], letter) then return 0 end
{FINISH}"""
"""As FINISH, with a dead letter as one more ARGV at the end, and the queue's unreported and other letters as more KEYS. Returns 0
also when the letter is in neither list: it was queued again or removed meanwhile."""


@dataclass(frozen=True, slots=True)
class Content:
    """The readable content of a dead letter's message."""

    task: str | None = None
    item: str | None = None
    """The id of the only item; None for a shard."""
    input: str | None = None
    """The text, the URI, or the JSON of the inputs, cut to MOST_INPUT characters."""
    shard: Shard | None = None
    output: str | None = None
    """The URI for the result beside the job's record; None if the result goes nowhere else."""
    reply: str | None = None


def read_content(letter: DeadLetter) -> Content:
    """The content of a letter's message. Fields that break the contract are left out."""
    try:
        payload = _payload(letter.message)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return Content()
    if not isinstance(payload, dict):
        return Content()
    items = payload.get("items")
    item = items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}
    return Content(
        task=_text(payload.get("task")),
        item=_text(item.get("id")),
        input=_input(item["inputs"]) if "inputs" in item else None,
        shard=_shard(payload.get("shard")),
        output=_text(payload.get("output")),
        reply=_reply(payload.get("reply")),
    )


def _payload(message: str) -> Any:
    envelope = json.loads(message)
    body = envelope["body"]
    if str(envelope["properties"].get("body_encoding")).lower() == "base64":  # other clients of Celery write it so
        body = base64.b64decode(body)
    return json.loads(body)[0][0]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _reply(value: Any) -> str | None:
    """A client's channel, or None. The message was never checked, and its author must not publish on other channels."""
    return value if is_reply(value) else None


def _input(inputs: Any) -> str:
    with contextlib.suppress(ContractError):  # a malformed reference is shown unchanged
        inputs = map_refs(inputs, lambda one: one.uri)
    text = inputs if isinstance(inputs, str) else json.dumps(inputs, ensure_ascii=False)
    return text if len(text) <= MOST_INPUT else text[: MOST_INPUT - 1] + "…"


def _shard(value: Any) -> Shard | None:
    try:
        return Shard.from_json(value)
    except (ContractError, TypeError):
        return None


def requeue(session: Session, letter: DeadLetter, queue: str) -> str:
    """Queue the job of a letter once more. Returns the outcome in words. The letter is removed, unless it cannot be queued.

    The record of a single job starts afresh, so that callers that wait anew get the new result. A shard belongs to its run again,
    and an ended run is running again. Raises ServiceUnavailableError; then the letter is still there, or the job is queued, or
    `Run.resume` will queue it.
    """
    content = read_content(letter)
    try:
        if content.shard is not None and (became := _requeue_shard(session, letter, queue, content.shard)):
            return became
        with redis_errors(session.settings.redis_url):
            state = dead_letters.requeue_dead_letter(
                session.redis, letter, queue, ttl=session.settings.result_ttl, shard=content.shard is not None
            )
    except UsageError as error:
        return f"cannot be queued: {error}"
    return _BECAME[state]


_BECAME = {
    "queued": "queued again",
    "succeeded": "has succeeded meanwhile",
    "cancelled": "was cancelled",
    None: "gone",
}


def _requeue_shard(session: Session, letter: DeadLetter, queue: str, shard: Shard) -> str | None:
    """The outcome for the shard of a letter, in words; None if only its message has to be queued."""
    try:
        run = Run.open(session, RunLayout.at(shard.run_uri))
    except RunError:
        raise UsageError(f"there is no run at {shard.run_uri} any more; remove the letter") from None
    if run.id != shard.run_id:
        raise UsageError(f"there is another run at {shard.run_uri} now; remove the letter")
    taken = run.requeue([shard.index])
    if not taken and not run.has_part(shard.index):
        if not run.follow(shard.index, letter.queue):
            return None
        taken = [shard.index]
    with redis_errors(session.settings.redis_url):
        dead_letters.remove_dead_letter(session.redis, letter, queue)
    return "queued again" if taken else "has ended meanwhile"
