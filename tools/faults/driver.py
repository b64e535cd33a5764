"""A job as jobs.summarize runs it, with an engine that notes each document that it is given."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli import Parser, add_job_flags, job_config, run_main


def main(arguments: Sequence[str]) -> int:
    """Run the job that the command line asks for; the exit code."""
    from pipeline.job.job import run

    parser = Parser(prog="python -m tools.faults.driver")
    parser.add_argument("--engine", default="CountingEngine", help="a class of tools.faults.engines")
    parser.add_argument("--grace", type=float, help="seconds after its deadline until a worker counts as hung")
    add_job_flags(parser)
    options = parser.parse_args(arguments)
    report = run(job_config(options), engine_factory=f"tools.faults.engines:{options.engine}", grace=options.grace)
    print(f"{sum(report.counts.values())} rows")
    return report.exit_code


if __name__ == "__main__":
    run_main(main)
