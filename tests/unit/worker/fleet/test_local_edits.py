"""A fleet file that is edited under a running `up`: when it is read, what is refused, and what the workers' copy says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipefleet.errors import FleetFileError, UsageError
from pipefleet.fleet.file import load_fleet
from pipefleet_workers.fleet.local.edits import LOOK_SECONDS, Description, FleetEdits
from tests.unit.fake_clock import Clock

TEXTS = '[pools.texts]\ntask = "text-classification"\nmodel = "./model"\n'
MORE = TEXTS + '\n[pools.vectors]\ntask = "feature-extraction"\nmodel = "./model"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    file = tmp_path / "fleet.toml"
    file.write_text(TEXTS)
    return file


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(path: Path, clock: Clock) -> FleetEdits:
    one = FleetEdits(path, clock=clock)
    one.read()
    return one


def look(file: FleetEdits, clock: Clock) -> Description | None:
    clock.now += LOOK_SECONDS
    return file.news()


def pools(description: Description | None) -> list[str] | None:
    return None if description is None else list(description.fleet.pools)


def replace(path: Path, text: str) -> None:
    """As an editor saves: a new file takes the place of the old one."""
    neighbour = path.with_name("fleet.toml~")
    neighbour.write_text(text)
    neighbour.replace(path)


def test_nothing_is_read_while_the_file_stays_as_it_is(file: FleetEdits, clock: Clock) -> None:
    assert [look(file, clock) for _ in range(4)] == [None] * 4


@pytest.mark.parametrize("save", [replace, Path.write_text])
def test_a_new_version_is_taken_once_two_looks_find_it_alike(save, file: FleetEdits, path: Path, clock: Clock) -> None:
    save(path, MORE)
    assert [pools(look(file, clock)) for _ in range(3)] == [None, ["texts", "vectors"], None]


def test_between_two_looks_the_file_is_left_alone(file: FleetEdits, path: Path, clock: Clock) -> None:
    look(file, clock)
    path.write_text(MORE)
    clock.now += LOOK_SECONDS / 2
    assert file.news() is None
    assert [pools(look(file, clock)) for _ in range(2)] == [None, ["texts", "vectors"]]


def test_a_file_in_the_middle_of_being_written_is_not_read(file: FleetEdits, path: Path, clock: Clock) -> None:
    for end in range(1, len(MORE), 7):
        path.write_text(MORE[:end])
        assert look(file, clock) is None
    path.write_text(MORE)
    assert look(file, clock) is None
    assert pools(look(file, clock)) == ["texts", "vectors"]


def test_a_wrong_version_is_refused_once_and_the_next_good_one_taken(
    file: FleetEdits, path: Path, clock: Clock
) -> None:
    path.write_text(TEXTS.replace("model =", "modle ="))
    assert look(file, clock) is None
    with pytest.raises(FleetFileError, match=r"fleet\.toml: pools\.texts has an unknown key 'modle'"):
        look(file, clock)
    assert look(file, clock) is None
    path.write_text(MORE)
    assert [pools(look(file, clock)) for _ in range(2)] == [None, ["texts", "vectors"]]


def test_a_model_folder_that_is_not_there_is_refused(file: FleetEdits, path: Path, clock: Clock) -> None:
    path.write_text(TEXTS.replace("./model", "./other"))
    with pytest.raises(UsageError, match=r"there is no model folder .*other"):
        file.news(at_once=True)
    (path.parent / "other").mkdir()
    assert look(file, clock) is None
    again = file.news(at_once=True)
    assert again is not None
    assert again.fleet.pools["texts"].model == str(path.parent / "other")


def test_a_file_that_is_gone_is_refused_and_taken_when_it_is_back(file: FleetEdits, path: Path, clock: Clock) -> None:
    path.unlink()
    assert look(file, clock) is None
    with pytest.raises(FleetFileError, match="there is no fleet file"):
        look(file, clock)
    path.write_text(MORE)
    assert [pools(look(file, clock)) for _ in range(2)] == [None, ["texts", "vectors"]]


def test_a_version_that_is_written_while_it_is_read_counts_for_nothing(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = FleetEdits(path, clock=clock)
    honest = FleetEdits._parse

    def torn(self: FleetEdits) -> Description:
        found = honest(self)
        path.write_text(MORE)
        return found

    monkeypatch.setattr(FleetEdits, "_parse", torn)
    assert file.news(at_once=True) is None
    monkeypatch.undo()
    assert [pools(look(file, clock)) for _ in range(2)] == [None, ["texts", "vectors"]]


def test_the_workers_copy_says_the_same_from_another_folder(path: Path, tmp_path: Path) -> None:
    path.write_text(
        TEXTS
        + 'tokenizer = "./model"\ndtype = "float32"\nmax_batch_cost = "auto"\ncompile = false\nwait_slo = 1e-5\n'
        + "workers = { min = 2, max = 3 }\n"
        + 'parameters = { function_to_apply = "softmax", top_k = 2 }\n'
        + '[pools.labels]\ntask = "zero-shot-classification"\nmodel = "./model"\n'
        + 'parameters = { candidate_labels = ["a \\"b\\"", "\\u007f\\\\", "😀\\n"], multi_label = true }\n'
    )
    description = FleetEdits(path).read()
    copy = tmp_path / "elsewhere" / "fleet.toml"
    copy.parent.mkdir()
    copy.write_text(description.to_toml())
    assert load_fleet(copy) == description.fleet == load_fleet(path)
    assert "max" in description.tables["texts"]["workers"]


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("workers = { min = 1, max = 5 }", True),
        ("wait_slo = 5", True),
        ("default = true", True),
        ("max_batch_items = 8", False),
        ("parameters = { top_k = 2 }", False),
        ('dtype = "float32"', False),
        ('device = "cpu"', False),
    ],
)
def test_workers_depend_on_what_they_load_and_not_on_their_number(line: str, same: bool, path: Path) -> None:
    before = FleetEdits(path).read().duty("texts")
    path.write_text(TEXTS + line + "\n")
    assert (FleetEdits(path).read().duty("texts") == before) is same


def test_another_queue_is_another_duty(path: Path) -> None:
    before = FleetEdits(path).read().duty("texts")
    path.write_text(
        TEXTS
        + '[pools.others]\ntask = "text-classification"\nmodel = "./model"\ntokenizer = "./model"\ndefault = true\n'
    )
    after = FleetEdits(path).read().duty("texts")
    assert (before.queue, after.queue) == ("pipefleet.text-classification", "pipefleet.text-classification.texts")
    assert after != before


def test_of_a_link_it_is_the_target_that_counts(path: Path, tmp_path: Path, clock: Clock) -> None:
    for name, text in (("one", TEXTS), ("two", MORE)):
        (tmp_path / f"{name}.toml").write_text(text)
    link = tmp_path / "link.toml"
    link.symlink_to("one.toml")
    file = FleetEdits(link, clock=clock)
    file.read()
    (tmp_path / "new").symlink_to("two.toml")
    os.replace(tmp_path / "new", link)  # noqa: PTH105
    assert [pools(look(file, clock)) for _ in range(2)] == [None, ["texts", "vectors"]]
