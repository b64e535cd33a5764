"""The figures of a run, as plain values: what --format json prints and what page and table show."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.compute as pc

from jobs.report import clock
from jobs.report.results import Run
from pipeline.results.rows import PHASES, SUMMARY
from pipeline.results.summary import missing_rows

Measures = dict[str, Any]
SLOWEST, FAILED, REASONS = 10, 50, 20
TIMES = ("time_to_first_token", "queue_seconds", "prefill_seconds", "decode_seconds", "total_seconds")


def length_edges(runs: Sequence[Run]) -> list[int]:
    """Borders of prompt lengths, the same for all runs: powers of two, and steps between them if those are few."""
    tokens = np.concatenate([run.numbers("prompt_tokens")[run.ok] for run in runs] or [np.empty(0)])
    tokens = tokens[tokens > 0]
    if not len(tokens):
        return []
    low, high = math.floor(math.log2(tokens.min())), math.floor(math.log2(tokens.max())) + 1
    edges = [2**power for power in range(low, high + 1)]
    if len(edges) < 4:
        edges = sorted({edge * step // 4 for edge in edges[:-1] for step in (4, 5, 6, 7)} | {edges[-1]})
    first = max(0, int(np.searchsorted(edges, tokens.min(), side="right")) - 1)
    return edges[first : int(np.searchsorted(edges, tokens.max(), side="right")) + 1]


def measure(run: Run, edges: Sequence[int]) -> Measures:
    """All figures of a run; None where there is nothing to measure. Times in seconds, sizes in bytes.

    What is said of `documents` by length, density, device and reason counts rows: with several questions, answers.
    """
    counts = Counter(run.texts("status"))
    found, with_row = len(run.rows), len(set(run.texts("document_id")))
    tokens = run.numbers("prompt_tokens")
    values: Measures = {
        "name": run.name,
        "output": run.location,
        "state": run.state,
        "problem": run.problem,
        "documents": run.documents,
        "questions": run.questions,
        "rows": found,
        "without_row": _without_row(run, with_row),
        "documents_with_row": with_row,
        "counts": dict(sorted(counts.items())),
        "ok": counts["ok"],
        "failed": found - counts["ok"],
        "tried_again": run.documents_of(run.numbers("attempts") > 1),
        "truncated": run.documents_of(run.numbers("truncated_tokens") > 0),
        "cut_off": run.texts("finish_reason").count("length"),
        "in_parts": run.documents_of(run.numbers("parts") > 1),
        "prompt_tokens": _total(tokens[run.ok]),
        "read_tokens": _total(run.read_tokens[run.ok]),
        "output_tokens": _total(run.numbers("output_tokens")[run.ok]),
        "peak_gpu_bytes": _most(run.numbers("peak_gpu_bytes")),
        "workers": len(set(run.texts("worker")) - {""}),
    }
    values |= _speed(run)
    values |= {name: spread(run.numbers(name)[run.ok]) for name in TIMES}
    values["phase_seconds"] = phase_seconds(run, run.ok)
    values["density"] = density(run, run.ok)
    values["density_by_layer"] = density_by_layer(run, run.ok)
    values["by_length"] = [length_figures(run, low, high) for low, high in pairwise(edges)]
    values["ran"] = _how_it_ran(run)
    values["slowest"] = _slowest(run)
    values["reasons"], values["failures"] = _failures(run)
    values |= _about(run)
    return values


def spread(values: np.ndarray) -> dict[str, float] | None:
    """p50, p95 and the largest."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "max": float(values.max())}


def phase_seconds(run: Run, rows: np.ndarray) -> dict[str, float] | None:
    """Seconds of all these documents together, by phase; `other` is what is left of their time in a worker."""
    total = run.numbers("total_seconds")[rows]
    known = np.isfinite(total)
    if not known.any():
        return None
    phases = {phase: float(np.nansum(run.numbers(f"{phase}_seconds")[rows][known])) for phase in PHASES}
    return phases | {"other": max(0.0, float(total[known].sum()) - sum(phases.values()))}


def density(run: Run, rows: np.ndarray) -> dict[str, Any]:
    """How many documents ran sparse and dense, and the mean density of the sparse ones."""
    sparse = rows & (np.array(run.texts("attention"), dtype=object) == "stem")
    values = run.numbers("density")[sparse]
    values = values[np.isfinite(values)]
    return {
        "sparse_documents": int(sparse.sum()),
        "dense_documents": int(rows.sum() - sparse.sum()),
        "mean": float(values.mean()) if len(values) else None,
    }


def density_by_layer(run: Run, rows: np.ndarray) -> list[float] | None:
    """Mean density of each layer, the model's first one first, over those of the documents that ran sparse."""
    values = run.layers[rows]
    values = values[np.isfinite(values).all(1)]
    return values.mean(0, dtype=np.float64).tolist() if values.size else None


