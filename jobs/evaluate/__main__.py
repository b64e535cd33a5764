"""Evaluate retrieval under sparse prefill: python -m jobs.evaluate --model PATH --lengths 4096 16384 --tasks all

RULER-like tasks and stretches of plain text, read by the product's engine under several arms of attention in one run,
each in every precision that is named. Writes rows/*.parquet (one row for each question and arm), summary.json,
summary.txt and plots to --output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs.cli import check_output, run_main
from jobs.evaluate import plots
from jobs.evaluate.options import options_of, parser
from jobs.evaluate.rows import read_rows
from jobs.evaluate.run import run
from jobs.evaluate.summary import print_summary, summarise
from jobs.measurement import stamp
from pipeline.engine import EngineConfig
from pipeline.errors import JobError


def main(arguments: Sequence[str]) -> int:
    """Run an evaluation, or report on earlier ones; the exit code. Raises JobError."""
    flags = parser((__doc__ or "").splitlines()[0]).parse_args(arguments)
    if flags.plots:
        plots.load_pyplot()  # fail before the work, not after it
    check_output(flags.output)
    if flags.report:
        report(flags.report, flags.output, flags.plots, {"of": [str(folder) for folder in flags.report]})
        return 0
    if any((flags.output / "rows").glob("*")):
        raise JobError(
            f"--output {flags.output}: its folder rows holds files already, of an earlier evaluation perhaps; give "
            "another folder (--report puts several evaluations together)"
        )
    if not flags.model:
        raise JobError("--model is needed: a model folder or hub id")
    device = EngineConfig(flags.model, device=flags.device).torch_device()
    options = options_of(flags, device)
    facts = {**stamp(device), "command": " ".join(["python -m jobs.evaluate", *arguments])}
    facts |= run(options)
    report([options.output], options.output, options.plots, facts)
    return 0


def report(folders: Sequence[Path], output: Path, with_plots: bool | None, facts: dict[str, Any]) -> None:
    """Summary, table and plots of the rows in `folders`. with_plots None: if matplotlib is installed."""
    rows = read_rows(folders)
    summary = {"run": facts, **summarise(rows)}
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    with (output / "summary.txt").open("w", encoding="utf-8") as file:
        print_summary(summary, file)
    print_summary(summary)
    missing = with_plots is None and find_spec("matplotlib") is None
    written = [] if missing or with_plots is False else plots.draw(rows, output)
    hint = f" (for plots: {plots.INSTALL})" if missing else ""
    drawn = ", ".join(["", *(path.name for path in written)])
    print(f"{len(rows)} rows: summary.txt, summary.json{drawn} are in {output}{hint}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
