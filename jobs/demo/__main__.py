"""The demo: summarises examples/documents with sparse and with dense prefill and counts the findings in the summaries.

`python -m jobs.demo` runs jobs.summarize once for each arm, reads the Parquet back and prints what was found. Exit
code 0 if the first arm found enough, 2 if it did not, 1 if a job failed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.demo.scoring import Score, read_findings, score
from pipeline import read_results

ROOT = Path(__file__).parents[2]
# The flags of each arm. "published": Stem's own scores and decay, no dense tail, at the density of the first.
ARMS = {
    "stem": ["--config", "examples/demo.yaml"],
    "dense": ["--config", "examples/demo-dense.yaml"],
    "published": ["--config", "examples/demo.yaml", "--preset", "release", "--stride", "8", "--dense-tail", "0"],
}

Rows = dict[str, dict[str, Any]]


def run_arm(arm: str, output: Path) -> Rows:
    """Run jobs.summarize for one arm; its result rows by document id. Raises SystemExit if the job fails."""
    command = ["-m", "jobs.summarize", *ARMS[arm], "--output", str(output)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    started = time.monotonic()
    status = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if status:
        raise SystemExit(f"the job for arm {arm!r} ended with exit code {status}")
    print(f"{arm}: {time.monotonic() - started:.0f} s with the start of Ray", flush=True)
    return {row["document_id"]: row for row in read_results(output).to_pylist()}


def result_table(results: dict[str, Rows], scores: dict[str, dict[str, Score]]) -> Table:
    """A line for each document: how it ran, and the findings that each arm's summary holds."""
    first = next(iter(results))
    table = Table(title=f"what was written (prefill and timings: {first})")
    for heading in ("document", "tokens", "attention", "density", "first token s", "total s"):
        table.add_column(heading, justify="left" if heading in ("document", "attention") else "right", no_wrap=True)
    for arm in results:
        table.add_column(f"found: {arm}", justify="right", no_wrap=True)
    for document_id, row in sorted(results[first].items()):
        table.add_row(
            document_id,
            f"{row['prompt_tokens']:,}",
            row["attention"],
            f"{row['density']:.2f}",
            f"{row['time_to_first_token']:.1f}",
            f"{row['total_seconds']:.1f}",
            *(_found(scores[arm][document_id]) for arm in results),
        )
    return table


def _found(score: Score) -> str:
    return f"{score.found} of {score.planted}" if score.planted else "-"


def report(results: dict[str, Rows], findings: dict[str, list[str]], floor: float) -> bool:
    """Print what was found; whether the first arm found at least `floor` of the findings."""
    scores = {
        arm: {name: score(row["output"], findings.get(name, [])) for name, row in rows.items()}
        for arm, rows in results.items()
    }
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(result_table(results, scores))
    totals = {arm: sum(by_document.values(), Score()) for arm, by_document in scores.items()}
    for arm, total in totals.items():
        planted = {name for name in results[arm] if name in findings}
        density = sum(results[arm][name]["density"] for name in planted) / len(planted)
        wrong = sum(scores[arm][name].listed - scores[arm][name].found for name in planted)
        console.print(
            f"{arm}: {total.found} of {total.planted} findings ({total.recall:.1%}), {wrong} wrong lines, "
            f"mean density {density:.2f}"
        )
    first = next(iter(results))
    example = next(iter(findings))
    console.print(f"\nSummary of {example} ({first}):\n{results[first][example]['output']}\n", markup=False)
    enough = totals[first].recall >= floor
    if not enough:
        console.print(f"FAILED: fewer than {floor:.0%} of the findings were found")
    return enough


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=__doc__.splitlines()[0])
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output" / stamp, help="folder for the results")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=["stem", "dense"], help="the first one is judged"
    )
    parser.add_argument("--floor", type=float, default=0.95, help="share of the findings that must be found")
    args = parser.parse_args()

    started = time.monotonic()
    output = args.output.resolve()
    results = {arm: run_arm(arm, output / arm) for arm in dict.fromkeys(args.arms)}
    enough = report(results, read_findings(ROOT / "examples/findings.jsonl"), args.floor)
    print(f"Results: {output}/{args.arms[0]}/*.parquet; the demo took {time.monotonic() - started:.0f} s")
    return 0 if enough else 2


if __name__ == "__main__":
    sys.exit(main())
