"""`devices` and `workers_per_device` of a pool: what they mean, and one sentence for each way to get them wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipefleet.errors import FleetFileError
from pipefleet.fleet.devices import Devices, read_devices, shown
from pipefleet.fleet.file import load_fleet
from pipefleet.fleet.pools import Pool, WorkerRange

POOL = '[pools.speech]\ntask = "automatic-speech-recognition"\nmodel = "/models/whisper"\n'


def read(folder: Path, *lines: str) -> Pool:
    file = folder / "fleet.toml"
    file.write_text("\n".join([POOL, *lines]), encoding="utf-8")
    return load_fleet(file).pool("speech")


@pytest.mark.parametrize(
    ("line", "devices", "workers"),
    [
        ('devices = "all"', "all", None),
        ("devices = 4", 4, 4),
        ('devices = ["cuda:0", "cuda:2"]', ("cuda:0", "cuda:2"), 2),
        ('devices = ["cpu"]\nworkers_per_device = 3', ("cpu",), 3),
        ("devices = 4\nworkers_per_device = 2", 4, 8),
        ("", None, 1),
    ],
)
def test_devices_say_how_many_workers_a_host_has(
    tmp_path: Path, line: str, devices: Devices | None, workers: int | None
) -> None:
    pool = read(tmp_path, line)
    assert pool.devices == devices
    assert pool.workers_per_host == workers


def test_a_pool_may_have_the_workers_of_one_host_unless_the_file_says_more(tmp_path: Path) -> None:
    assert read(tmp_path, "devices = 4").workers == WorkerRange(0, 4)
    assert read(tmp_path, "devices = 4", "workers = { min = 1 }").workers == WorkerRange(1, 4)
    assert read(tmp_path, "devices = 4", "workers = { min = 1, max = 12 }").workers == WorkerRange(1, 12)
    assert read(tmp_path, 'devices = "all"').workers == WorkerRange(0, 1)


def test_a_retired_revision_has_the_devices_of_its_pool(tmp_path: Path) -> None:
    pool = read(tmp_path, "devices = 2", 'previous = { model = "/models/old" }')
    assert pool.previous[0].workers_per_host == 2
    assert pool.previous[0].workers == WorkerRange(0, 2)


FORMS = r'pools\.speech\.devices must be "all", a whole number from 1 to 64, or a list of devices like'
NO_DEVICE = "which is no device; write cuda:N, xpu:N, mps or cpu"


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("devices = 0", FORMS),
        ("devices = -1", FORMS),
        ("devices = 65", FORMS),
        ("devices = 2.0", FORMS),
        ("devices = true", FORMS),
        ('devices = "some"', FORMS),
        ('devices = "cuda:0"', FORMS),
        ("devices = []", FORMS),
        ("devices = { cuda = 2 }", FORMS),
        ('devices = ["cuda"]', NO_DEVICE),
        ('devices = ["cuda:00"]', NO_DEVICE),
        ('devices = ["cuda:-1"]', NO_DEVICE),
        ('devices = ["all"]', 'must be "all" alone'),
        ('devices = ["cuda:0\\n"]', NO_DEVICE),
        ("devices = [0, 1]", f"names 0, {NO_DEVICE}"),
        ("devices = [true]", NO_DEVICE),
        ('devices = ["cuda:0", "cuda:0"]', r"names cuda:0 twice; .* workers_per_device = 2"),
        ('devices = ["cpu", "cpu"]', r"names cpu twice; .* workers_per_device = 2"),
        ('devices = ["cuda:0", "cpu"]', r"devices of one kind, .* not cpu and cuda"),
        ("devices = 2\nworkers_per_device = 0", r"workers_per_device must be a whole number from 1 to 64"),
        ("devices = 2\nworkers_per_device = 65", r"workers_per_device must be a whole number from 1 to 64"),
        ("devices = 2\nworkers_per_device = true", r"workers_per_device must be a whole number"),
        ("devices = 2\nworkers_per_device = 1.5", r"workers_per_device must be a whole number"),
        ("workers_per_device = 2", r"workers_per_device must be left out, or beside devices"),
        ('devices = 2\ndevice = "cuda:1"', r"has device and devices; keep one of the two"),
        ('devices = 2\ndevice_map = "auto"', r"has devices and device_map, .*; keep one"),
        ("devices = 4\nworkers = { max = 3 }", r"workers must have max >= 4: devices gives each host 4 workers"),
        ("device_ = 4", r"did you mean 'device'"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(tmp_path: Path, lines: str, sentence: str) -> None:
    with pytest.raises(FleetFileError, match=sentence) as caught:
        read(tmp_path, lines)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["all", "4", "cuda:0,cuda:2", "cpu"])
def test_an_option_reads_what_it_shows(text: str) -> None:
    assert shown(read_devices("--devices", text)) == text


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "four", "all,cpu", "cuda:0,", "cuda:0,cuda:0", "999999999", "4,5", "٣"]
)
def test_a_wrong_option_is_named(text: str) -> None:
    with pytest.raises(FleetFileError, match=r"^--devices "):
        read_devices("--devices", text)


def test_spaces_around_an_option_do_not_matter() -> None:
    assert read_devices("--devices", " all ") == "all"
    assert read_devices("--devices", " 4") == 4
