"""The producer's half of the task table."""

from __future__ import annotations

import pytest

from pipefleet.errors import UnknownTaskError
from pipefleet.tasks import ALIASES, TASKS, Media, task_spec


@pytest.mark.parametrize("name", TASKS)
def test_every_row_is_complete(name: str) -> None:
    row = TASKS[name]
    assert row.name == name == name.lower()
    assert row.returns
    assert all(isinstance(media, Media) for media in row.fields.values())


def test_an_alias_leads_to_its_row_and_never_hides_a_task() -> None:
    assert not set(ALIASES) & set(TASKS)
    assert all(task_spec(alias).name == name for alias, name in ALIASES.items())
    assert task_spec("sentiment-analysis") is TASKS["text-classification"]


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TASKS["new"] = TASKS["text-classification"]  # type: ignore[index]


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        UnknownTaskError, match=r"no task 'text-clasification' \(did you mean 'text-classification'\?\)"
    ):
        task_spec("text-clasification")
    with pytest.raises(UnknownTaskError, match=r"`pipefleet tasks` lists all"):
        task_spec("x" * 1000)
