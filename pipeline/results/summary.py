"""What a job came to, read back from its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.results.parts import part_names, read_columns, read_part
from pipeline.results.rows import SUMMARY
from pipeline.results.store import Store

_COLUMNS = (
    "status", "error", "document_id", "prompt_tokens", "output_tokens", "time_to_first_token", "decode_seconds",
    "density", "attention", "attention_reason", "truncated_tokens", "parts", "finish_reason", "flags", "question_id",
    "prefix_tokens",
)  # fmt: skip

# Parts of the start that the table names; all are in the manifest and on the report's page.
START_PARTS = 4


@dataclass(frozen=True)
class JobReport:
    """The state of an output folder after a run.

    counts: rows by status, one for each document and question. missing: rows that there are to be and are not yet.
    questions: how many the rows answer. ttft: (p50, p95) seconds over rows that are ok, None without any.
    prefix_tokens: of prompt_tokens, those that were read for another question already.
    decode_rate: output tokens a second of one document while it decodes. density: mean over sparse documents.
    why_dense: of one of the documents that were to run sparse and did not, empty without any. truncated: documents
    that were cut to fit; cut: outputs that end at --max-new-tokens. flagged: outputs with flags;
    flags: how many have each one, most first.
    seconds, done_now: of this run alone; seconds from the first dispatch to the last row. stats: see pipeline.job.job.
    """

    output: str
    documents: int
    counts: dict[str, int]
    missing: int = 0
    questions: int = 1
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    output_tokens: int = 0
    ttft: tuple[float, float] | None = None
    decode_rate: float | None = None
    sparse: int = 0
    density: float | None = None
    why_dense: str = ""
    truncated: int = 0
    cut: int = 0
    flagged: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    in_parts: int = 0
    files: int = 0
    first_errors: tuple[tuple[str, str, str], ...] = ()
    done_now: int = 0
    seconds: float = 0.0
    stopped: bool = False
    messages: tuple[str, ...] = ()
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> int:
        """Rows with an output."""
        return self.counts.get("ok", 0)

    @property
    def failed(self) -> int:
        """Rows that say why there is no output."""
        return sum(self.counts.values()) - self.ok

    @property
    def exit_code(self) -> int:
        """0 all ok, 2 some documents failed, 130 stopped before the end."""
        if self.stopped:
            return 130
        return 2 if self.failed else 0


def summarize_results(store: Store, documents: int, asked: Sequence[str] = (SUMMARY,), **run: Any) -> JobReport:
    """The report on an output folder; `run` are JobReport's fields that are of this run alone.

    asked: names of the questions to every document; `own` for those that documents bring along.
    """
    table = read_columns(store, _COLUMNS)
    questions = table["question_id"]
    counts = {str(item["values"]): int(item["counts"]) for item in pc.value_counts(table["status"]).to_pylist()}
    done = table.filter(pc.equal(table["status"], "ok")) if table.num_rows else table
    bad = _first_failed(table) if table.num_rows else []
    ttft, decode, out, density = (
        _numbers(done, name) for name in ("time_to_first_token", "decode_seconds", "output_tokens", "density")
    )
    sparse = np.array([value == "stem" for value in done["attention"].to_pylist()], dtype=bool)
    reasons = done["attention_reason"].to_pylist()
    flags = [tuple(value or ()) for value in done["flags"].to_pylist()]
    # The first token comes out of the prefill; decode steps made the others.
    steps = np.maximum(out - 1, 0)
    return JobReport(
        output=store.name,
        documents=documents,
        counts=counts,
        missing=missing_rows(table["document_id"], questions, documents, asked),
        questions=max(1, len(pc.unique(questions))),
        prefix_tokens=int(np.nansum(_numbers(done, "prefix_tokens"))),
        prompt_tokens=int(np.nansum(_numbers(done, "prompt_tokens"))),
        output_tokens=int(np.nansum(out)),
        ttft=(float(np.nanpercentile(ttft, 50)), float(np.nanpercentile(ttft, 95)))
        if np.isfinite(ttft).any()
        else None,
        decode_rate=float(np.nansum(steps) / np.nansum(decode)) if np.nansum(decode) > 0 else None,
        sparse=int(sparse.sum()),
        density=float(np.nanmean(density[sparse])) if sparse.any() else None,
        why_dense=next((why for why, stem in zip(reasons, sparse, strict=True) if why and not stem), ""),
        truncated=_documents(done, _numbers(done, "truncated_tokens") > 0),
        cut=done["finish_reason"].to_pylist().count("length"),
        flagged=sum(map(bool, flags)),
        flags=dict(Counter(name for each in flags for name in each).most_common()),
        in_parts=_documents(done, _numbers(done, "parts") > 1),
        files=len(part_names(store)),
        first_errors=tuple((_who(row, len(asked) > 1), row["status"], row["error"]) for row in bad),
        **run,
    )


def first_outputs(store: Store, count: int) -> list[tuple[str, str, tuple[str, ...]]]:
    """Of the first `count` rows that are ok: whose they are, the output, its flags. Reads no more parts than needed."""
    found: list[tuple[str, str, tuple[str, ...]]] = []
    for name in part_names(store):
        with store.named_failures(f"{name} cannot be read"):
            table = read_part(store, name, ("document_id", "question_id", "status", "output", "flags"))
        for row in table.filter(pc.equal(table["status"], "ok")).slice(0, count - len(found)).to_pylist():
            found.append((_who(row, row["question_id"] != SUMMARY), row["output"] or "", tuple(row.get("flags") or ())))
        if len(found) >= count:
            break
    return found


def _first_failed(table: pa.Table, most: int = 5) -> list[dict[str, Any]]:
    """The first failed rows, one of a document: what cannot be read fails with each of its questions."""
    failed = table.filter(pc.not_equal(table["status"], "ok"))
    first: dict[str, int] = {}
    for place, name in enumerate(failed["document_id"].to_pylist()):
        first.setdefault(name, place)
        if len(first) == most:
            break
    return list(failed.take(pa.array(first.values(), pa.int64())).to_pylist())


def missing_rows(ids: pa.ChunkedArray, questions: pa.ChunkedArray, documents: int, asked: Sequence[str]) -> int:
    """Rows that are not there: of each question to each document; of documents' own questions, one for all of them."""
    own = pc.match_substring_regex(questions, r"^own(-\d+)?$")
    there = pc.sum(pc.is_in(questions, value_set=pa.array([name for name in asked if name != "own"], pa.string())))
    found = int(there.as_py() or 0) + (len(pc.unique(ids.filter(own))) if "own" in asked else 0)
    return max(0, documents * len(asked) - found)


