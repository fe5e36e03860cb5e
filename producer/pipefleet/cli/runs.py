"""`pipefleet map`, `status`, `resume`, `cancel` and `failures`: bulk runs from the shell."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from pipefleet.cli.common import Commands, add_model_options, command, print_json, read_parameters
from pipefleet.errors import UsageError

if TYPE_CHECKING:
    from pipefleet.progress import RunProgress
    from pipefleet.runs import Run


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = command(
        commands, "map", map_,
        help="run a task over a bucket prefix, a manifest or a folder, into a bucket",
        example="pipefleet map automatic-speech-recognition s3://media/audio/ --output s3://media/transcripts/",
    )  # fmt: skip
    parser.add_argument("task", help="a task, see `pipefleet tasks`")
    parser.add_argument("source", help="an s3:// prefix, a .jsonl or .csv manifest, or a local folder")
    parser.add_argument("--output", required=True, help="an s3:// prefix for the results")
    add_model_options(parser)
    parser.add_argument("--shard-size", type=int, metavar="N", help="items of a shard (default: 16 to 512)")
    parser.add_argument("--format", default="jsonl", help="format of the parts: jsonl or parquet")
    parser.add_argument("--detach", action="store_true", help="return when the run is queued, not when it has ended")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    for name, run, text in (
        ("status", status, "say how far a run is"),
        ("resume", resume, "queue again what is missing of a run and wait for its end"),
        ("cancel", cancel, "stop a run"),
        ("failures", failures, "list the failed items of a run"),
    ):
        parser = command(commands, name, run, help=text, example=f"pipefleet {name} s3://media/transcripts/")
        parser.add_argument("uri", metavar="RUN_URI", help="the output that map was given")
        parser.add_argument("--json", action="store_true", help="print one JSON document")
        if name == "resume":
            parser.add_argument("--model", help="go on with this model, which a pool of the fleet serves")
            parser.add_argument("--revision", help="its revision")
            parser.add_argument("--detach", action="store_true", help="do not wait for the end")


def map_(arguments: argparse.Namespace) -> int:
    """Start a run and, unless detached, wait for its end."""
    from pipefleet.client import Client

    with Client() as client:
        run = client.map(
            arguments.task,
            arguments.source,
            output=arguments.output,
            model=arguments.model,
            revision=arguments.revision,
            parameters=read_parameters(arguments.param),
            shard_size=arguments.shard_size,
            format=arguments.format,
        )
        if arguments.detach:
            run.join_planner()
            return _report(run, run.progress(), as_json=arguments.json)
        return _wait(run, as_json=arguments.json)


def status(arguments: argparse.Namespace) -> int:
    """Print the progress of a run. 1 when it has ended with failed items."""
    from pipefleet.client import Client

    with Client() as client:
        run = client.run(arguments.uri)
        return _report(run, run.progress(), as_json=arguments.json)


def resume(arguments: argparse.Namespace) -> int:
    """Queue the missing shards of a run and wait for its end."""
    from pipefleet.client import Client

    with Client() as client:
        run = client.run(arguments.uri)
        if arguments.revision and not arguments.model:
            raise UsageError("--revision belongs to --model; name both")
        queued = run.resume(model=arguments.model, revision=arguments.revision)
        print(f"{run.uri}: {queued} shards were missing and are queued again", file=sys.stderr)
        if not run.progress().ended and (waits := run.unserved()):
            print(f"pipefleet: {waits}", file=sys.stderr)
        if arguments.detach:
            return _report(run, run.progress(), as_json=arguments.json)
        return _wait(run, as_json=arguments.json)


def cancel(arguments: argparse.Namespace) -> int:
    """Stop a run; what it has written stays."""
    from pipefleet.client import Client

    with Client() as client:
        run = client.run(arguments.uri)
        run.cancel()
        return _report(run, run.progress(), as_json=arguments.json)


def failures(arguments: argparse.Namespace) -> int:
    """List failed items, a line each."""
    from pipefleet.client import Client

    with Client() as client:
        rows = client.run(arguments.uri).failures()
        if arguments.json:
            print_json(list(rows))
            return 0
        for row in rows:
            error = row["error"]
            print(f"{row['id']}\t{error['code']}\t{error['stage']}\t{error['message']}")
    return 0


def _wait(run: Run, *, as_json: bool) -> int:
    try:
        ended = run.wait(progress=True)
    except KeyboardInterrupt:
        text = (
            f"planning stops; go on with `pipefleet resume {run.uri}`"
            if run.planning
            else f"the run goes on without this command; see `pipefleet status {run.uri}`"
        )
        print(text, file=sys.stderr)
        raise
    return _report(run, ended, as_json=as_json)


def _report(run: Run, progress: RunProgress, *, as_json: bool) -> int:
    from pipefleet.progress import describe

    document: dict[str, Any] = progress.to_json()
    if progress.ended and progress.failed:
        document["failures"] = run.failures_uri
    if as_json:
        print_json(document)
    else:
        print(f"{run.uri}  {describe(progress)}")
        if "failures" in document:
            print(f"failed items: {document['failures']} (a source for the next map; `pipefleet failures {run.uri}`)")
    return int(progress.ended and progress.failed > 0)
