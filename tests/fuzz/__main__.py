"""`python -m tests.fuzz`: pushes drawn messages to one worker and looks after every 1,000 whether all is well."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.fuzz.campaign import BATCH, Batch, Campaign, draw, keep, kept, minimise
from tests.fuzz.checks import kind_of
from tests.fuzz.strategies import FAMILIES
from tests.fuzz.world import World


def main() -> int:
    """0 when everything held."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000, help="how many, roughly (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES), help="only these; may be repeated")
    parser.add_argument("--replay", type=Path, help="a batch that an earlier run has kept, instead of drawn ones")
    parser.add_argument(
        "--minimise", action="store_true", help="look for the messages that did it, a new worker for each try"
    )
    parser.add_argument("--folder", type=Path, help="where servers, logs and batches lie (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="pipefleet-fuzz-"))
    print(f"seed {arguments.seed}, logs in {folder}", flush=True)
    failed: list[tuple[Batch, list[str]]] = []
    number = 0
    while not number or (arguments.replay is None and number * BATCH < arguments.messages and not failed):
        with World(folder / f"world-{number}") as world:
            campaign = Campaign(world)
            while not failed and (not number or (arguments.replay is None and number * BATCH < arguments.messages)):
                count = min(BATCH, arguments.messages - number * BATCH)
                batch = (
                    kept(arguments.replay)
                    if arguments.replay
                    else draw(count, arguments.seed + number, arguments.family or ())
                )
                number += 1
                report = campaign.play(batch, last=number * BATCH >= arguments.messages)
                print(f"{number}: {report.line()}", flush=True)
                if report.wrong:
                    print("".join(f"   WRONG: {one}\n" for one in report.wrong), end="", flush=True)
                    keep(batch, folder / f"batch-{number}.pickle")
                    print(f"   the batch is kept: --replay {folder / f'batch-{number}.pickle'}", flush=True)
                    failed.append((batch, report.wrong))
    if failed and arguments.minimise:
        for batch, wrong in failed:
            for kind in sorted({kind_of(one) for one in wrong}):
                print(f"looking for the messages of: {kind}", flush=True)
                for name, burst in minimise(batch, {kind}, lambda text: print(text, flush=True))[:5]:
                    print(f"  {name}: {[(entry.step, entry.raw) for entry in burst]!r}"[:4000], flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
