"""Dead letters, read: what their jobs were, and queuing these again so that their results are found where they were waited for."""

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
"""Characters of an input that are read of a letter."""

BURY = f"""
local letter = table.remove(ARGV)
if not redis.call('LPOS', KEYS[2], letter) and not redis.call('LPOS', KEYS[3], letter) then return 0 end
{FINISH}"""
"""As FINISH, with one more argument at the end, a dead letter, and more KEYS: those of its queue that are not reported, and the
others. 0 as well when the letter is in neither: it was queued again or removed meanwhile."""


@dataclass(frozen=True, slots=True)
class Content:
    """What the message of a dead letter asks for, as far as it can be read."""

    task: str | None = None
    item: str | None = None
    """The id of its one item; None for a shard."""
    input: str | None = None
    """The text, the URI, or the JSON of the inputs, cut to MOST_INPUT characters."""
    shard: Shard | None = None
    output: str | None = None
    """Where its result goes besides the record of the job; None where it goes nowhere else."""
    reply: str | None = None


def read_content(letter: DeadLetter) -> Content:
    """What the message of a letter asks for. Whatever is not as the contract says is left out."""
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
    if str(envelope["properties"].get("body_encoding")).lower() == "base64":  # as other clients of Celery write it
        body = base64.b64decode(body)
    return json.loads(body)[0][0]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _reply(value: Any) -> str | None:
    """A channel that a client listens on: the message was never checked, and others are not for its author to speak on."""
    return value if is_reply(value) else None


def _input(inputs: Any) -> str:
    with contextlib.suppress(ContractError):  # a reference that is none is shown as it is
        inputs = map_refs(inputs, lambda one: one.uri)
    text = inputs if isinstance(inputs, str) else json.dumps(inputs, ensure_ascii=False)
    return text if len(text) <= MOST_INPUT else text[: MOST_INPUT - 1] + "…"


def _shard(value: Any) -> Shard | None:
    try:
        return Shard.from_json(value)
    except (ContractError, TypeError):
        return None


def requeue(session: Session, letter: DeadLetter, queue: str) -> str:
    """Queue the job of a letter once more; what became of it, in words. The letter is gone then, unless it cannot be queued.

    The record of a single job is made new, so that whoever waits for it anew gets the new result. A shard is a part of its run
    again, which is running again if it had ended. Raises ServiceUnavailableError; then the letter is still there, or the job is
    queued, or `Run.resume` queues it.
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
    """What became of the shard of a letter; None where only its message has to be queued."""
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
