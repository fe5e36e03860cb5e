"""What is missing of a damaged recording is told: in a job, in the rows of a run, by `pipeline()` and in the shell."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.errors import JobFailedError
from pipefleet.pipelines.fleet_pipeline import pipeline
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.stack import Stack
from tests.conftest import write_fleet
from tests.parity.in_process_worker import working
from tests.unit.sound_files import CASES, case

TASK, WAIT = "audio-classification", 120
WARNING = " is damaged: 1 of 328 packets could not be decoded; the result is of the rest"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client, and a worker that hears, in this process."""
    folder = tmp_path_factory.mktemp("warnings")
    fleet = write_fleet(folder / "fleet.toml", {"sounds": (TASK, TASK, "")})
    with Stack(folder / "data", fleet=fleet, pools=(), flower=False) as stack, in_environment(stack.environment()):
        with Client() as one, working(one.fleet, one.fleet.pools["sounds"], one.settings):
            yield one


def test_a_job_tells_what_is_missing(client: Client) -> None:
    job = client.submit(TASK, case("damaged_middle.ts"))
    assert job.result(WAIT)
    (told,) = job.warnings
    assert told.endswith(WARNING)
    assert client.job(job.id).warnings == [told]
    whole = client.submit(TASK, case("vbr_piped.mp3"))
    assert whole.result(WAIT)
    assert whole.warnings == []
    assert "warnings" not in str(client.redis.hkeys(f"pipefleet:job:{whole.id}"))


def test_pipeline_warns_as_python_does(client: Client) -> None:
    hear = pipeline(TASK, client=client, timeout=WAIT)
    with pytest.warns(UserWarning, match="1 of 328 packets"):
        hear(str(CASES / "damaged_middle.ts"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hear(str(CASES / "vbr_piped.mp3"))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_of_a_run_tell_where_there_is_something(client: Client, form: str) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    sources: list[Any] = [case("damaged_middle.ts"), case("vbr_piped.mp3")]
    run = client.map(TASK, sources, output=f"s3://pipefleet/warned-{form}/", format=form)
    assert run.wait(timeout=WAIT).state == "succeeded"
    damaged, whole = run.results()
    assert [text.endswith(WARNING) for text in damaged["warnings"]] == [True]
    assert damaged["output"]
    assert "warnings" not in whole


def test_strict_media_refuses(client: Client) -> None:
    for content, code in (("damaged_middle.ts", "bad_media"), ("eos_flag_clear.opus", "truncated_media")):
        with pytest.raises(JobFailedError) as caught:
            client.submit(TASK, case(content), parameters={"strict_media": True}).result(WAIT)
        assert caught.value.failure_code == code


def test_the_shell_shows_warnings(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = str(CASES / "damaged_middle.ts")
    assert main(["submit", TASK, damaged, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["warnings"][0].endswith(WARNING)
    assert main(["submit", TASK, damaged]) == 0
    assert "pipefleet: warning: " in capsys.readouterr().err
    assert main(["submit", TASK, damaged, "--strict-media", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["error"]["code"] == "bad_media"
