"""Report on the results of jobs: python -m jobs.report OUTPUT_DIR [OUTPUT_DIR ...]

One folder: what became of its documents. Several: the same figures side by side.
"""

from __future__ import annotations

import io
import json
import math
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import Any, TextIO

from jobs.cli import Parser, run_main
from jobs.page import render_page
from jobs.page.outputs import Outputs
from jobs.page.terminal import print_sections
from jobs.report.changes import changes
from jobs.report.measures import Measures, length_edges, measure
from jobs.report.outputs import outputs
from jobs.report.overview import subtitle
from jobs.report.results import Run, load_runs
from jobs.report.sections import sections
from pipeline.errors import JobError, visible
from pipeline.location import split_name
from pipeline.results.columns import utc_now
from pipeline.results.store import Store

MOST_ROWS = 20_000


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
    parser.add_argument(
        "--documents", choices=("none", "passages", "full"), default="passages",
        help="what the page of one or two folders shows of each document: nothing, what supports its outputs and some "
        "text around (all of it where there is room), or always all of it",
    )  # fmt: skip
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="where the documents are now; unset: where the job found them",
    )
    parser.add_argument(
        "--rows", type=_positive, default=MOST_ROWS, metavar="N",
        help="most outputs in a page, what needs a look before the others",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    runs = load_runs(given.output)
    edges = length_edges(runs)
    measures = [measure(run, edges) for run in runs]
    to = given.to
    if to is None and given.format == "html":
        folder, name = given.output[0], "report.html" if len(runs) == 1 else "comparison.html"
    elif to in (None, "-"):
        _tell(_print_report(given, runs, measures, sys.stdout))
        return 0
    else:
        folder, name = split_name(to)
    text = io.StringIO()
    lacks = _print_report(given, runs, measures, text)
    print(f"written: {_write(folder, name, text.getvalue())}")
    _tell(lacks)
    return 0


def _tell(lacks: str) -> None:
    if lacks:
        print(lacks, file=sys.stderr)


def _print_report(given: Namespace, runs: Sequence[Run], measures: Sequence[Measures], stream: TextIO) -> str:
    """Write it, and say which documents its page lacks, if any."""
    title = f"Results: {runs[0].name}" if len(runs) == 1 else "Stemline comparison"
    if given.format == "json":
        stream.write(json.dumps({"runs": _finite(measures)}, indent=2, allow_nan=False, default=str) + "\n")
    elif given.format == "table":
        print_sections(title, subtitle(measures), sections(runs, measures, with_charts=False), stream)
    else:
        footer = f"Made by python -m jobs.report on {utc_now():%Y-%m-%d %H:%M} UTC."
        shown = _outputs(given, runs)
        told = sections(runs, measures, with_charts=True, outputs=shown)
        stream.write(render_page(title, subtitle(measures), told, footer))
        return _not_shown(shown) if shown is not None else ""
    return ""


def _outputs(given: Namespace, runs: Sequence[Run]) -> Outputs | None:
    """The list of outputs beside their documents, of two runs beside each other, too; of more runs none."""
    if len(runs) == 1:
        return outputs(runs[0], documents=given.documents, inputs=given.input, most=given.rows)
    if len(runs) == 2:
        return changes(*runs, documents=given.documents, inputs=given.input, most=given.rows)
    return None


def _not_shown(shown: Outputs) -> str:
    """Which documents of outputs the page lacks, and why; empty if none. Who opens the page cannot mend that."""
    why = {entry.name: entry.document_note for entry in shown.entries if entry.document < 0 and not entry.error}
    why = {name: note for name, note in why.items() if note}
    if not why:
        return ""
    name, note = next(iter(why.items()))
    return f"the page shows outputs without their documents, {len(why):,} of them; {visible(name)}: {visible(note)}"


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


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
