"""`python -m tests.fuzz`: pushes drawn messages to one worker and looks after every 1,000 whether all is well."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.campaign import BATCH, Batch, Campaign, draw, keep, kept, minimise
from tests.fuzz.checks import kind_of
from tests.fuzz.strategies import FAMILIES
from tests.fuzz.world import World


def main() -> int:
    """0 when everything held."""
    arguments = _parser().parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="pipefleet-fuzz-"))
    print(f"seed {arguments.seed}, logs in {folder}", flush=True)
    batches = enumerate(_batches(arguments))
    failed: list[tuple[Batch, list[str]]] = []
    for world_number, (number, batch) in enumerate(batches):
        with World(folder / f"world-{world_number}") as world:
            campaign, alive = Campaign(world), True
            while alive and (arguments.go_on or not failed):
                wrong = _play(campaign, number, batch, folder, last=(number + 1) * BATCH >= arguments.messages)
                failed += [(batch, wrong)] if wrong else []
                alive = world.exit_code is None
                if not alive or (following := next(batches, None)) is None:
                    break
                number, batch = following
        if failed and not arguments.go_on:
            break
    if arguments.minimise:
        for batch, wrong in failed:
            _minimise(batch, wrong)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000, help="how many, roughly (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES), help="only these; may be repeated")
    parser.add_argument("--replay", type=Path, help="a batch that an earlier run has kept, instead of drawn ones")
    parser.add_argument("--go-on", action="store_true", help="play the other batches too when something was wrong")
    parser.add_argument(
        "--minimise", action="store_true", help="look for the messages that did it, a new worker for each try"
    )
    parser.add_argument("--folder", type=Path, help="where servers, logs and batches lie (default: a temporary folder)")
    return parser


def _batches(arguments: argparse.Namespace) -> Iterator[Batch]:
    if arguments.replay is not None:
        yield kept(arguments.replay)
        return
    for number, start in enumerate(range(0, arguments.messages, BATCH)):
        yield draw(min(BATCH, arguments.messages - start), arguments.seed + number, arguments.family or ())


def _play(campaign: Campaign, number: int, batch: Batch, folder: Path, *, last: bool) -> list[str]:
    report = campaign.play(batch, last=last)
    print(f"{number + 1}: {report.line()}", flush=True)
    if report.wrong:
        keep(batch, folder / f"batch-{number + 1}.pickle")
        print("".join(f"   WRONG: {one}\n" for one in report.wrong), end="")
        print(f"   the batch is kept: --replay {folder / f'batch-{number + 1}.pickle'}", flush=True)
    return report.wrong


def _minimise(batch: Batch, wrong: list[str]) -> None:
    for kind in sorted({kind_of(one) for one in wrong}):
        print(f"looking for the messages of: {kind}", flush=True)
        for name, burst in minimise(batch, {kind}, lambda text: print(text, flush=True))[:5]:
            print(f"  {name}: {[(entry.step, entry.raw) for entry in burst]!r}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
