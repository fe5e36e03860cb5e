"""`make bench`: contenders side by side on four workloads, and what the system itself costs; figures go into a JSON file.

python -m tests.benchmarks texts images --rounds 3            some sections only
python -m tests.benchmarks --quick                            everything on a few items, once
python -m tests.benchmarks --append figures.json              go on where that file ends; each run is in it at once
python -m tests.benchmarks single --append figures.json --again    measure one section of it anew
python -m tests.benchmarks.report figures.json                docs/benchmarks.md and README.md from it

Contenders run in turns (A B C A B C). Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import report, simulated, surroundings
from tests.benchmarks.bench import SECTIONS, Bench, Options
from tests.benchmarks.contenders import NEEDS_SERVERS, TITLES
from tests.benchmarks.figures import Figures, UnsuitableFile
from tests.benchmarks.measurement import Machine
from tests.benchmarks.workloads import WORKLOADS

INTERRUPTED = 130


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=f"{__doc__}\n{report.expected_duration()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {known(SECTIONS)} (default: all)")
    parser.add_argument("--contenders", metavar="NAME,…", help=f"of {known(TITLES)} (default: all)")
    parser.add_argument(
        "--in-process", action="store_true", help="workloads only, without contenders that need servers"
    )
    parser.add_argument("--quick", action="store_true", help="few items and one round, to see that everything runs")
    parser.add_argument("--rounds", type=_positive, help="runs of each contender, in turns (3; quick: 1)")
    parser.add_argument("--count", type=_positive, help="items of each section (default: each section's own)")
    parser.add_argument("--device", default="auto", help="cpu or cuda:N (auto: the first GPU where there is one)")
    parser.add_argument("--dtype", default="float32", help="dtype of every contender's model (float32)")
    parser.add_argument("--threads", type=_positive, help="torch threads of every contender (all cores)")
    parser.add_argument(
        "--simulated", default=simulated.SERVICE, metavar="BASE,PER_COST", help="in seconds (%(default)s)"
    )
    parser.add_argument("--trace", type=Path, metavar="SVG", help="draw the trace of the section `simulated` there")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--json", type=Path, default=Path("benchmark.json"), help="a new file (%(default)s)")
    target.add_argument("--append", type=Path, metavar="FILE", help="go on with a file of before")
    parser.add_argument("--again", action="store_true", help="measure what the file has of the sections anew")
    arguments = parser.parse_args(words)
    _check(parser, arguments)
    return arguments


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if unknown := [name for name in arguments.sections if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}; the sections are {', '.join(SECTIONS)}")
    if arguments.contenders is not None:
        arguments.contenders = arguments.contenders.split(",")
    if unknown := [name for name in arguments.contenders or () if name not in TITLES]:
        parser.error(f"no contender {', '.join(unknown)}; the contenders are {', '.join(TITLES)}")
    if not arguments.sections:
        arguments.sections = list(WORKLOADS if arguments.in_process else SECTIONS)
    if arguments.contenders is None:
        arguments.contenders = [name for name in TITLES if not (arguments.in_process and name in NEEDS_SERVERS)]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def main() -> int:
    """Run the sections; 0 when all went well, 1 when a contender failed or gave wrong results, 130 after an interrupt."""
    arguments = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: servers stopped, figures kept
    machine = Machine.detect(device=arguments.device, dtype=arguments.dtype, threads=arguments.threads)
    surrounding = surroundings.surroundings(machine)
    try:
        figures = (
            Figures.resumed(arguments.append, surrounding)
            if arguments.append
            else Figures(arguments.json, surrounding, {})
        )
    except UnsuitableFile as error:
        print(error, file=sys.stderr)
        return 2
    surroundings.print_surroundings(surrounding)
    try:
        good = _measure(arguments, machine, figures)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured is in {figures.path}: go on with --append {figures.path}")
        return INTERRUPTED
    print(f"\nfigures written to {figures.path}; python -m tests.benchmarks.report {figures.path} writes the page")
    return 0 if good else 1


def _measure(arguments: argparse.Namespace, machine: Machine, figures: Figures) -> bool:
    options = Options(
        contenders=tuple(arguments.contenders), quick=arguments.quick, again=arguments.again, rounds=arguments.rounds,
        count=arguments.count, service=arguments.simulated, picture=arguments.trace,
    )  # fmt: skip
    good = True
    with tempfile.TemporaryDirectory(prefix="pipefleet-bench-") as folder:
        bench = Bench(options, machine, figures, Path(folder))
        try:
            for name in arguments.sections:
                print(f"\n{name}", flush=True)
                record = bench.measure(name)
                print("\n" + report.section(name, {name: record}), flush=True)
                good = good and not report.faults(name, record)
        finally:
            bench.close()
    return good


if __name__ == "__main__":
    sys.exit(main())
