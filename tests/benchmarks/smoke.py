"""`make bench-smoke`: every contender once on a few items; only whether their outputs agree counts. Under a minute.

Exit code 1 when an output differs from that of `pipeline()` one by one, or a contender fails. Contenders that need servers run on
the trivial workload only, since each start of a stack takes seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks import surroundings
from tests.benchmarks.bench import Bench, Options
from tests.benchmarks.contenders import BATCHED, ENGINE, HAND, HANDS, ONE_BY_ONE, TITLES
from tests.benchmarks.figures import Figures
from tests.benchmarks.measurement import Machine

PLAN: dict[str, tuple[int, tuple[str, ...]]] = {
    "texts": (6, (ONE_BY_ONE, BATCHED, HAND, HANDS, ENGINE)),
    "images": (4, (ONE_BY_ONE, HAND, HANDS)),
    "speech": (2, (ONE_BY_ONE, HAND, HANDS)),
    "trivial": (100, tuple(TITLES)),
}
"""By workload: items and contenders. The rest is the same code as elsewhere in this table, and would take as long again."""


def complaints(section: str, record: Mapping[str, Any]) -> list[str]:
    """A sentence for each contender that failed or differs."""
    found = []
    for name, row in record["contenders"].items():
        found += [f"{section}: {name} failed: {one['error']}" for one in row.get("failures", ())]
        found += [
            f"{section}: {name} agrees on {run['agreement']:.1%} of {run['items']} items"
            for run in row.get("runs", ())
            if run["agreement"] < 1.0
        ]
    return found


def main() -> int:
    """Run the plan."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.smoke", description=__doc__)
    parser.add_argument("--json", type=Path, help="keep the figures there")
    arguments = parser.parse_args()
    machine = Machine.detect(device="cpu", dtype="float32", threads=None)
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="pipefleet-smoke-") as folder:
        path = arguments.json or Path(folder) / "figures.json"
        figures = Figures(path, surroundings.surroundings(machine), {})
        for section, (count, contenders) in PLAN.items():
            print(section, flush=True)
            bench = Bench(Options(contenders, rounds=1, count=count, warm=False), machine, figures, Path(folder))
            try:
                found += complaints(section, bench.measure(section))
            finally:
                bench.close()
    print("\n".join(found) or "all outputs agree")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
