"""Report on the results of jobs: python -m jobs.report OUTPUT_DIR [OUTPUT_DIR ...]

One folder: what became of its documents. Several: the same figures side by side.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from jobs.cli import Parser, run_main
from jobs.page import render_page
from jobs.page.terminal import print_sections
from jobs.report.measures import Measures, length_edges, measure
from jobs.report.overview import subtitle
from jobs.report.results import Run, load_runs
from jobs.report.sections import sections
from pipeline.errors import JobError
from pipeline.location import split_name
from pipeline.results.columns import utc_now
from pipeline.results.store import Store


def main(arguments: Sequence[str]) -> int:
    """Write or print the report that the command line asks for; 0."""
    parser = Parser(
        prog="python -m jobs.report", description=__doc__.splitlines()[0] if __doc__ else "", allow_abbrev=False
    )
    parser.add_argument("output", nargs="+", metavar="OUTPUT_DIR", help="--output of a job; local, s3:// or gs://")
    parser.add_argument(
        "--format",
        choices=("html", "table", "json"),
        default="html",
        help="page, terminal, or for machines (default: html)",
    )
    parser.add_argument(
        "--to",
        metavar="FILE",
        help="where to write it, - for standard output; unset: html as report.html (comparison.html for several "
        "folders) into the first folder, table and json to standard output",
    )
    given = parser.parse_args(arguments)
    runs = load_runs(given.output)
    edges = length_edges(runs)
    measures = [measure(run, edges) for run in runs]
    to = given.to
    if to is None and given.format == "html":
        folder, name = given.output[0], "report.html" if len(runs) == 1 else "comparison.html"
    elif to in (None, "-"):
        _print_report(given.format, runs, measures, sys.stdout)
        return 0
    else:
        folder, name = split_name(to)
    text = io.StringIO()
    _print_report(given.format, runs, measures, text)
    print(f"written: {_write(folder, name, text.getvalue())}")
    return 0


def _print_report(kind: str, runs: Sequence[Run], measures: Sequence[Measures], stream: TextIO) -> None:
    title = "Stemline report" if len(runs) == 1 else "Stemline comparison"
    if kind == "json":
        stream.write(json.dumps({"runs": _finite(measures)}, indent=2, allow_nan=False, default=str) + "\n")
    elif kind == "table":
        print_sections(title, subtitle(measures), sections(runs, measures, with_charts=False), stream)
    else:
        footer = f"Made by python -m jobs.report on {utc_now():%Y-%m-%d %H:%M} UTC."
        stream.write(render_page(title, subtitle(measures), sections(runs, measures, with_charts=True), footer))


def _finite(value: Any) -> Any:
    """`value` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(folder: str, name: str, text: str) -> str:
    """Write a file so that it appears whole; its name. Raises JobError."""
    store = Store(folder)
    try:
        store.write(name, text.encode())
    except JobError as error:
        why = str(error).split("cannot be written: ")[-1].split("; what is there")[0]
        raise JobError(f"{store.name}/{name}: cannot be written: {why}; give another place with --to FILE") from None
    return f"{store.name.rstrip('/')}/{name}"


if __name__ == "__main__":
    run_main(main)
