"""Tables of pandas and torch data sets as the source of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas
import pytest

from pipefleet.errors import SourceError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.inputs.rows import SourceItem
from pipefleet.inputs.sources import open_source
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS

Items = Callable[[Any], list[SourceItem]]


@pytest.fixture
def items(store: ObjectStore, prefix: str) -> Items:
    """A function that gives the items of a source of texts."""
    spec = TASKS["text-classification"]
    preparer = InputPreparer(spec, store, prefix + "store/", inline_bytes=1000)
    return lambda source: list(open_source(source, spec, store, preparer, output=prefix + "out/").items(0, None))


def test_a_table_of_pandas_is_not_read_as_the_names_of_its_columns(items: Items) -> None:
    table = pandas.DataFrame({"inputs": ["one", "two"], "id": ["a", "b"]})
    with pytest.raises(SourceError, match="pass the column with the inputs"):
        items(table)
    assert [item.inputs for item in items(table["inputs"])] == ["one", "two"]
    assert [item.id for item in items(table.to_dict("records"))] == ["a", "b"]


class Texts:
    """As torch's data sets and transformers' KeyDataset: it answers any place, and has no iterator."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, place: int) -> str:
        return f"text {place}"


def test_a_data_set_that_only_knows_its_length_and_its_places_is_a_source(items: Items) -> None:
    assert [item.inputs for item in items(Texts())] == ["text 0", "text 1", "text 2"]
