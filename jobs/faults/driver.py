"""A job as jobs.summarize runs it, with an engine that notes each document that it is given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import Parser, add_job_flags, job_config, run_main
from pipeline.engine import Engine
from pipeline.engine.config import Request

LOG = "STEMLINE_FAULTS_LOG"


class CountingEngine(Engine):
    """The engine; every document that it takes becomes a line in the file that $STEMLINE_FAULTS_LOG names."""

    def add(self, request: Request) -> None:
        """Note the document, then take it."""
        with Path(os.environ[LOG]).open("ab", buffering=0) as file:
            file.write(f"{request.request_id}\n".encode())
        super().add(request)


def main(arguments: Sequence[str]) -> int:
    """Run the job that the command line asks for; the exit code."""
    from pipeline.job import run

    parser = Parser(prog="python -m jobs.faults.driver")
    add_job_flags(parser)
    report = run(job_config(parser.parse_args(arguments)), engine_factory="jobs.faults.driver:CountingEngine")
    print(f"{sum(report.counts.values())} rows")
    return report.exit_code


if __name__ == "__main__":
    run_main(main)
