"""The command line of tools.simulate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any

import tools.simulate
from jobs.cli import Parser, run_main
from pipeline.errors import JobError
from tools.simulate.cost import H100, fit
from tools.simulate.overhead import Overhead, measure
from tools.simulate.run import Outcome, Plan, simulate

OVERHEAD_DOCUMENTS = 20_000


def main(arguments: Sequence[str]) -> int:
    """Simulate what the command line asks for; 0 if every document of every run has its one row, else 2."""
    options = _parser().parse_args(arguments)
    outcomes: list[Outcome] = []
    overhead: Overhead | None = None
    if options.ray_overhead is not None:
        overhead = measure(options.ray_overhead, OVERHEAD_DOCUMENTS)
        if not options.json:
            print(_overhead_line(overhead), flush=True)
    else:
        for plan in _plans(options):
            outcomes.append(run_apart(plan))
            if not options.json:
                print("\n".join(_lines(plan, outcomes[-1])), flush=True)
    if options.json:
        print(json.dumps({"runs": [_figures(one) for one in outcomes], "ray": overhead and asdict(overhead)}))
    return 0 if all(one.exact for one in outcomes) else 2


def run_apart(plan: Plan) -> Outcome:
    """Simulate in a process of its own, so that the memory of one run is not that of another."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        return apart.submit(simulate, plan).result()


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.simulate", usage="python -m tools.simulate [flags]", description=tools.simulate.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--workers", type=_count, nargs="+", default=[64, 1000], metavar="N", help="default: 64 1000")
    parser.add_argument(
        "--documents", type=_count, nargs="+", default=[1_000_000], metavar="N", help="default: 1000000; a run for each"
    )
    group = parser.add_argument_group("documents: lengths are lognormal, cut at the longest")
    group.add_argument("--median", type=_count, default=Plan.median, metavar="TOKENS", help=f"default: {Plan.median}")
    group.add_argument("--sigma", type=float, default=Plan.sigma, help="of the logarithm (default: 1.0)")
    group.add_argument("--longest", type=_count, default=Plan.longest, metavar="TOKENS", help="default: 131072 - 256")
    group.add_argument("--new-tokens", type=_count, default=256, metavar="N", help="of each output (default: 256)")
    group.add_argument("--shard", default="0/1", metavar="I/N", help="only the i-th (from 0) of n shares, as the job's")
    group = parser.add_argument_group("workers")
    group.add_argument("--rows", metavar="DIR", help="fit an engine's times to a job's rows; else as on an H100")
    group.add_argument("--max-live", type=_count, default=8, metavar="N", help="decoded together (default: 8)")
    group.add_argument("--start-seconds", type=float, default=60.0, help="from a worker's start to its first document")
    group.add_argument("--start-spread", type=float, default=0.0, help="each starts up to so much later (default: 0)")
    group.add_argument("--failures", type=float, default=0.0, help="workers that die in an hour, of all (default: 0)")
    group.add_argument("--driver-ms", type=float, default=0.0, help="the driver is busy so long with each document")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="", metavar="DIR", help="write real rows there, a folder for each run")
    parser.add_argument("--json", action="store_true", help="all figures, for machines")
    parser.add_argument(
        "--ray-overhead", type=_count, metavar="ACTORS",
        help="instead: feed real Ray actors that do nothing, and say what that costs the driver",
    )  # fmt: skip
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _plans(options: argparse.Namespace) -> list[Plan]:
    cost = fit(options.rows, options.max_live) if options.rows else replace(H100, max_live=options.max_live)
    times = (options.start_seconds, options.start_spread, options.driver_ms)
    if min(options.sigma, options.failures, *times) < 0:
        raise JobError("--sigma, --start-seconds, --start-spread, --failures and --driver-ms cannot be below 0")
    index, _, count = options.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise JobError(f"--shard {options.shard}: expected i/n with i below n, as 0/4")
    common: dict[str, Any] = {
        "median": options.median, "sigma": options.sigma, "longest": options.longest, "new_tokens": options.new_tokens,
        "seed": options.seed, "failures": options.failures, "start_seconds": options.start_seconds,
        "start_spread": options.start_spread, "driver_ms": options.driver_ms, "shard": (int(index), int(count)),
    }  # fmt: skip
    return [
        Plan(w, n, cost, output=f"{options.output}/{w}-workers-{n}-documents" if options.output else "", **common)
        for n in options.documents
        for w in options.workers
    ]


def _figures(one: Outcome) -> dict[str, Any]:
    return asdict(one) | {"exact": one.exact, "driver_documents_per_second": one.driver_documents_per_second}


def _lines(plan: Plan, one: Outcome) -> list[str]:
    mib, each = 1 << 20, 1e6 * one.driver_cpu / one.documents
    bound = "the work divided" if one.ideal_work >= one.longest_alone else "the longest document"
    rows = f"each id once: lost {one.lost}, doubled {one.doubled}; {one.statuses}"
    figures = {
        "makespan": f"{one.makespan:,.1f} s after {plan.start_seconds:g} s of starting; "
        f"{one.documents / one.makespan:,.0f} documents/s",
        "of the ideal": f"{one.of_ideal:.2%} ({bound}: {one.ideal:,.1f} s; the longest alone: {one.longest_alone:.1f})",
        "workers idle": f"{one.idle:.2%}",
        "deaths": f"{one.deaths}; {one.computed_again:,} documents computed again",
        "driver": f"{one.driver_cpu:,.1f} CPU seconds, {each:.0f} us a document (writer: "
        f"{1e6 * one.writer_cpu / one.documents:.0f}); at most {one.driver_documents_per_second:,.0f} documents/s "
        "without Ray",
        "memory": f"{one.memory_before / mib:,.0f} MiB with the listing, {one.memory_most / mib:,.0f} at most",
        "rows": rows + (f", in {one.parts:,} parts before compaction" if plan.output else ", counted, not written"),
        "this took": f"{one.wall_seconds:,.0f} s",
    }
    head = f"{one.workers:,} workers, {one.documents:,} documents, {one.tokens:,} tokens"
    return [head, *(f"  {name:14}{text}" for name, text in figures.items())]


def _overhead_line(found: Overhead) -> str:
    return (
        f"{found.actors} Ray actors that do nothing, {found.documents:,} documents: {found.documents_per_second:,.0f} "
        f"documents/s on this machine; {1e6 * found.cpu_seconds:,.0f} us of the driver's CPU a document, so at most "
        f"{1 / found.cpu_seconds:,.0f} documents/s on a core of its own"
    )


if __name__ == "__main__":
    run_main(main)