def length_figures(run: Run, low: int, high: int) -> Measures:
    """Figures of the ok documents with low <= prompt_tokens < high."""
    tokens = run.numbers("prompt_tokens")
    rows = run.ok & (tokens >= low) & (tokens < high)
    prefill = run.numbers("prefill_seconds")[rows]
    return {
        "from_tokens": low,
        "to_tokens": high,
        "documents": int(rows.sum()),
        "median_tokens": float(np.median(tokens[rows])) if rows.any() else None,
        "time_to_first_token": spread(run.numbers("time_to_first_token")[rows]),
        "total_seconds": spread(run.numbers("total_seconds")[rows]),
        "prefill_tokens_per_second": _rate(run.read_tokens[rows], prefill),
        "phase_seconds": phase_seconds(run, rows),
        "density": density(run, rows),
        "density_by_layer": density_by_layer(run, rows),
    }


def worked(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, starts, ends): numbers of the rows whose documents were in a worker, and when, seconds since 1970."""
    starts, ends = run.numbers("started_at"), run.numbers("finished_at")
    rows = np.flatnonzero(np.isfinite(starts) & np.isfinite(ends))
    return rows, starts[rows], np.maximum(starts[rows], ends[rows])


def _without_row(run: Run, with_row: int) -> int | None:
    """Rows that there are to be and are not: of documents, or of questions to them where it is known what is asked."""
    if run.documents is None:
        return None
    if run.asked is None:
        return max(run.documents - with_row, 0)
    questions = pc.fill_null(run.rows["question_id"], SUMMARY)
    return missing_rows(run.rows["document_id"], questions, run.documents, run.asked)


def _speed(run: Run) -> Measures:
    rows, starts, ends = worked(run)
    found = clock.sessions(starts, ends)
    seconds = clock.worked_seconds(found)
    tokens, output = run.read_tokens, run.numbers("output_tokens")
    in_worker = np.zeros(len(run.rows), bool)
    in_worker[rows] = True
    steps = np.maximum(output - 1, 0)  # the first token comes out of the prefill
    last = ends.max() if len(ends) else np.nan
    return {
        "started_at": _time(starts.min() if len(starts) else np.nan),
        "finished_at": _time(last),
        "worked_seconds": seconds if len(rows) else None,
        "runs": len(found),
        "documents_per_hour": run.documents_of(in_worker) / seconds * 3600 if seconds else None,
        "answers_per_hour": len(rows) / seconds * 3600 if seconds else None,
        "tokens_per_second": float(np.nansum(tokens[rows]) + np.nansum(output[rows])) / seconds if seconds else None,
        "prefill_tokens_per_second": _rate(tokens[run.ok], run.numbers("prefill_seconds")[run.ok]),
        "decode_tokens_per_second": _rate(steps[run.ok], run.numbers("decode_seconds")[run.ok]),
    }


def _how_it_ran(run: Run) -> list[Measures]:
    names = ("attention", "precision", "kernel", "gpu", "attention_reason")
    columns = [np.array(run.texts(name), dtype=object)[run.ok] for name in names]
    found: dict[tuple[str, ...], Measures] = {}
    for key, number in Counter(zip(*columns, strict=True)).items():
        values = found.setdefault((*key[:-1], _pattern(key[-1])), dict(zip(names, key, strict=True)) | {"documents": 0})
        values["documents"] += number
    return sorted(found.values(), key=lambda values: -values["documents"])[:REASONS]


def _slowest(run: Run) -> list[Measures]:
    """The documents that took longest, their waiting in the queue not counted."""
    own = run.numbers("total_seconds") - np.nan_to_num(run.numbers("queue_seconds"))
    known = np.flatnonzero(np.isfinite(own) & run.ok)
    rows = known[np.argsort(-own[known], kind="stable")[:SLOWEST]]
    names = ("document_id", "question_id", "prompt_tokens", "output_tokens", "density", "attention", *TIMES)
    return [{name: run.rows[name][int(row)].as_py() for name in names} for row in rows]


def _failures(run: Run) -> tuple[list[Measures], list[Measures]]:
    """(reasons with their number, the first failed documents)."""
    names = ("document_id", "question_id", "status", "error", "attempts", "prompt_tokens", "source")
    failed = run.rows.select(names).filter(~run.ok)
    reasons: dict[tuple[str, str], Measures] = {}
    for status, error in zip(failed["status"].to_pylist(), failed["error"].to_pylist(), strict=True):
        key = (status, _pattern(error or ""))
        reason = reasons.setdefault(key, {"status": status, "example": error or "", "documents": 0})
        reason["documents"] += 1
    ordered = sorted(reasons.values(), key=lambda reason: -reason["documents"])
    return ordered[:REASONS], failed.slice(0, FAILED).to_pylist()


def _pattern(text: str) -> str:
    """What texts have in common that differ in their numbers alone."""
    return re.sub(r"\d[\d,.]*", "#", text)


def _about(run: Run) -> Measures:
    about = run.manifest or {}
    names = ("config", "versions", "fingerprints", "start_seconds")
    return {name: about[name] if isinstance(about.get(name), dict) else None for name in names}


def _rate(amounts: np.ndarray, seconds: np.ndarray) -> float | None:
    known = np.isfinite(amounts) & np.isfinite(seconds)
    total = float(seconds[known].sum())
    return float(amounts[known].sum()) / total if total > 0 else None


def _total(values: np.ndarray) -> int:
    return int(np.nansum(values))


def _most(values: np.ndarray) -> int | None:
    values = values[np.isfinite(values)]
    return int(values.max()) if len(values) and values.max() > 0 else None


def _time(seconds: float) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if np.isfinite(seconds) else None
