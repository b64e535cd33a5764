"""The command line of tools.faults."""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tools.faults
from jobs.cli import Parser, run_main
from tools.faults import blows, runs, table
from tools.faults.corpus import READER

# Several engines may share a GPU; what a job needs for LIVE documents of the tables' lengths.
ARENA_TOKENS = 16_384
DOCUMENTS = {"kills": 10_000, "restarts": 12_000, "soak": 400_000, "blows": 10_000}
ABOUT = {
    "table": "each fault once, on a small job of its own",
    "kills": "workers and driver killed while many documents are done",
    "restarts": "the driver killed at random moments of a small job",
    "soak": "memory over a long time",
    "blows": "worker, driver, raylet and control service killed in turn while many documents are done",
    "flips": "single bits flipped in the files of a finished job",
    "bucket": "the demo in an object store, killed and resumed",
    "determinism": "the share of outputs that stay the same in other company",
}


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; 0 if every document has its one row, else 2."""
    options = _parser().parse_args(arguments)
    if options.what == "determinism":
        from tools.faults import determinism

        return determinism.main(options)
    with tempfile.TemporaryDirectory(prefix="stemline_faults_") as temporary:
        return _run(options, options.folder or Path(temporary) / "run")


def _parser() -> Parser:
    parser = Parser(prog="python -m tools.faults", description=(tools.faults.__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True, prog="python -m tools.faults")
    for name, about in ABOUT.items():
        command = commands.add_parser(name, help=about)
        if name == "determinism":
            from tools.faults import determinism

            determinism.add_arguments(command)
            continue
        command.add_argument("--folder", type=Path, help="empty folder for documents and results (default: temporary)")
        if name == "bucket":
            continue
        if name == "flips":
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--times", type=int, default=10_000)
            continue
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument(
            "--model", type=Path, help="model folder (default: a small random one; on a GPU, the bundled one)"
        )
        if name == "table":
            command.add_argument("--only", nargs="+", default=[], metavar="FAULT", help="these faults, not all")
            command.add_argument("--at-once", type=int, default=1, help="faults that are tried at the same time")
            command.add_argument("--limit", type=float, default=600.0, help="seconds for each")
            continue
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--workers", type=int, default=2)
        command.add_argument("--documents", type=int, default=DOCUMENTS[name])
        if name == "kills":
            command.add_argument("--worker-every", type=float, default=20.0, help="seconds")
            command.add_argument("--driver-every", type=float, default=60.0, help="seconds")
        if name == "restarts":
            command.add_argument("--times", type=int, default=20)
        if name == "blows":
            command.add_argument("--times", type=int, default=6, help="kills of each of the four")
        if name == "soak":
            command.add_argument("--minutes", type=float, default=60.0)
    return parser


def _run(options: argparse.Namespace, folder: Path) -> int:
    if options.what == "bucket":
        from tools.faults.bucket import bucket

        return bucket(folder)
    if options.what == "flips":
        return _flips(options, folder)
    job: dict[str, Any] = {"model": options.model, "device": options.device}
    if options.device == "cuda":
        # The small random model's heads are narrower than the GPU kernels take.
        job |= {"model": options.model or READER, "arena_tokens": ARENA_TOKENS}
    if options.what == "table":
        return _table(options, folder, job)
    if options.what == "soak":
        return _soak(options, folder, job)
    if options.what == "blows":
        return _blows(options, folder, job)
    if options.what == "kills":
        outcome = runs.kills(
            folder, documents=options.documents, workers=options.workers, seed=options.seed,
            worker_every=options.worker_every, driver_every=options.driver_every, **job,
        )  # fmt: skip
    else:
        outcome = runs.kills(
            folder, documents=options.documents, workers=options.workers, seed=options.seed,
            worker_every=float("inf"), driver_every=0.0, first_kill=(1.0, 40.0), max_driver_kills=options.times, **job,
        )  # fmt: skip
    return _show(outcome)


def _table(options: argparse.Namespace, folder: Path, job: dict[str, Any]) -> int:
    faults = table.choose(options.only)
    runs.refuse_used(folder)
    tried = table.table(folder, faults, at_once=options.at_once, limit=options.limit, **job)
    print(f"\n{table.markdown(tried)}")
    return 2 if any(one.problem for one in tried) else 0


def _flips(options: argparse.Namespace, folder: Path) -> int:
    from tools.faults.flips import flips

    found = flips(folder, options.times, options.seed)
    for (place, what), number in sorted(found.items()):
        print(f"{place:10} {what:10} {number:,}")
    return 2 if any(what == "silent" for _, what in found) else 0


def _blows(options: argparse.Namespace, folder: Path, job: dict[str, Any]) -> int:
    victims = list(blows.VICTIMS) * options.times
    random.Random(options.seed).shuffle(victims)
    struck, count = blows.blows(
        folder, victims, documents=options.documents, workers=options.workers, seed=options.seed, **job
    )
    problems = [blow.problem for blow in struck if blow.problem]
    slowest = max((blow.seconds for blow in struck if blow.victim in ("raylet", "gcs")), default=0.0)
    print(f"kills {len(struck)}, documents {count.documents:,}, rows lost {count.lost}, doubled {count.doubled}")
    print(f"not as it should be {len(problems)}, longest from a kill of Ray to the driver's end {slowest:.0f} s")
    return 2 if problems or not count.exact else 0


def _show(outcome: runs.Outcome) -> int:
    count = outcome.count
    assert count is not None
    memory = outcome.driver_memory
    lines = {
        "documents": f"{count.documents:,}",
        "rows lost": count.lost,
        "rows doubled": count.doubled,
        "statuses": count.statuses,
        "computed again": f"{count.again:,} (at most {outcome.recomputed_bound:,} were in flight or not yet written)",
        "workers killed": outcome.worker_kills,
        "drivers killed": outcome.driver_kills,
        "runs": outcome.runs,
        "runs that gave up": f"{len(outcome.refused)} {outcome.refused[:3]}",
        "processes left over after a driver's end": f"{len(outcome.left_over)} {sorted(set(outcome.left_over))}",
        "driver memory, MiB": f"first run {memory[0][0]:.0f} to {memory[0][1]:.0f}, last {memory[-1][0]:.0f} to "
        f"{memory[-1][1]:.0f}, most {max(late for _, late in memory):.0f}",
        "seconds": f"{outcome.seconds:.0f}",
    }
    for name, value in lines.items():
        print(f"{name:42} {value}", flush=True)
    return 0 if count.exact else 2


def _soak(options: argparse.Namespace, folder: Path, job: dict[str, Any]) -> int:
    samples, count = runs.soak(
        folder, minutes=options.minutes, workers=options.workers, documents=options.documents, **job
    )
    print("minutes  driver MiB  workers MiB      taken")
    for sample in samples:
        workers = " ".join(f"{value:.0f}" for value in sample.workers)
        print(f"{sample.seconds / 60:7.1f}  {sample.driver:10.0f}  {workers:11}  {sample.taken:9,}")
    print(f"rows {sum(count.statuses.values()):,}, doubled {count.doubled}, statuses {count.statuses}")
    return 2 if count.doubled else 0


if __name__ == "__main__":
    run_main(main)
