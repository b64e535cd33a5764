"""What lies between attention layers: row-wise kernels, linears and experts in bf16 and fp8, a model fused and unfused.

Each case is checked against float64 before it is timed, and must be no less exact than transformers' own operations in
the same precision; a case that fails gets no speed. GB/s count each operand once. Few rows are timed in CUDA graphs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from jobs.measurement import stamp
from tools.benchmark._measure import table, write_json
from tools.benchmark.elementwise.case import Case, measure
from tools.benchmark.elementwise.cases import DEVICE, linear_cases, row_cases
from tools.benchmark.elementwise.experts import expert_cases
from tools.benchmark.elementwise.models import model_cases
from tools.shapes import SHAPES

PARTS = ("rows", "linears", "experts", "model")
COLUMNS = {
    "part": "",
    "case": "",
    "rows": "d",
    "ms": ".4f",
    "GB/s": ".0f",
    "TFLOP/s": ".0f",
    "eager ms": ".4f",
    "faster": ".2f",
    "error": ".1e",
    "eager error": ".1e",
    "note": "",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 8192], help="tokens of the row-wise cases")
    parser.add_argument(
        "--linear-rows", type=int, nargs="+", default=[1, 8, 8192, 131072], help="tokens of linears and experts"
    )
    parser.add_argument("--model-rows", type=int, nargs="+", default=[1, 8192], help="tokens of the model cases")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model cases")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--idle", type=float, default=0.3, help="seconds of rest before a timing")
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="elementwise.json and .txt")


def main(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("tools.benchmark elementwise needs a CUDA device; torch sees none", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = False
    facts = {**stamp(torch.device(DEVICE), options.commit), "shape": options.shape}
    print("  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for part, count, case in _all_cases(options):
            rows.append({"part": part, "rows": count, **measure(case, count, options.idle)})
            print(table(rows[-1:], COLUMNS).splitlines()[1], flush=True)
            write_json(options.output / "elementwise.json", {**facts, "measurements": rows})
    text = table(rows, COLUMNS)
    (options.output / "elementwise.txt").write_text(text + "\n")
    print(text)
    failed = [row for row in rows if row["status"] != "ok"]
    for row in failed:
        print(f"failed: {row['case']} at {row['rows']} rows: {row['note']}", file=sys.stderr)
    return 1 if failed else 0


def _all_cases(options: argparse.Namespace) -> Iterator[tuple[str, int, Case]]:
    shape = SHAPES[options.shape]
    if "rows" in options.parts:
        for count in options.rows:
            for case in row_cases(shape, count):
                yield "rows", count, case
    if "linears" in options.parts:
        for count in options.linear_rows:
            for case in linear_cases(shape, count):
                yield "linears", count, case
            torch.cuda.empty_cache()
    if "experts" in options.parts:
        for count in options.linear_rows:
            for case in expert_cases(shape, count):
                yield "experts", count, case
            torch.cuda.empty_cache()
    if "model" in options.parts:
        for case, count in model_cases(shape, options.layers, options.model_rows):
            yield "model", count, case
