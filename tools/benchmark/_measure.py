"""Timing on a GPU, and how results are shown."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def isolated_ms(call: Callable[[], object], idle_seconds: float, repeats: int = 5, seconds: float = math.inf) -> float:
    """Median of `repeats` calls by GPU events, after an idle time that lets the clock recover; of fewer calls (at
    least one) where so many would take longer than `seconds`."""
    call()  # may compile
    once = _timed(call, 1)[0]
    time.sleep(idle_seconds)
    count = int(max(1.0, min(repeats, 1000 * seconds / max(once, 1e-6))))
    return sorted(_timed(call, count))[count // 2]


def sustained_ms(call: Callable[[], object], seconds: float, once_ms: float) -> float:
    """Mean of back-to-back calls over about `seconds`: what a long prefill sees once power limits the clock."""
    repeats = max(3, round(1000 * seconds / once_ms))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def _timed(call: Callable[[], object], repeats: int) -> list[float]:
    pairs = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as aligned text. columns: key -> format such as "8.2f", or "" for text; missing values show as -."""

    def cell(row: Mapping[str, Any], key: str) -> str:
        value = row.get(key)
        return "-" if value is None else format(value, columns[key])

    lines = [list(columns)] + [[cell(row, key) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    left = [not form for form in columns.values()]
    return "\n".join(
        "  ".join(text.ljust(w) if flag else text.rjust(w) for text, w, flag in zip(line, widths, left, strict=True))
        for line in lines
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
