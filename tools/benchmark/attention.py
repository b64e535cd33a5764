"""One attention layer, prefill: dense baselines, FlexAttention and our kernels on the same blocks.

Each case is checked against float64 before it is timed; a case that fails gets no speed. Once on sampled query blocks
of random tensors, and once row by row, up to the last, on values far from zero under nearly even weights, where sums
that lose bits show: `bias` is the mean signed error of the worst row, at most 0.1%.
TFLOP/s count executed blocks, 4 * 128 * 128 * D flops each, the diagonal ones in full. Results are written after
every length. --crossover adds short prompts, Stem at its default schedule against the fastest dense path.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.measurement import stamp
from stem_core.errors import first_line
from tools.benchmark._attention_cases import Case, crossover_cases, table_cases
from tools.benchmark._attention_check import error_of
from tools.benchmark._measure import isolated_ms, sustained_ms, table, write_json
from tools.benchmark._row_errors import BLOCK, even_operands, plain_operands, problem_of, row_errors, worst_bias

DEVICE = "cuda"
Operands = tuple[Tensor, Tensor, Tensor]
COLUMNS = {
    "tokens": "d",
    "case": "",
    "density": ".3f",
    "ms": ".3f",
    "TFLOP/s": ".0f",
    "vs cuDNN": ".2f",
    "sustained ms": ".3f",
    "sustained TFLOP/s": ".0f",
    "error": ".1e",
    "bias": "+.3%",
    "note": "",
}
CROSSOVER_LENGTHS = [4096, 6144, 8192, 12_288, 16_384]
CROSSOVER_COLUMNS = {
    "tokens": "d", "density": ".3f", "fastest dense": "", "dense ms": ".3f", "Stem ms": ".3f", "Stem faster by": ".2f",
}  # fmt: skip
# --quick: a table in some two minutes, where compiling and the slow baselines would take ten.
QUICK = {"idle": 0.3, "sustained": 0.0, "seconds": 0.3, "flex_lengths": [32_768, 131_072]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.12], help="shares of blocks kept")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="short rests and few repeats; the flags below still win")
    parser.add_argument("--idle", type=float, help="seconds of rest before a case's isolated timing (default 1.5)")
    parser.add_argument("--sustained", type=float, help="seconds of back-to-back calls, 0 for none (default 2)")
    parser.add_argument("--seconds", type=float, help="fewer than 9 repeats where they take longer (default 2)")
    parser.add_argument("--flex-lengths", type=int, nargs="*", help="lengths with FlexAttention (default: all)")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument("--without", nargs="*", default=[], help="leave out cases whose name contains one of these")
    parser.add_argument("--crossover", action="store_true", help="also, in full: from which length on Stem beats dense")
    parser.add_argument("--crossover-lengths", type=int, nargs="+", default=CROSSOVER_LENGTHS)
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark"), metavar="DIR", help="for attention.json, .txt and .png"
    )


def run(options: argparse.Namespace) -> int:
    """Measure and write; 0 if every check passed, else 1."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("tools.benchmark attention needs a CUDA device; torch sees none", file=sys.stderr)
        return 1
    for name, usual in {"idle": 1.5, "sustained": 2.0, "seconds": 2.0, "flex_lengths": options.lengths}.items():
        if getattr(options, name) is None:
            setattr(options, name, QUICK[name] if options.quick else usual)
    torch.backends.cuda.matmul.allow_tf32 = False
    facts = {
        **stamp(torch.device(DEVICE), options.commit),
        "heads": options.heads,
        "kv_heads": options.kv_heads,
        "head_dim": options.head_dim,
    }
    print("  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    rows: list[dict[str, Any]] = []
    short: list[dict[str, Any]] = []
    everything = argparse.Namespace(**vars(options) | {"only": [], "without": []})
    for length in options.crossover_lengths if options.crossover else []:
        short += _at_length(length, everything, crossover_cases)
        _write(options.output, facts, rows, short)
    for length in options.lengths:
        flex = length in options.flex_lengths
        rows += _at_length(length, options, partial(table_cases, densities=options.densities, flex=flex))
        _write(options.output, facts, rows, short)
    print((options.output / "attention.txt").read_text(), end="")
    _plot(rows, facts, options.output / "attention.png")
    failed = [row for row in [*rows, *short] if row["status"] == "failed"]
    for row in failed:
        print(f"failed: {row['case']} at {row['tokens']} tokens: {row['note']}", file=sys.stderr)
    return 1 if failed else 0


def _write(folder: Path, facts: dict[str, Any], rows: list[dict[str, Any]], short: list[dict[str, Any]]) -> None:
    crossover, dense_below = summarise_crossover(short)
    content = {**facts, "rows": rows, "crossover_rows": short, "crossover": crossover, "dense_below": dense_below}
    write_json(folder / "attention.json", content)
    text = table(rows, COLUMNS)
    if short:
        text += f"\n\n{table(crossover, CROSSOVER_COLUMNS)}\n"
        text += (
            "Stem is slower at the longest of these" if dense_below is None else f"dense_below: {dense_below} tokens"
        )
    (folder / "attention.txt").write_text(text + "\n")


def summarise_crossover(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int | None]:
    """A row for each length at which Stem and a dense path have a time; and the least of these lengths from which on
    Stem is never the slower one, None if it is at the longest."""
    summary = []
    for length in sorted({row["tokens"] for row in rows}):
        timed = [row for row in rows if row["tokens"] == length and row.get("ms")]
        stem = next((row for row in timed if row["case"] == "Stem"), None)
        dense = min((row for row in timed if row["case"] != "Stem"), key=lambda row: row["ms"], default=None)
        if stem and dense:
            summary.append(
                {
                    "tokens": length,
                    "density": stem["density"],
                    "fastest dense": dense["case"],
                    "dense ms": dense["ms"],
                    "Stem ms": stem["ms"],
                    "Stem faster by": dense["ms"] / stem["ms"],
                }
            )
    dense_below = None
    for row in reversed(summary):
        if row["Stem faster by"] < 1:
            break
        dense_below = row["tokens"]
    return summary, dense_below


def _at_length(
    length: int, options: argparse.Namespace, cases: Callable[[Tensor, Tensor, Tensor], Iterator[Case]]
) -> Iterator[dict[str, Any]]:
    """Measure the cases at one length; rows come in their order."""
    try:
        generator = torch.Generator(DEVICE).manual_seed(length)

        def projected(heads: int) -> Tensor:
            """As a transformers layer makes it: a transposed view of [1, L, heads * D]."""
            shape = (1, length, heads, options.head_dim)
            return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)

        q, k, v = projected(options.heads), projected(options.kv_heads), projected(options.kv_heads)
        even = even_operands(options.heads, options.kv_heads, length, options.head_dim, DEVICE)
        reference: float | None = None
        for case, same in zip(cases(q, k, v), cases(*even), strict=True):
            named = not options.only or any(part in case.name for part in options.only)
            if named and not any(part in case.name for part in options.without):
                row: dict[str, Any] = {"tokens": length, "case": case.name, "status": "ok", "note": case.note}
                row |= _measure(case, (q, k, v), same, even, options, reference)
                reference = row.get("ms") if case.name == "dense cuDNN" else reference
                print(table([row], COLUMNS).splitlines()[1], flush=True)
                yield row
    except torch.OutOfMemoryError:
        yield {"tokens": length, "case": "the rest", "status": "no memory", "note": "skipped: memory"}
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def _measure(
    case: Case, given: Operands, same: Case, even: Operands, options: argparse.Namespace, reference: float | None
) -> dict[str, Any]:
    """Check the case, then time it. same: the case on `even` operands. reference: dense cuDNN's ms at this length."""
    row: dict[str, Any] = {}
    q, k, v = given
    try:
        if case.attends:
            _check_rows(same, even, row)
        call, selection = case.prepare()
        if case.attends:
            row["density"] = selection.density() if selection else 1.0
            row["error"], allowed = error_of(call, selection, q, k, v, case.fp8)
            if not row["error"] <= 1.5 * allowed:
                raise ArithmeticError(f"error {row['error']:.1e}, allowed 1.5 * {allowed:.1e}")
        ms = isolated_ms(call, options.idle, 9, options.seconds)
        sustained = sustained_ms(call, options.sustained, ms) if options.sustained else None
    except torch.OutOfMemoryError:
        return row | {"status": "no memory", "note": "skipped: memory"}
    except Exception as error:  # one broken baseline must not cost the other figures
        return row | {"status": "failed", "note": first_line(error)}
    row |= {"ms": ms, "sustained ms": sustained}
    if case.attends:
        n = -(-q.shape[2] // BLOCK)
        blocks = row["density"] * n * (n + 1) / 2 * q.shape[1]
        gigaflops = 4 * BLOCK * BLOCK * q.shape[3] * blocks / 1e9
        # The row of dense cuDNN is its own reference.
        row |= {
            "TFLOP/s": gigaflops / ms,
            "vs cuDNN": (ms if case.name == "dense cuDNN" else reference or 0) / ms or None,
        }
        row["sustained TFLOP/s"] = gigaflops / sustained if sustained else None
    return row


def _check_rows(same: Case, even: Operands, row: dict[str, Any]) -> None:
    """Enter the errors row by row. Raises ArithmeticError for a row that is past its limits."""
    call, selection = same.prepare()
    out = call()
    assert isinstance(out, Tensor)
    errors = row_errors(out, same.fp8.biased if same.fp8 else plain_operands(*even), selection)
    row |= {"bias": worst_bias(errors), "rows": [asdict(error) for error in errors]}
    if problem := problem_of(errors):
        raise ArithmeticError(problem)


def _plot(rows: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """Speed against dense cuDNN over the prompt length."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is missing (pip install -e '.[bench]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    for name in dict.fromkeys(row["case"] for row in rows):
        points = sorted((x for x in rows if x["case"] == name and x.get("TFLOP/s")), key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in points]
        if points:
            left.plot(tokens, [row["vs cuDNN"] or float("nan") for row in points], marker="o", label=name)
            right.plot(tokens, [row["TFLOP/s"] for row in points], marker="o", label=name)
    for axis, title in ((left, "times faster than dense cuDNN"), (right, "executed TFLOP/s")):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("prompt tokens")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    left.set_yscale("log", base=2)
    left.legend(fontsize=7)
    where = facts.get("gpu", facts["device"])
    figure.suptitle(f"{where}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
