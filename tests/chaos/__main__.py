"""`python -m tests.chaos`: runs the scenarios and prints what each one took."""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from pathlib import Path

from tests.chaos import bounds, culprits, deaths, outages, refusals, rollout, storm, traffic
from tests.chaos.scenario import SCENARIOS, Scale
from tests.chaos.world import World

MODULES = (deaths, outages, culprits, traffic, bounds, refusals, rollout, storm)


def main() -> int:
    """0 when every promise held."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn at random (0)")
    parser.add_argument("--items", type=int, default=20_000, help="items of the long run (20000)")
    parser.add_argument("--faults", type=int, default=20, help="faults during the long run (20)")
    parser.add_argument("--only", action="append", help="scenarios whose name begins so; may be repeated")
    parser.add_argument("--lease", type=float, help="seconds of a lease (default: the worker's own, 20)")
    parser.add_argument("--transport", choices=("lease", "stock"), default="lease", help="the workers' transport")
    parser.add_argument("--folder", type=Path, help="where servers and logs lie (default: a temporary folder)")
    arguments = parser.parse_args()
    names = [name for name in SCENARIOS if not arguments.only or name.startswith(tuple(arguments.only))]
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="pipefleet-chaos-"))
    scale = Scale(items=arguments.items, faults=arguments.faults)
    broken = 0
    print(f"seed {arguments.seed}, transport {arguments.transport}, logs in {folder}", flush=True)
    print("| scenario | promise | recovered after | took | |\n|---|---|---|---|---|", flush=True)
    with World(folder, transport=arguments.transport, seed=arguments.seed, lease=arguments.lease) as world:
        for name in names:
            broken += not play(world, name, scale)
    print(f"{len(names) - broken} of {len(names)} held")
    return int(broken > 0)


def play(world: World, name: str, scale: Scale) -> bool:
    """Run one scenario and print its row. True when the promise held."""
    begin = time.monotonic()
    try:
        finding = SCENARIOS[name](world, scale)
    except Exception as error:  # noqa: BLE001 - the table tells of each; the next scenario runs in any case
        text = " ".join(str(error).split())[:300] or type(error).__name__
        print(
            f"| {name} | BROKEN | - | {time.monotonic() - begin:.0f} s | {type(error).__name__}: {text} |", flush=True
        )
        (world.folder / f"{name}.txt").write_text(traceback.format_exc())
        return False
    recovery = "-" if finding.recovery is None else f"{finding.recovery:.1f} s"
    print(f"| {name} | held | {recovery} | {time.monotonic() - begin:.0f} s | {finding.note} |", flush=True)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
