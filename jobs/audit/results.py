"""The audit's rows: one for each document and arm, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.audit.likeness import exact_match, rouge_l
from jobs.audit.measure import ArmRun, Likeness, Reference, same_tokens
from jobs.audit.sample import Sampled
from pipeline.errors import JobError, one_line
from pipeline.results.columns import column, columns_of, from_values, group, same_as, schema_of, values_of
from pipeline.results.rows import NOT_OK, EngineFields, Outcome, Row, WorkerFields

ROWS, FIGURES, PAGE = "rows.parquet", "audit.json", "audit.html"


@dataclass(frozen=True, kw_only=True)
class OutputLikeness:
    """An output against that of dense attention, each written freely."""

    rouge_l: float = column("ROUGE-L (F1) of the output against dense's, free-running")
    exact_match: bool = column("whether the output is dense's, white space around it apart")
    same_tokens: int = column("leading tokens that the output has in common with dense's", unit="tokens")


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """A document under an arm; columns that a job's results have too mean the same here."""

    arm: str = column("preset, budget if it is not the preset's own, and precision")
    preset: str = column("dense, or the preset")
    budget: float | None = column("share of the blocks that was asked for", null="it is the preset's own", default=None)
    document_id: str = same_as(Row, "document_id")
    source: str = same_as(Row, "source")
    outcome: Outcome = group("engine")
    from_engine: EngineFields = group("engine")
    truncated_tokens: int = same_as(WorkerFields, "truncated_tokens")
    precision: str = same_as(WorkerFields, "precision")
    first_token_seconds: float | None = column(
        "from the engine's first step on the prompt to the first output token", unit="seconds", null=NOT_OK,
        default=None,
    )  # fmt: skip
    decode_step_ms: float | None = column(
        "for each further token, beside the documents that decoded with it",
        unit="milliseconds", null=f"{NOT_OK}, or there is one output token", default=None,
    )  # fmt: skip
    likeness: Likeness | None = group("audit", "the arm is what is compared with, or dense has no output", default=None)
    output_likeness: OutputLikeness | None = group("audit", f"{NOT_OK}, or dense has no output", default=None)


AUDIT_COLUMNS = tuple(columns_of(AuditRow))
SCHEMA = schema_of(AUDIT_COLUMNS)


def rows_of(
    run: ArmRun, documents: Sequence[Sampled], reference: Reference, text: Callable[[Sequence[int]], str]
) -> list[AuditRow]:
    """The rows of an arm. text: generated ids to what is compared and shown.

    The reference's own rows compare its second run with its first.
    """
    return [_row(run, document, reference, text) for document in documents]


def _row(run: ArmRun, document: Sampled, reference: Reference, text: Callable[[Sequence[int]], str]) -> AuditRow:
    done, arm = run.completions[document.document_id], run.arm
    row = AuditRow(
        arm=arm.name, preset=arm.preset, budget=arm.budget, document_id=document.document_id, source=document.source,
        outcome=Outcome(status=done.status, error=one_line(done.error) if done.error else ""),
        from_engine=EngineFields.of_parts([done]), truncated_tokens=document.truncated_tokens, precision=arm.precision,
    )  # fmt: skip
    if done.status != "ok":
        return row
    further = done.output_tokens - 1
    output = text(done.token_ids)
    row = replace(
        row,
        outcome=replace(row.outcome, output=output, finish_reason=done.finish_reason),
        first_token_seconds=done.prefill_seconds,
        decode_step_ms=1000 * done.decode_seconds / further if further else None,
        likeness=run.likeness.get(document.document_id),
    )
    wanted = reference.outputs.get(document.document_id)
    if wanted is None:
        return row
    expected = text(wanted)
    likeness = OutputLikeness(
        rouge_l=rouge_l(output, expected), exact_match=exact_match(output, expected),
        same_tokens=same_tokens(done.token_ids, wanted),
    )  # fmt: skip
    return replace(row, output_likeness=likeness)


def write_rows(rows: Sequence[AuditRow], folder: Path) -> None:
    """rows.parquet, whole or not at all."""
    hidden = folder / f".{ROWS}"
    pq.write_table(pa.Table.from_pylist([values_of(row, AUDIT_COLUMNS) for row in rows], SCHEMA), hidden)
    hidden.replace(folder / ROWS)


def read_audit(folder: Path) -> tuple[list[AuditRow], dict[str, Any]]:
    """Rows and figures of an earlier audit. Raises JobError where there are none."""
    try:
        rows = [from_values(AuditRow, values) for values in pq.read_table(folder / ROWS).to_pylist()]
        return rows, json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise JobError(f"--report {folder}: it holds no audit ({ROWS} and {FIGURES}): {one_line(error)}") from None
