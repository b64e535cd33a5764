"""The audit's rows: one for each document and arm, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.audit.likeness import exact_match, rouge_l
from jobs.audit.measure import ArmRun, Reference, same_tokens
from jobs.audit.sample import Sampled
from pipeline.errors import JobError, one_line
from pipeline.records import COLUMNS, Column, valid_text

Row = dict[str, Any]
ROWS, FIGURES, PAGE = "rows.parquet", "audit.json", "audit.html"

_TEXT, _INT, _REAL, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
# Columns that a job's results have too, and that mean the same here.
_SHARED = (
    "document_id", "source", "status", "error", "output", "finish_reason", "prompt_tokens", "output_tokens",
    "truncated_tokens", "precision", "attention", "attention_reason", "density", "kernel", "prefill_seconds",
    "decode_seconds", "peak_gpu_bytes",
)  # fmt: skip
AUDIT_COLUMNS: tuple[Column, ...] = (
    Column("arm", _TEXT, "preset, budget if it is not the preset's own, and precision", False),
    Column("preset", _TEXT, "dense, or the preset", False),
    Column("budget", _REAL, "share of the blocks that was asked for; null: the preset's own"),
    Column("first_token_seconds", _REAL, "from the engine's first step on the prompt to the first output token"),
    Column("decode_step_ms", _REAL, "milliseconds for each further token, beside the documents that decoded with it"),
    Column("first_token_agrees", _BOOL, "whether dense and this arm put the same token first; null for dense itself"),
    Column("first_token_kl", _REAL, "KL(dense || arm) of the first token's distribution, in nats"),
    Column("answer_kl", _REAL, "the same along dense's answer, reading it token by token: mean"),
    Column("token_agreement", _REAL, "share of those tokens where both put the same one first"),
    Column("compared_tokens", _INT, "tokens of dense's answer that were read so"),
    Column("rouge_l", _REAL, "ROUGE-L (F1) of the output against dense's, free-running"),
    Column("exact_match", _BOOL, "whether the output is dense's, white space around it apart"),
    Column("same_tokens", _INT, "leading tokens that the output has in common with dense's"),
)
_ALL = (*AUDIT_COLUMNS[:3], *(column for column in COLUMNS if column.name in _SHARED), *AUDIT_COLUMNS[3:])
SCHEMA = pa.schema([pa.field(c.name, c.type, c.nullable, metadata={"meaning": c.meaning}) for c in _ALL])


def rows_of(
    run: ArmRun, documents: Sequence[Sampled], reference: Reference, text: Callable[[Sequence[int]], str]
) -> list[Row]:
    """The rows of an arm. text: generated ids to what is compared and shown.

    The reference's own rows compare its second run with its first.
    """
    return [_row(run, document, reference, text) for document in documents]


def _row(run: ArmRun, document: Sampled, reference: Reference, text: Callable[[Sequence[int]], str]) -> Row:
    done, arm = run.completions[document.document_id], run.arm
    row: Row = dict.fromkeys(SCHEMA.names)
    row |= {
        "document_id": document.document_id,
        "source": document.source,
        "arm": arm.name,
        "preset": arm.preset,
        "budget": arm.budget,
        "precision": arm.precision,
        "status": done.status,
        "error": one_line(done.error) if done.error else "",
        "prompt_tokens": len(document.prompt),
        "truncated_tokens": document.truncated_tokens,
    }
    if done.status != "ok":
        return row
    further = done.output_tokens - 1
    output = text(done.token_ids)
    row |= {
        "attention": done.attention,
        "attention_reason": done.attention_reason,
        "density": done.density,
        "kernel": done.kernel,
        "output": output,
        "finish_reason": done.finish_reason,
        "output_tokens": done.output_tokens,
        "prefill_seconds": done.prefill_seconds,
        "decode_seconds": done.decode_seconds,
        "peak_gpu_bytes": done.peak_bytes,
        "first_token_seconds": done.prefill_seconds,
        "decode_step_ms": 1000 * done.decode_seconds / further if further else None,
    }
    wanted = reference.outputs.get(document.document_id)
    if wanted is not None:
        expected = text(wanted)
        row["rouge_l"], row["exact_match"] = rouge_l(output, expected), exact_match(output, expected)
        row["same_tokens"] = same_tokens(done.token_ids, wanted)
    likeness = run.likeness.get(document.document_id)
    return row | (vars(likeness) if likeness is not None else {})


def write_rows(rows: Sequence[Row], folder: Path) -> None:
    """rows.parquet, whole or not at all."""
    clean = [{name: valid_text(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]
    hidden = folder / f".{ROWS}"
    pq.write_table(pa.Table.from_pylist(clean, SCHEMA), hidden)
    hidden.replace(folder / ROWS)


def read_audit(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows and figures of an earlier audit. Raises JobError where there are none."""
    try:
        return pq.read_table(folder / ROWS).to_pylist(), json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise JobError(f"--report {folder}: it holds no audit ({ROWS} and {FIGURES}): {one_line(error)}") from None
