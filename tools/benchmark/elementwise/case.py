"""One thing to measure: checked against float64, then timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.quantize import QuantizedRows
from stem_core.errors import first_line
from tools.benchmark._measure import isolated_ms, sustained_ms

SAMPLE = 128  # rows at either end that are compared with float64


@dataclass
class Case:
    """ours and eager compute the same; exact gives float64 for the first SAMPLE and last SAMPLE rows.

    moved: bytes read and written by ours. flops: of a linear. slack: allowed error over that of eager.
    compared: whether eager answers the same question as ours, so that its error says something.
    checked, checked_eager: what is compared with `exact` where that is not what is timed."""

    name: str
    ours: Callable[[], Any]
    eager: Callable[[], Any] | None
    exact: Callable[[], Tensor]
    moved: int = 0
    flops: int = 0
    slack: float = 1.05
    note: str = ""
    compared: bool = True
    checked: Callable[[], Any] | None = None
    checked_eager: Callable[[], Any] | None = None


def measure(case: Case, count: int, idle: float) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "status": "ok", "note": case.note}
    try:
        exact = case.exact()
        row["error"] = relative_error((case.checked or case.ours)(), exact)
        if case.eager is not None and case.compared:
            row["eager error"] = relative_error((case.checked_eager or case.eager)(), exact)
            if not row["error"] <= case.slack * row["eager error"] + 1e-6:
                raise ArithmeticError(f"error {row['error']:.2e}, that of eager is {row['eager error']:.2e}")
        ms = time_ms(case.ours, count, idle)
        eager = None if case.eager is None else time_ms(case.eager, count, idle)
    except Exception as error:  # one broken case must not cost the other figures
        return row | {"status": "failed", "note": first_line(error)}
    row |= {"ms": ms, "eager ms": eager, "faster": None if eager is None else eager / ms}
    row["GB/s"] = case.moved / ms / 1e6 if case.moved else None
    row["TFLOP/s"] = case.flops / ms / 1e9 if case.flops else None
    return row


def time_ms(call: Callable[[], Any], count: int, idle: float) -> float:
    if count >= 1024:
        once = isolated_ms(call, idle)
        return sustained_ms(call, 0.3, once)
    return graph_ms(call)


def graph_ms(call: Callable[[], Any], repeats: int = 20) -> float:
    """Milliseconds of one call in a CUDA graph that holds `repeats` of them: without the host, as decoding runs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    return isolated_ms(graph.replay, 0.05) / repeats


def relative_error(got: Any, exact: Tensor) -> float:
    """Of the first and last SAMPLE rows, root mean square against float64; NaN where anything is not finite."""
    if isinstance(got, QuantizedRows):
        got = dequantised_ends(got)
    parts = got if isinstance(got, tuple) else (got,)
    joined = torch.cat([ends(part).double().flatten(1) for part in parts], dim=1)
    if not all(bool(part.isfinite().all()) for part in parts):
        return float("nan")
    return float((joined - exact).norm() / exact.norm())


def dequantised_ends(rows: QuantizedRows) -> Tensor:
    """`ends` of the rows that fp8 rows stand for, float64."""
    return ends(rows.values.view(torch.uint8)).view(rows.values.dtype).double() * ends(rows.scales).double()


def ends(x: Tensor) -> Tensor:
    """The first and last SAMPLE of the leading dimension, or all of it if it is short."""
    return x if len(x) <= 2 * SAMPLE else torch.cat((x[:SAMPLE], x[-SAMPLE:]))
