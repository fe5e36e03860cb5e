"""One fetch of a channel: the lists that it takes from, the room that it has, and the words of its command.

`transport` makes a Fetch, sends its command, and reads the answer later. The script itself is `scripts.FETCH`. No I/O here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipefleet.connection.scripts import digest
from pipefleet_workers.delivery.ledger import Ledger
from pipefleet_workers.delivery.qos import UNBOUNDED
from pipefleet_workers.delivery.scripts import FETCH


class Source(NamedTuple):
    """A list of one priority of a queue."""

    name: str
    queue: str
    low: bool


class Fetch(NamedTuple):
    """The request of one fetch. `with_text` sends the script itself and not its digest."""

    lists: Sequence[Source]
    credit: int
    low_credit: int
    with_text: bool = False

    def arguments(self, ledger: Ledger, max_deliveries: int | None) -> list[Any]:
        """The arguments of `run_script` behind FETCH: the keys, then each argument."""
        first_low = next((place for place, one in enumerate(self.lists, 1) if one.low), len(self.lists) + 1)
        keys = [*ledger.keys, *(one.name for one in self.lists)]
        most = UNBOUNDED if max_deliveries is None else max_deliveries
        numbers = [self.credit, min(self.low_credit, self.credit), first_low, most]
        return [keys, *numbers, ledger.owner(), *(one.queue for one in self.lists)]

    def command(self, ledger: Ledger, max_deliveries: int | None) -> list[Any]:
        """The words of the command, for a connection whose answer is read later."""
        keys, *arguments = self.arguments(ledger, max_deliveries)
        script = ["EVAL", FETCH] if self.with_text else ["EVALSHA", digest(FETCH)]
        return [*script, len(keys), *keys, *arguments]
