"""`pipefleet submit`: single jobs from the shell."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pipefleet.cli.common import (
    Commands,
    add_json_option,
    add_model_options,
    command,
    print_error,
    print_json,
    read_call,
    seconds,
    warnings_on_stderr,
)
from pipefleet.errors import ResultTimeoutError
from pipefleet.inputs.local_files import is_readable_once
from pipefleet.printable import printable_json
from pipefleet.tasks import Media, TaskSpec, task_spec


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = command(
        commands, "submit", submit,
        help="run a task on one or several inputs and print the results",
        example="pipefleet submit text-classification 'I like it' --param top_k=2",
    )  # fmt: skip
    parser.add_argument("task", help="a task, see `pipefleet tasks`")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="a text, an s3:// URI or a local file; where the task takes several fields, a JSON object such as "
        """'{"image": "cat.jpg", "question": "What?"}'; for a chat or a pair of images, a JSON list""",
    )  # fmt: skip
    add_model_options(parser)
    parser.add_argument("--priority", choices=("high", "normal", "low"), default="normal")
    parser.add_argument("--expires", type=float, metavar="SECONDS", help="give up after this many seconds")
    parser.add_argument(
        "--timeout", type=seconds, metavar="SECONDS",
        help="wait at most this long for each result; the job goes on (exit code 4)",
    )  # fmt: skip
    add_json_option(parser, "print one JSON list, in input order")


def submit(arguments: argparse.Namespace) -> int:
    """Submit every input, wait for all, print in order. Exit code 1 if one failed, else 4 if one did not finish in time."""
    from pipefleet.client import Client

    parameters, spec = read_call(arguments), task_spec(arguments.task)
    with warnings_on_stderr(), Client() as client:
        jobs = [
            client.submit(
                arguments.task,
                _input(spec, one),
                model=arguments.model,
                revision=arguments.revision,
                parameters=parameters,
                priority=arguments.priority,
                expires=arguments.expires,
            )
            for one in arguments.inputs
        ]
        rows = [_outcome(job, arguments.timeout) for job in jobs]
    if arguments.json:
        print_json(rows)
    else:
        for row in rows:
            for text in row.get("warnings", ()):
                print_error(f"pipefleet: warning: {text}")
            print(printable_json(row.get("output", row.get("error")), encoding=sys.stdout.encoding))
    return _exit_code({row["state"] for row in rows})


def _exit_code(states: set[str]) -> int:
    failed = states - {"succeeded", ResultTimeoutError.code}
    return 1 if failed else ResultTimeoutError.exit_code if ResultTimeoutError.code in states else 0


def _input(spec: TaskSpec, text: str) -> Any:
    """An argument as an input: JSON in the form of an object or list that the task takes, an existing file, or else the text."""
    objects, lists = bool(spec.fields), spec.media in (Media.PROMPT, Media.IMAGE_PAIR)
    if (objects and text.lstrip().startswith("{")) or (lists and text.lstrip().startswith("[")):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return Path(text) if text.startswith(("./", "../", "/")) and is_readable_once(text) else text


def _outcome(job: Any, timeout: float | None) -> dict[str, Any]:
    from pipefleet.errors import JobError, JobFailedError

    try:
        output = job.result(timeout, resolved=False)
        warnings = {"warnings": job.warnings} if job.warnings else {}
        return {"id": job.id, "state": "succeeded", "output": output, **warnings}
    except JobFailedError as error:
        failure = {"code": error.failure_code, "message": str(error), "stage": error.stage}
        return {"id": job.id, "state": "failed", "error": failure}
    except JobError as error:
        return {"id": job.id, "state": error.code, "error": {"code": error.code, "message": str(error), "stage": ""}}
