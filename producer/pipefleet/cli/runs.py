"""`pipefleet map`, `status`, `resume`, `cancel` and `failures`: bulk runs from the shell."""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipefleet.cli.common import (
    Commands,
    add_json_option,
    add_model_options,
    command,
    print_error,
    print_json,
    print_line,
    read_call,
    seconds,
)
from pipefleet.errors import ServiceUnavailableError, UsageError
from pipefleet.patience import PATIENCE_SECONDS, Patience
from pipefleet.printable import MOST_MESSAGE, printable

if TYPE_CHECKING:
    from pipefleet.runs.progress import RunProgress
    from pipefleet.runs.run import Run


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = command(
        commands, "map", map_,
        help="run a task over a bucket prefix, a manifest or a folder, into a bucket",
        example="pipefleet map automatic-speech-recognition s3://media/audio/ --output s3://media/transcripts/",
    )  # fmt: skip
    parser.add_argument("task", help="a task, see `pipefleet tasks`")
    parser.add_argument(
        "source",
        help="an s3:// prefix, a local folder, or a manifest in the bucket or here: .jsonl or .ndjson, a JSON array as .json, "
        ".csv or .tsv with a line of column names, .txt with a text a line; each also with .gz",
    )
    parser.add_argument("--output", required=True, help="an s3:// prefix for the results")
    add_model_options(parser)
    parser.add_argument(
        "--shard-size", type=int, metavar="N", help="items of a shard, at most 10000 (default: 16 to 512)"
    )
    parser.add_argument("--format", default="jsonl", help="format of the parts: jsonl or parquet")
    parser.add_argument(
        "--strict", action="store_true", help="end at an item that cannot be prepared; else it fails alone"
    )
    _add_waiting(parser, "return when the run is queued, not when it has ended")
    add_json_option(parser)
    for name, run, text in (
        ("status", status, "say how far a run is"),
        ("resume", resume, "queue again what is missing of a run and wait for its end"),
        ("cancel", cancel, "stop a run"),
        ("failures", failures, "list the failed items of a run"),
    ):
        parser = command(commands, name, run, help=text, example=f"pipefleet {name} s3://media/transcripts/")
        parser.add_argument("uri", metavar="RUN_URI", help="the output that map was given")
        add_json_option(parser)
        if name == "resume":
            parser.add_argument("--model", help="go on with this model, which a pool of the fleet serves")
            parser.add_argument("--revision", help="its revision")
            _add_waiting(parser, "return when all is queued, not when it has ended")


def _add_waiting(parser: argparse.ArgumentParser, detach: str) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--detach", action="store_true", help=detach)
    how.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="once the run is queued, wait at most this long for its end, then leave with exit code 4",
    )


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
            parameters=read_call(arguments),
            shard_size=arguments.shard_size,
            format=arguments.format,
            strict=arguments.strict,
        )
        if arguments.detach:
            run.join_planner()
            return _report(run, _progress(run), as_json=arguments.json)
        return _wait(run, arguments)


def status(arguments: argparse.Namespace) -> int:
    """Print the progress of a run, some seconds later if shards seem to be lost. Exit code 1 if it ended with failed items."""
    from pipefleet.client import Client
    from pipefleet.queues.lost_messages import LOOK_SECONDS

    with Client() as client:
        run = client.run(arguments.uri)
        progress = run.progress()
        while not progress.ended and progress.reason is None and client.losses.suspected(run.id):
            time.sleep(LOOK_SECONDS)
            progress = run.progress()
        return _report(run, progress, as_json=arguments.json)


def resume(arguments: argparse.Namespace) -> int:
    """Queue the missing shards of a run and wait for its end."""
    from pipefleet.client import Client

    with Client() as client:
        run = client.run(arguments.uri)
        if arguments.revision and not arguments.model:
            raise UsageError("--revision belongs to --model; name both")
        stopped = run.progress().reason
        if stopped:
            print_error(f"{run.uri}: it had stopped: {stopped}")
        queued = run.resume(model=arguments.model, revision=arguments.revision)
        print_error(f"{run.uri}: {queued} shards were missing or refused and are queued again")
        _tell_unserved(run)
        if arguments.detach:
            run.join_planner()
            return _report(run, _progress(run), as_json=arguments.json)
        return _wait(run, arguments)


def cancel(arguments: argparse.Namespace) -> int:
    """Stop a run. Its written parts stay."""
    from pipefleet.client import Client

    with Client() as client:
        run = client.run(arguments.uri)
        run.cancel()
        return _report(run, run.progress(), as_json=arguments.json)


def failures(arguments: argparse.Namespace) -> int:
    """Print failed items, one line each."""
    from pipefleet.client import Client

    with Client() as client:
        rows = client.run(arguments.uri).failures()
        if arguments.json:
            print_json(list(rows))
            return 0
        for row in rows:
            error = row["error"]
            cells = (row["id"], error["code"], error["stage"], error["message"])
            print("\t".join(printable(str(one), MOST_MESSAGE) for one in cells))
    return 0


def _wait(run: Run, arguments: argparse.Namespace) -> int:
    """Wait for the end of a run and report it. Exit code 1 if it has failed items or was cancelled meanwhile."""
    from pipefleet.errors import ResultTimeoutError

    try:
        ended = run.wait(progress=True, timeout=arguments.timeout)
    except KeyboardInterrupt:
        print_error(_how_to_go_on(run))
        raise
    except ResultTimeoutError:
        text = f"the run at {run.uri} has not ended within {arguments.timeout:g} s; {_how_to_go_on(run)}"
        raise ResultTimeoutError(text) from None
    return max(_report(run, ended, as_json=arguments.json), int(ended.state == "cancelled"))


def _progress(run: Run) -> RunProgress:
    """The progress of a run that was just queued or resumed. It waits for an outage as `Run.wait` does."""
    return Patience(seconds=PATIENCE_SECONDS).call(run.progress)


def _tell_unserved(run: Run) -> None:
    """Print a sentence if no worker serves a run. An outage meanwhile is passed over: the hint is not essential."""
    with suppress(ServiceUnavailableError):
        if not run.progress().ended and (waits := run.unserved()):
            print_error(f"pipefleet: {waits}")


def _how_to_go_on(run: Run) -> str:
    if run.planning:
        return f"planning stops; go on with `pipefleet resume {run.uri}`"
    return f"the run goes on without this command; see `pipefleet status {run.uri}`"


def _report(run: Run, progress: RunProgress, *, as_json: bool) -> int:
    from pipefleet.runs.progress import describe

    document: dict[str, Any] = progress.to_json()
    if progress.state in ("partial", "failed"):
        document["failures"] = run.failures_uri
    if as_json:
        print_json(document)
    else:
        print_line(f"{run.uri}  {describe(progress)}")
        for line in _advice(run, progress):
            print_line(line)
    return int(progress.ended and progress.failed > 0)


def _advice(run: Run, progress: RunProgress) -> list[str]:
    """The next steps after failures, one line each."""
    lines = []
    if progress.reason:
        lines.append(f"{progress.reason}; go on with `pipefleet resume {run.uri}`")
    if progress.state in ("partial", "failed"):
        lines.append(f"failed items: {run.failures_uri} (a source for the next map; `pipefleet failures {run.uri}`)")
    elif progress.ended and progress.failed:
        lines.append(f"failed items so far: `pipefleet failures {run.uri}`")
    if progress.refused:
        lines.append(
            f"refused shards: mend the reason, then `pipefleet resume {run.uri}`; see `pipefleet dead-letters`"
        )
    return lines
