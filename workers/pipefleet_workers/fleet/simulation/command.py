"""The command `pipefleet simulate`: compares ways to scale on a simulated fleet, without a real one.

`cli` registers it. The options describe the load, the hardware and the allowed wait. The rows go to stdout, as a Markdown table or
as JSON. An unknown policy, or an impossible option, raises UsageError.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipefleet.cli.common import Commands, add_json_option, command, print_json
from pipefleet.errors import UsageError

if TYPE_CHECKING:
    from pipefleet_workers.fleet.simulation.run import Scenario


def register(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands, "simulate", simulate,
        help="compare ways to scale a fleet on a simulated day, in seconds",
        example="pipefleet simulate --devices 10 --seeds 1 --policy pipefleet --policy 'KEDA, list length 20'",
        needs=("numpy",),
    )  # fmt: skip
    add = parser.add_argument
    add("--devices", type=_count, default=100, help="size of the fleet, 1 to 10000 devices (100)")
    add("--pools", type=_count, default=1, help="pools that the devices are split over (1)")
    add("--seeds", type=_count, default=3, help="runs to average (3)")
    add("--policy", action="append", metavar="NAME", help="a policy; may be repeated (default: all)")
    add("--wait-slo", type=_positive, default=600.0, help="seconds that a job may wait (600)")
    add("--job-seconds", type=_positive, default=2.0, help="device-seconds of a job (2)")
    add("--spread", type=_share, default=1.0, help="sigma of the log-normal sizes of jobs; 1.5 is a heavy tail (1)")
    add("--bursts", type=_whole, default=3, help="bulk bursts a day (3)")
    add("--burst-seconds", type=_share, default=240.0, help="work of a burst, in seconds of the whole fleet (240)")
    add("--drift", type=_share, default=0.05, help="noise of the load (0.05)")
    add("--ramp", type=_positive, help="office hours: seconds in which the load rises from night to day")
    add("--size-jump", type=_positive, default=1.0, help="jobs are this many times larger for 15 %% of the day (1)")
    add("--cold-start", type=_positive, nargs=2, default=(60.0, 300.0), metavar=("LEAST", "MOST"), help="(60 300)")
    add("--spot-loss", type=_part, default=0.03, help="share of spot workers lost in an hour (0.03)")
    add("--hard", type=_part, default=0.2, help="share of those that is lost without notice (0.2)")
    add("--reclaim", type=_part, default=0.3, help="share of spot workers that one event takes at once (0.3)")
    add("--redelivery", type=_positive, default=30.0, help="seconds until the jobs of a lost worker run again (30)")
    add("--on-demand", type=_part, default=0.0, help="share of the workers that is bought on demand (0)")
    add("--workers-per-replica", type=_count, default=1, metavar="N", help="devices that start and end together (1)")
    add("--prices", type=_positive, nargs=2, default=(1.0, 3.0), metavar=("SPOT", "ON_DEMAND"), help="an hour (1 3)")
    add("--cost-noise", type=_share, default=0.16, help="relative error of one reading of a job's mean cost (0.16)")
    add("--count-jobs", action="store_true", help="the work of jobs is not known: they are counted")
    add_json_option(parser)


def simulate(arguments: argparse.Namespace) -> int:
    """Print the comparison."""
    from pipefleet_workers.fleet.simulation.report import table
    from pipefleet_workers.fleet.simulation.run import POLICIES, compare

    names = arguments.policy or list(POLICIES)
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise UsageError(f"there is no policy {unknown[0]!r}; there are: {'; '.join(POLICIES)}")
    rows = compare(_scenario(arguments), names, range(1, arguments.seeds + 1))
    if arguments.json:
        print_json([asdict(row) for row in rows])
    else:
        print(table(rows))
    return 0


def _scenario(arguments: argparse.Namespace) -> Scenario:
    from pipefleet_workers.fleet.simulation.knowledge import Knowledge
    from pipefleet_workers.fleet.simulation.run import Scenario
    from pipefleet_workers.fleet.simulation.traffic import Traffic
    from pipefleet_workers.fleet.simulation.workers import Hardware

    if not 1 <= arguments.devices <= 10_000:
        raise UsageError("--devices must be between 1 and 10000")
    low, high = arguments.cold_start
    if low > high:
        raise UsageError("--cold-start takes the shortest first")
    traffic = Traffic(
        arguments.devices,
        job_seconds=arguments.job_seconds,
        spread=arguments.spread,
        bursts=arguments.bursts,
        burst_seconds=arguments.burst_seconds,
        drift=arguments.drift,
        ramp=arguments.ramp,
        jump=arguments.size_jump,
    )
    hardware = Hardware(
        cold_start=(low, high),
        spot_loss=arguments.spot_loss,
        hard=arguments.hard,
        redelivery=arguments.redelivery,
        reclaims=((0.6, arguments.reclaim),),
        on_demand=arguments.on_demand,
        spot_price=arguments.prices[0],
        on_demand_price=arguments.prices[1],
        per_replica=arguments.workers_per_replica,
    )
    knowledge = Knowledge(noise=arguments.cost_noise, counted=arguments.count_jobs)
    return Scenario(traffic, hardware, knowledge, slo=arguments.wait_slo, pools=arguments.pools)


def _number(text: str, low: float, high: float, what: str) -> float:
    number = float(text)
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"must be {what}")
    return number


def _count(text: str) -> int:
    return int(_number(str(int(text)), 1, 10_000, "a whole number from 1 to 10000"))


def _whole(text: str) -> int:
    return int(_number(str(int(text)), 0, 10_000, "a whole number from 0 to 10000"))


def _positive(text: str) -> float:
    return _number(text, 1e-3, 1e6, "above 0")


def _share(text: str) -> float:
    return _number(text, 0.0, 1e6, "0 or more")


def _part(text: str) -> float:
    return _number(text, 0.0, 1.0, "between 0 and 1")
