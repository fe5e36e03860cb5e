"""The `pipefleet` command: help with examples, JSON, one line for each error, and the right exit code."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipefleet import cli
from pipefleet.cli.common import read_parameters
from pipefleet.cli.jobs import _exit_code
from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import JobState, decode_message
from pipefleet.contract.records import FINISH, JobFailure, finish_arguments
from pipefleet.errors import ParameterError
from pipefleet.fleet.routing import revision_queue
from pipefleet.queues.keys import job_key, queue_list
from pipefleet.queues.looking import queue_depth
from pipefleet.runs.run import RunProgress
from pipefleet.tasks import TASKS

QUEUE = "pipefleet.text-classification"
OWN = revision_queue(QUEUE, "/models/texts", None)


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli.build_parser()
    (found,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


EVERY = {
    "submit",
    "map",
    "status",
    "resume",
    "cancel",
    "failures",
    "tasks",
    "queues",
    "up",
    "worker",
    "doctor",
    "scaler",
}
EVERY |= {"simulate", "render", "dead-letters", "top"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command in this process."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as left:
        code = int(left.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


class TestHelp:
    def test_every_command_is_there(self) -> None:
        assert set(commands()) >= EVERY

    @pytest.mark.parametrize("name", sorted(EVERY))
    def test_every_command_has_an_example_that_its_own_parser_takes(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = run(capsys, name, "--help")
        assert code == 0
        assert f"usage: pipefleet {name}" in out
        _, _, example = out.partition("example:\n")
        words = shlex.split(example)
        assert words[:2] == ["pipefleet", name]
        assert cli.build_parser().parse_args(words[1:]).run

    def test_every_option_is_explained(self) -> None:
        silent = [
            f"{name} {action.option_strings or action.dest}"
            for name, parser in commands().items()
            for action in parser._actions
            if not action.help and not action.choices
        ]
        assert not silent

    def test_the_version_is_the_packages(self, capsys: pytest.CaptureFixture[str]) -> None:
        import pipefleet

        assert run(capsys, "--version")[:2] == (0, f"pipefleet {pipefleet.__version__}\n")


WRONG = [
    (["submit", "text-clasification", "x"], "no task 'text-clasification' (did you mean"),
    (["submit", "text-classification", "x", "--model", "org/none"], "no pool of the fleet serves org/none"),
    (["submit", "text-classification", "x", "--param", "top_k"], "--param takes NAME=VALUE, not 'top_k'"),
    (["submit", "text-classification", "x", "--param", "topk=2"], "did you mean 'top_k'"),
    (["submit", "text-classification", "x", "--expires", "-1"], "expires must be above 0"),
    (["submit", "image-classification", "none.jpg"], "cannot read the input 'none.jpg'"),
    (["submit", "image-classification", "http://example.org/a.jpg"], "workers fetch nothing from the web"),
    (["map", "text-classification", "none.jsonl", "--output", "s3://pipefleet/x/"], "no such source 'none.jsonl'"),
    (["map", "text-classification", "s3://pipefleet/never-run/", "--output", "/tmp/x"], "not an s3:// URI: '/tmp/x'"),
    (
        ["map", "text-classification", "s3://no-such-bucket/", "--output", "s3://pipefleet/x/"],
        "no bucket 'no-such-bucket'",
    ),
    (
        ["map", "text-classification", "x.csv", "--output", "s3://pipefleet/x/", "--shard-size", "0"],
        "from 1 to 10000, not 0",
    ),
    (
        ["map", "text-classification", "x.csv", "--output", "s3://pipefleet/x/", "--shard-size", "10001"],
        "from 1 to 10000",
    ),
    (
        ["map", "text-classification", "x.csv", "--output", "s3://pipefleet/x/", "--format", "xml"],
        "format must be one of",
    ),
    (["status", "s3://pipefleet/never-run/"], "there is no run at s3://pipefleet/never-run/"),
    (["resume", "s3://pipefleet/never-run/"], "there is no run at"),
    (["cancel", "s3://pipefleet/never-run/"], "there is no run at"),
    (["failures", "s3://pipefleet/never-run/"], "there is no run at"),
    (["status", "none"], "not an s3:// URI"),
]


@pytest.mark.usefixtures("client")
class TestErrors:
    @pytest.mark.parametrize(("arguments", "message"), WRONG)
    def test_what_the_caller_can_mend_is_one_line_and_exit_code_2(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("pipefleet: ")
        assert message in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize("arguments", [[], ["sumbit"], ["submit"], ["map", "x", "y"], ["status", "x", "--no"]])
    def test_usage_is_exit_code_2_as_well(self, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("usage: pipefleet")

    @pytest.mark.parametrize("arguments", [["queues"], ["submit", "text-classification", "x"]])
    def test_a_redis_that_is_away_is_exit_code_3(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
    ) -> None:
        monkeypatch.setenv("PIPEFLEET_REDIS_URL", "redis://:hunter2@127.0.0.1:1/0")
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert "cannot reach Redis at redis://127.0.0.1:1/0" in err
        assert "hunter2" not in err

    @pytest.mark.parametrize("command", ["status", "resume", "cancel", "failures"])
    def test_a_store_that_is_away_is_exit_code_3(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
        monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
        code, out, err = run(capsys, command, "s3://pipefleet/never-run/")
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert "cannot reach S3 at http://127.0.0.1:1" in err

    def test_a_wrong_setting_is_named(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIPEFLEET_STORE", "/tmp")
        code, _, err = run(capsys, "queues")
        assert (code, err.count("\n")) == (2, 1)
        assert "PIPEFLEET_STORE" in err

    def test_a_missing_fleet_file_is_named(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIPEFLEET_FLEET", "none.toml")
        code, _, err = run(capsys, "queues")
        assert (code, err.count("\n")) == (2, 1)
        assert "there is no fleet file none.toml" in err

    def test_an_interrupt_is_exit_code_130(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("pipefleet.cli.fleet.task_rows", interrupt)
        code, _, err = run(capsys, "tasks")
        assert (code, err) == (130, "pipefleet: interrupted\n")


def python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PIPEFLEET_"))}
    return subprocess.run(
        [sys.executable, "-m", "pipefleet", *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=cwd,
        env={**inherited, **environment},
    )  # fmt: skip


class TestProcess:
    def test_the_module_is_the_same_command(self) -> None:
        ended = python("tasks", "--json")
        assert ended.returncode == 0
        assert [row["name"] for row in json.loads(ended.stdout)] == list(TASKS)

    def test_an_error_is_one_line_without_a_traceback(self) -> None:
        ended = python("submit", "none", "x", PIPEFLEET_REDIS_URL="redis://127.0.0.1:1")
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("pipefleet: there is no task 'none'")
        assert ended.stderr.count("\n") == 1

    def test_a_service_that_is_away_is_exit_code_3(self, tmp_path: Path) -> None:
        keys = {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "hunter2",
            "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        }
        for ended in (
            python("queues", cwd=tmp_path, PIPEFLEET_REDIS_URL="redis://:hunter2@127.0.0.1:1"),
            python("status", "s3://pipefleet/x/", cwd=tmp_path, **keys),
        ):
            assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (3, "", 1)
            assert "hunter2" not in ended.stderr

    def test_a_reader_that_leaves_early_is_no_error(self) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "pipefleet", "tasks", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.close()
            assert process.wait(60) == 0
            assert process.stderr is not None
            assert process.stderr.read() == b""


class TestOutput:
    def test_tasks_are_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = run(capsys, "tasks")
        assert code == 0
        assert all(name in out for name in TASKS)
        assert "[[[number]]] tokens by width" in out
        rows = {row["name"]: row for row in json.loads(run(capsys, "tasks", "--json")[1])}
        assert rows["text-classification"]["aliases"] == ["sentiment-analysis"]
        assert "top_k" in rows["text-classification"]["parameters"]

    def test_queues_show_what_waits(self, capsys: pytest.CaptureFixture[str], client: Client) -> None:
        client.submit("text-classification", "a")
        client.submit("text-classification", "a", priority="high")
        code, out, _ = run(capsys, "queues", "--json")
        rows = {row["pool"]: row for row in json.loads(out)}
        assert code == 0
        assert rows["texts"] == {
            "pool": "texts", "queue": QUEUE, "model": "/models/texts", "high": 1, "normal": 1, "low": 0, "unacked": 0,
            "delayed": 0, "dead": 0, "workers": 0,
            "note": "no worker serves /models/texts for text-classification; start one with `pipefleet worker --pool texts`",
        }  # fmt: skip
        assert rows["other-speech"]["queue"] == "pipefleet.automatic-speech-recognition.other-speech"
        lines = run(capsys, "queues")[1].splitlines()  # not a terminal: whole lines
        names = ["pool", "queue", "high", "normal", "low", "unacked", "delayed", "dead", "workers", "model"]
        assert lines[0].split() == names
        assert ["texts", QUEUE, "1", "1", "0", "0", "0", "0", "0", "/models/texts"] in [line.split() for line in lines]
        assert lines[-1] == f"texts: {rows['texts']['note']}"

    @pytest.fixture
    def worker(self, client: Client) -> Any:
        """Ends every text: `bad` fails, the others succeed."""
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                found: Any = client.redis.brpop([queue_list(OWN, 3)], timeout=0.1)
                if found:
                    message = decode_message(json.loads(json.loads(found[1])["body"])[0][0])
                    failure = JobFailure("bad_input", "it is bad", "decode").to_json()
                    bad = message.items[0].inputs == "bad"
                    state = JobState.FAILED if bad else JobState.SUCCEEDED
                    fields = (
                        {"error": json.dumps(failure)} if bad else {"output": json.dumps([message.items[0].inputs])}
                    )
                    arguments = finish_arguments(message.id, state, 1.0, ttl=60, reply=message.reply, fields=fields)
                    client.redis.eval(FINISH, 1, job_key(message.id), *arguments)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        stop.set()
        thread.join(20)

    @pytest.mark.usefixtures("worker")
    def test_submit_prints_results_in_input_order(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(capsys, "submit", "text-classification", "ä", "b") == (0, '["ä"]\n["b"]\n', "")
        code, out, _ = run(capsys, "submit", "text-classification", "a", "bad", '{"text": "x"}', "--json")
        rows = json.loads(out)
        assert code == 1
        assert [row["state"] for row in rows] == ["succeeded", "failed", "succeeded"]
        assert rows[0]["output"] == ["a"]
        assert rows[1]["error"]["code"] == "bad_input"
        assert rows[2]["output"] == [{"text": "x"}]
        assert len({row["id"] for row in rows}) == 3

    def test_a_terminal_shows_brackets_as_they_are(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "400")
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert "[[[number]]] tokens by width" in run(capsys, "tasks")[1]

    def test_submit_takes_a_local_file_of_text(self, capsys: pytest.CaptureFixture[str], client: Client) -> None:
        Path("a.txt").write_text("hello")
        assert run(capsys, "submit", "text-classification", "./a.txt", "--timeout", "0.05")[0] == 4
        assert queue_depth(client.redis, QUEUE)["normal"] == 1

    def test_a_result_that_does_not_come_is_exit_code_4(
        self, capsys: pytest.CaptureFixture[str], client: Client
    ) -> None:
        code, out, _ = run(capsys, "submit", "text-classification", "a", "--timeout", "0.05", "--json")
        assert code == 4
        assert json.loads(out)[0]["error"]["code"] == "timeout"

    @pytest.mark.parametrize(
        ("states", "code"),
        [({"succeeded"}, 0), ({"succeeded", "timeout"}, 4), ({"failed", "timeout"}, 1), ({"expired"}, 1), (set(), 0)],
    )
    def test_a_failure_counts_before_what_has_not_ended(self, states: set[str], code: int) -> None:
        assert _exit_code(states) == code

    def test_what_is_waited_for_is_told_on_stderr(
        self, capsys: pytest.CaptureFixture[str], client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.waiting.watcher.SWEEP_SECONDS", 0.05)
        monkeypatch.setattr("pipefleet.waiting.watcher.LOOK_AFTER_SECONDS", 0.0)
        code, _, told = run(capsys, "submit", "text-classification", "a", "--timeout", "1.5")
        assert code == 4
        served, start = f"{OWN} (model /models/texts)", "`pipefleet worker --pool texts`"
        assert told == f"pipefleet: no worker serves {served} now; start one with {start}; 1 job waits\n"

    def test_a_detached_run_is_reported_and_cancelled(
        self, capsys: pytest.CaptureFixture[str], client: Client, prefix: str, tmp_path: Path
    ) -> None:
        (tmp_path / "m.csv").write_text("id,inputs\n1,a\n2,b\n")
        output = prefix + "out"
        code, out, _ = run(capsys, "map", "text-classification", "m.csv", "--output", output, "--detach", "--json")
        document = json.loads(out)
        assert code == 0
        assert {name: document[name] for name in ("uri", "state", "items", "succeeded", "failed", "shards")} == {
            "uri": output + "/", "state": "running", "items": 2, "succeeded": 0, "failed": 0, "shards": 1,
        }  # fmt: skip
        assert document["seconds"] >= 0
        code, out, _ = run(capsys, "status", output)
        assert (code, out.count("\n")) == (0, 1)
        assert "0/2 items" in out
        assert json.loads(run(capsys, "cancel", output, "--json")[1])["state"] == "cancelled"
        assert run(capsys, "failures", output, "--json")[:2] == (0, "[]\n")

    def test_an_ended_run_with_failures_names_their_file(
        self, capsys: pytest.CaptureFixture[str], client: Client, prefix: str
    ) -> None:
        client.map("text-classification", ["a", "b"], output=prefix).join_planner()
        layout = RunLayout.at(prefix)
        row = {"id": "1", "inputs": "b", "error": {"code": "bad_input", "stage": "decode", "message": "it is bad"}}
        client.store.put(layout.failed_shard(0), (json.dumps(row) + "\n").encode())
        totals = RunProgress(prefix, "partial", 2, 1, 1, 1, 1, 0.5).to_json()
        client.store.put(layout.success, json.dumps({k: v for k, v in totals.items() if k != "uri"}).encode())
        code, out, _ = run(capsys, "status", prefix, "--json")
        assert code == 1
        assert json.loads(out) == {**totals, "failures": layout.failures}
        code, out, _ = run(capsys, "status", prefix)
        assert code == 1
        assert layout.failures in out
        assert run(capsys, "failures", prefix)[:2] == (0, "1\tbad_input\tdecode\tit is bad\n")
        assert json.loads(run(capsys, "failures", prefix, "--json")[1]) == [row]


def test_parameters_are_json_or_plain_words() -> None:
    assert read_parameters(["top_k=3", "pooling=mean", "truncation=true", "x=a=b", 'kw={"a": 1}', "empty="]) == {
        "top_k": 3, "pooling": "mean", "truncation": True, "x": "a=b", "kw": {"a": 1}, "empty": "",
    }  # fmt: skip
    for pair in ("top_k", "=3", ""):
        with pytest.raises(ParameterError, match="NAME=VALUE"):
            read_parameters([pair])
