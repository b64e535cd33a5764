"""What a job came to, read back from its results."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.results.sink import part_names, read_columns
from pipeline.results.store import Store

_COLUMNS = (
    "status", "error", "document_id", "prompt_tokens", "output_tokens", "time_to_first_token", "decode_seconds",
    "density", "attention", "attention_reason", "truncated_tokens", "parts", "finish_reason",
    "flags",
)  # fmt: skip


@dataclass(frozen=True)
class JobReport:
    """The state of an output folder after a run.

    counts: documents by status. ttft: (p50, p95) seconds over documents that are ok, None without any.
    decode_rate: output tokens a second of one document while it decodes. density: mean over sparse documents.
    why_dense: of one of the documents that were to run sparse and did not, empty without any. truncated: documents
    that were cut to fit; cut: those whose outputs end at --max-new-tokens. flagged: outputs with flags;
    flags: how many have each one, most first.
    seconds, done_now: of this run alone; seconds from the first dispatch to the last row. stats: see pipeline.job.job.
    """

    output: str
    documents: int
    counts: dict[str, int]
    prompt_tokens: int = 0
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
        """Documents with an output."""
        return self.counts.get("ok", 0)

    @property
    def failed(self) -> int:
        """Documents whose row says why there is no output."""
        return sum(self.counts.values()) - self.ok

    @property
    def exit_code(self) -> int:
        """0 all ok, 2 some documents failed, 130 stopped before the end."""
        if self.stopped:
            return 130
        return 2 if self.failed else 0


def summarize_results(store: Store, documents: int, **run: Any) -> JobReport:
    """The report on an output folder; `run` are JobReport's fields that are of this run alone."""
    table = read_columns(store, _COLUMNS)
    counts = {str(item["values"]): int(item["counts"]) for item in pc.value_counts(table["status"]).to_pylist()}
    done = table.filter(pc.equal(table["status"], "ok")) if table.num_rows else table
    bad = table.filter(pc.not_equal(table["status"], "ok")).slice(0, 5).to_pylist() if table.num_rows else []
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
        prompt_tokens=int(np.nansum(_numbers(done, "prompt_tokens"))),
        output_tokens=int(np.nansum(out)),
        ttft=(float(np.nanpercentile(ttft, 50)), float(np.nanpercentile(ttft, 95)))
        if np.isfinite(ttft).any()
        else None,
        decode_rate=float(np.nansum(steps) / np.nansum(decode)) if np.nansum(decode) > 0 else None,
        sparse=int(sparse.sum()),
        density=float(np.nanmean(density[sparse])) if sparse.any() else None,
        why_dense=next((why for why, stem in zip(reasons, sparse, strict=True) if why and not stem), ""),
        truncated=int((_numbers(done, "truncated_tokens") > 0).sum()),
        cut=done["finish_reason"].to_pylist().count("length"),
        flagged=sum(map(bool, flags)),
        flags=dict(Counter(name for each in flags for name in each).most_common()),
        in_parts=int((_numbers(done, "parts") > 1).sum()),
        files=len(part_names(store)),
        first_errors=tuple((row["document_id"], row["status"], row["error"]) for row in bad),
        **run,
    )


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].cast(pa.float64()).to_pylist(), dtype=np.float64) if table.num_rows else np.empty(0)


def rows_for_table(report: JobReport) -> list[tuple[str, str]]:
    """The report as (what, figure) for a table."""
    failed = ", ".join(f"{count:,} {status}" for status, count in sorted(report.counts.items()) if status != "ok")
    missing = report.documents - sum(report.counts.values())
    lines = [("documents ok", f"{report.ok:,} of {report.documents:,}"), ("documents failed", failed or "0")]
    if missing > 0:
        lines.append(("documents without a row", f"{missing:,}; run the same command again to go on"))
    if report.cut:
        what = f"{report.cut:,} of {report.ok:,} end at --max-new-tokens; raise it for another output folder"
        lines.append(("outputs cut off", what))
    lines.append(("tokens", f"{report.prompt_tokens:,} in prompts, {report.output_tokens:,} generated"))
    if report.ttft:
        lines.append(("time to first token", f"p50 {report.ttft[0]:.3f} s, p95 {report.ttft[1]:.3f} s"))
    if report.decode_rate:
        lines.append(("decode", f"{report.decode_rate:,.1f} tokens/s in a document"))
    why, dense = f" ({report.why_dense})" if report.why_dense else "", report.ok - report.sparse
    if report.density is not None:
        with_stem = f"{report.density:.3f} over {_counted(report.sparse, 'document')} with Stem"
        lines.append(("density", with_stem + (f"; {dense:,} dense{why}" if dense else "")))
    else:
        lines.append(("density", f"1.000, all dense{why}" if report.ok else "-"))
    if report.truncated or report.in_parts:
        lines.append(("too long", f"{report.truncated:,} cut in the middle, {report.in_parts:,} processed in parts"))
    if report.seconds and report.done_now:
        rate = report.done_now / report.seconds * 3600
        lines.append(
            ("this run", f"{_counted(report.done_now, 'document')} in {report.seconds:.1f} s = {rate:,.0f} an hour")
        )
    lines.append(("results", f"{report.output} ({_counted(report.files, 'Parquet file')})"))
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)
