"""Summarise examples/documents with the bundled model and count the known findings that it keeps: python -m jobs.demo

`python -m jobs.demo` runs jobs.summarize, reads the Parquet back and prints what was found; then it asks questions of
one report, prints the answers with their evidence, and writes the result page. With more arms it runs the job once for
each; `--save` keeps their totals, and a run of fewer arms prints those beside its own. Exit code 0 if the first arm
found enough, 2 if it did not, 1 if a job failed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jobs.cli import Parser, command, run_main
from jobs.demo.outcome import Outcome, judge, print_comparison, print_outcomes, save_comparison
from jobs.demo.questions import ask
from jobs.demo.scoring import read_findings
from jobs.report.__main__ import main as report
from pipeline import read_results

ROOT = Path(__file__).parents[2]
COMPARISON = ROOT / "examples/comparison.json"
# The flags of each arm. "published": Stem's own scores and decay, no dense tail, at the density of "stem".
ARMS = {
    "stem": ["--config", "examples/demo.yaml"],
    "dense": ["--config", "examples/demo-dense.yaml"],
    "published": ["--config", "examples/demo.yaml", "--preset", "release", "--stride", "8", "--dense-tail", "0"],
}


def run_arm(arm: str, output: Path, findings: dict[str, list[str]]) -> Outcome:
    """Run jobs.summarize for one arm and judge the rows that it wrote. Raises SystemExit if the job fails."""
    words = ["-m", "jobs.summarize", *ARMS[arm], "--output", str(output)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    started = time.monotonic()
    status = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
    if status:
        raise SystemExit(f"the job for arm {arm!r} ended with exit code {status}")
    print(f"{arm}: {time.monotonic() - started:.0f} s with the start of Ray", flush=True)
    return judge(arm, read_results(output).to_pylist(), findings)


def main(arguments: Sequence[str]) -> int:
    """Run the arms and say what was found; the exit code."""
    parser = Parser(prog="python -m jobs.demo", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "demo_output" / stamp,
        help="folder for the results (default: demo_output/TIME)",
    )
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=["stem"], help="ways to run; the first one is judged"
    )
    parser.add_argument("--floor", type=float, default=0.95, help="share of the findings that must be found")
    parser.add_argument("--save", action="store_true", help=f"keep the totals in {COMPARISON.relative_to(ROOT)}")
    args = parser.parse_args(arguments)

    started = time.monotonic()
    output, findings = args.output.resolve(), read_findings(ROOT / "examples/findings.jsonl")
    outcomes = [run_arm(arm, output / arm, findings) for arm in dict.fromkeys(args.arms)]
    print_outcomes(outcomes)
    if args.save:
        save_comparison(COMPARISON, outcomes, f"python -m jobs.demo --arms {' '.join(args.arms)} --save")
    else:
        print_comparison(COMPARISON, without={outcome.arm for outcome in outcomes})
    ask(ROOT / "examples/documents/report-02.txt", ROOT / "examples/demo.yaml")
    print("\nThe result page, every output beside its document; open it in a browser:")
    report([str(output / args.arms[0])])
    print(f"Results: {output / args.arms[0]}; the demo took {time.monotonic() - started:.0f} s")
    print("This model only lists sentences that are marked as key findings; for other documents take another one, say:")
    print(f"{command('summarize')} --input reports/ --output results/ --model Qwen/Qwen3-8B")
    if outcomes[0].total.recall < args.floor:
        print(f"FAILED: {outcomes[0].arm} found fewer than {args.floor:.0%} of the findings")
        return 2
    return 0


if __name__ == "__main__":
    run_main(main)
