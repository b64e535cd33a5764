"""Summarise long documents: python -m jobs.summarize --input DOCS --output OUT --model PATH_OR_ID

Exit codes: 0 all documents ok, 2 some failed (their rows say why), 1 the job could not run, 130 stopped.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cli import Parser, add_job_flags, command, job_config, run_main, this_python, unheard
from pipeline.errors import JobError, visible
from pipeline.interruptible import stop_signals
from pipeline.location import is_uri
from pipeline.results.store import Store
from pipeline.results.summary import JobReport, first_outputs, rows_for_table
from pipeline.settings.config import JobConfig, flag

if TYPE_CHECKING:
    from rich.console import Console

# Outputs that the closing lines print in full, and how long they may be. In a log, only those of a job with few rows.
FIRST_OUTPUTS = 3
SHORT_OUTPUT = 1200
QUIET_ABOVE = 20
BUNDLED_HINT = (
    "this model is for trying things out. It lists sentences that begin with 'Key finding:', and answers questions "
    "such as 'What was the Calder bridge repair budget?' where the text says so in as many words; otherwise it "
    "answers 'No key findings.' or invents something. For texts of your own take a real one (--model)"
)


def main(arguments: Sequence[str]) -> int:
    """Run the job that the command line asks for; the exit code."""
    parser = Parser(
        prog="python -m jobs.summarize", description=(__doc__ or "").splitlines()[0],
        epilog=(__doc__ or "").splitlines()[-1], allow_abbrev=False,
    )  # fmt: skip
    add_job_flags(parser)
    report = carry_out(job_config(parser.parse_args(arguments)))
    return report.exit_code if report else 0


def carry_out(config: JobConfig) -> JobReport | None:
    """Run a job and print what it came to, or of a dry run the plan; then there is no report. Raises JobError."""
    refuse_unpacked_paths(config)
    for number in stop_signals():  # until the job has its own way to stop
        signal.signal(number, _interrupt)
    if config.dry_run:
        from pipeline.job.dry_run import describe_plan

        for line in describe_plan(config):
            print(visible(line), flush=True)
        return None
    from pipeline.job.job import run

    report = run(config)
    with unheard():  # what became of the documents is in the rows, and in the exit code
        show(report)
        if Path(config.model).name == "tiny-reader":
            print(f"{config.model}: {BUNDLED_HINT}")
        sys.stdout.flush()
    return report


def _broken_pipe() -> None:
    raise BrokenPipeError


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def refuse_unpacked_paths(config: JobConfig) -> None:
    """Raise JobError for a relative output inside a submitted job: its working folder is a temporary copy."""
    inside = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and "/working_dir_files/" in str(Path.cwd())
    if inside and not is_uri(config.output) and not Path(config.output).is_absolute():
        raise JobError(
            f"{flag('output')} {config.output}: a submitted job runs in a temporary copy of the working folder; "
            "give an absolute path that the cluster can reach, or a URI"
        )


def show(report: JobReport) -> None:
    """Print the report as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.on_broken_pipe = _broken_pipe  # type: ignore[method-assign]  # its own way is to exit with 1
    for message in report.messages:
        console.print(visible(message), markup=False, highlight=False)
    table = Table(show_header=False, title="stemline", title_justify="left")
    for what, figure in rows_for_table(report):
        table.add_row(what, Text(visible(figure)))
    console.print(table)
    for document_id, status, error in report.first_errors:
        console.print(visible(f"{status}: {document_id}: {error}"), markup=False, highlight=False)
    if report.counts:
        _show_outputs(console, report)
        look = f"look at it: {command('report')} {shlex.quote(report.output)}"
        console.print(visible(look), markup=False, highlight=False, soft_wrap=True)
        columns = "['document_id', 'question_id', 'status', 'output', 'error']"
        values = "*[value for value in row.values() if value]"
        code = f"for row in read_results({report.output!r}, {columns}).to_pylist()"
        code = f"from pipeline import read_results; [print({values}, '', sep='\\n') {code}]"
        line = f'{this_python()} -c "{code}"'
        console.print(visible("read them: " + line), markup=False, highlight=False, soft_wrap=True)
    if report.flagged:
        verb = f"output{'s' * (report.ok != 1)} {'is' if report.flagged == 1 else 'are'}"
        counts = ", ".join(f"{count:,} {name}" for name, count in report.flags.items())
        told = f"{report.flagged:,} of {report.ok:,} {verb} flagged: {counts} (column flags)"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if report.cut:
        verb = "output is" if report.cut == 1 else "outputs are"
        told = f"{report.cut:,} {verb} cut off at --max-new-tokens: finish_reason is length, though the status is ok"
        console.print(told, markup=False, highlight=False, soft_wrap=True)


def _show_outputs(console: Console, report: JobReport) -> None:
    """The first outputs in full, if they are short; none in the log of a large job."""
    if not sys.stdout.isatty() and sum(report.counts.values()) > QUIET_ABOVE:
        return
    for who, output, flags in first_outputs(Store(report.output), FIRST_OUTPUTS):
        if len(output) <= SHORT_OUTPUT:
            head = f"{who} ({', '.join(flags)})" if flags else who
            console.print(visible(head), markup=False, highlight=False, style="bold")
            console.print(visible(output.strip()) + "\n", markup=False, highlight=False)


if __name__ == "__main__":
    run_main(main)
