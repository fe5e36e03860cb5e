"""What the tests of inputs share."""

from __future__ import annotations

from typing import Any

import pytest

from pipefleet.inputs.prepare import InputPreparer
from pipefleet.inputs.sources import Source, open_source
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS
from tests.unit.producer.inputs.opened import TEXTS, Opener


@pytest.fixture
def opener(store: ObjectStore, prefix: str) -> Opener:
    """A function that opens a source for a task; the output is `prefix + "out/"` unless it is given."""

    def open_one(source: Any, task: str = TEXTS, output: str = "", *, strict: bool = False) -> Source:
        preparer = InputPreparer(TASKS[task], store, prefix + "store/", inline_bytes=1000)
        return open_source(source, TASKS[task], store, preparer, output=output or prefix + "out/", strict=strict)

    return open_one