def _documents(table: pa.Table, rows: np.ndarray) -> int:
    """How many documents some rows (bool [rows]) are about."""
    return len(pc.unique(table["document_id"].filter(pa.array(rows, pa.bool_()))))


def _who(row: dict[str, Any], with_question: bool) -> str:
    return f"{row['document_id']} ({row['question_id']})" if with_question else str(row["document_id"])


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].cast(pa.float64()).to_pylist(), dtype=np.float64) if table.num_rows else np.empty(0)


def rows_for_table(report: JobReport) -> list[tuple[str, str]]:
    """The report as (what, figure) for a table."""
    failed = ", ".join(f"{count:,} {status}" for status, count in sorted(report.counts.items()) if status != "ok")
    many = report.questions > 1
    what = "answers" if many else "documents"
    there_are = sum(report.counts.values()) + report.missing
    lines = [("documents", f"{report.documents:,}, {report.questions:,} questions")] if many else []
    lines += [(f"{what} ok", f"{report.ok:,} of {there_are:,}"), (f"{what} failed", failed or "0")]
    if report.missing:
        named = "answers not there yet" if many else "documents without a row"
        lines.append((named, f"{report.missing:,}; run the same command again to go on"))
    if report.cut:
        told = f"{report.cut:,} of {report.ok:,} end at --max-new-tokens; raise it for another output folder"
        lines.append(("outputs cut off", told))
    once = f" ({report.prompt_tokens - report.prefix_tokens:,} read)" if report.prefix_tokens else ""
    lines.append(("tokens", f"{report.prompt_tokens:,} in prompts{once}, {report.output_tokens:,} generated"))
    if report.ttft:
        lines.append(("time to first token", f"p50 {report.ttft[0]:.3f} s, p95 {report.ttft[1]:.3f} s"))
    if report.decode_rate:
        lines.append(("decode", f"{report.decode_rate:,.1f} tokens/s in a document"))
    why, dense = f" ({report.why_dense})" if report.why_dense else "", report.ok - report.sparse
    if report.density is not None:
        with_stem = f"{report.density:.3f} over {_counted(report.sparse, what[:-1])} with Stem"
        lines.append(("density", with_stem + (f"; {dense:,} dense{why}" if dense else "")))
    else:
        lines.append(("density", f"1.000, all dense{why}" if report.ok else "-"))
    if report.truncated or report.in_parts:
        lines.append(("too long", f"{report.truncated:,} cut in the middle, {report.in_parts:,} processed in parts"))
    if report.seconds and report.done_now:
        rate = report.done_now / report.seconds * 3600
        lines.append(
            ("this run", f"{_counted(report.done_now, what[:-1])} in {report.seconds:.1f} s = {rate:,.0f} an hour")
        )
    start: dict[str, float] = report.stats.get("start_seconds") or {}
    if start:
        longest = sorted(start.items(), key=lambda part: -part[1])[:START_PARTS]
        told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in longest)
        lines.append(("start", f"{sum(start.values()):.1f} s until a worker was ready, most of it: {told}"))
    lines.append(("results", f"{report.output} ({_counted(report.files, 'Parquet file')})"))
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)
