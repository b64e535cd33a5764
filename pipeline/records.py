"""The result row: one for every document, whatever became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import JobError, one_line

if TYPE_CHECKING:
    from pipeline.source import Document

STATUSES = {
    "ok": "the output is there",
    "error": "the document could not be read, tokenised or processed; `error` says why",
    "oom": "it did not fit the memory, even alone",
    "timeout": "it was not done by its deadline",
    "too_long": "prompt and output do not fit the model's context and the policy is not to cut",
    "worker_died": "its worker process ended each time it was tried, the last times alone",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A result column: name, Arrow type, whether it may be null, and its meaning."""

    name: str
    type: pa.DataType
    meaning: str
    nullable: bool = True


_TEXT, _INT, _REAL = pa.string(), pa.int64(), pa.float64()
_TIME = pa.timestamp("us", tz="UTC")

COLUMNS: tuple[Column, ...] = (
    Column("document_id", _TEXT, "the id column's value, else file name or file name and row", nullable=False),
    Column("source", _TEXT, "where the document was read: file, and line or row", nullable=False),
    Column("status", _TEXT, "one of " + ", ".join(STATUSES), nullable=False),
    Column("error", _TEXT, "why the status is not ok; empty if it is", nullable=False),
    Column(
        "attempts", pa.int32(), "times the document was given to a worker; 0 if the source already refused it", False
    ),
    Column("output", _TEXT, "the generated text; null unless ok"),
    Column(
        "finish_reason",
        _TEXT,
        "stop (end-of-sequence token) or length (cut off at max_new_tokens, or a part was); null unless ok",
    ),
    Column("prompt_tokens", _INT, "tokens of the prompt; all parts together where it was processed in parts"),
    Column("output_tokens", _INT, "tokens generated; all parts together where it was processed in parts"),
    Column("truncated_tokens", _INT, "tokens cut from the document's middle to make it fit"),
    Column("parts", pa.int32(), "1, or the number of parts that were processed alone before their outputs were merged"),
    Column(
        "precision",
        _TEXT,
        "fp8, bf16, fp16 or fp32: of the weights, the attention and its keys and values; behind fp8 the layers whose "
        "attention stays in another one, `fp8, layer 0 in bf16` say",
    ),
    Column("attention", _TEXT, "stem or dense, as it ran for this document"),
    Column("attention_reason", _TEXT, "why the attention is not the one asked for; empty if it is"),
    Column(
        "density",
        _REAL,
        "share of causal key blocks that prefill computed, over layers and heads, sliding windows included; 1 is all",
    ),
    Column(
        "density_by_layer",
        pa.list_(pa.float32()),
        "density of each layer, the model's first layer first; 1 in the leading layers that are dense",
    ),
    Column(
        "output_error",
        pa.float32(),
        "relative error of sparse prefill's attention output against dense attention's, in the sampled block of rows "
        "that is furthest off, mean over its rows and layers",
    ),
    Column("kernel", _TEXT, "implementation that ran; in brackets why not a faster one"),
    Column("queue_seconds", _REAL, "waiting in the worker for the tokeniser and the engine"),
    Column("load_seconds", _REAL, "reading the document from its source"),
    Column("tokenize_seconds", _REAL, "building the prompt and decoding the output"),
    Column("prefill_seconds", _REAL, "engine steps that read the prompt"),
    Column("decode_seconds", _REAL, "engine steps that wrote the output"),
    Column("total_seconds", _REAL, "from the worker's taking the document to its result"),
    Column(
        "time_to_first_token", _REAL, "seconds from the engine's first step on the prompt to the first output token"
    ),
    Column("peak_gpu_bytes", _INT, "most GPU memory allocated while the document was in the engine; 0 on a CPU"),
    Column("worker", _TEXT, "node and process that made the row"),
    Column("gpu", _TEXT, "name of the device"),
    Column("model", _TEXT, "path or hub id"),
    Column("config_hash", _TEXT, "fingerprint of all settings that can change an output"),
    Column("input_stamp", _TEXT, "size and time of change of the input file, and the document's place in it"),
    Column("input_hash", _TEXT, "of the text and kept columns as they were read; null if they could not be"),
    Column("kept_error", _TEXT, "kept columns that are null though the document has a value, and why; null if none is"),
    Column("started_at", _TIME, "UTC"),
    Column("finished_at", _TIME, "UTC"),
)
NAMES = tuple(column.name for column in COLUMNS)


def result_schema(extra: Sequence[pa.Field] = ()) -> pa.Schema:
    """The Parquet schema of results: COLUMNS, then the input's own columns.

    Raises JobError if a kept column has the name of a result column.
    """
    for field in extra:
        if field.name in NAMES:
            raise JobError(
                f"--keep-columns {field.name}: results have a column of that name; rename it or leave it out"
            )
    fields = [pa.field(c.name, c.type, c.nullable, metadata={"meaning": c.meaning}) for c in COLUMNS]
    return pa.schema([*fields, *(pa.field(field.name, field.type) for field in extra)])


def new_row(document_id: str, source: str, status: str, error: str = "", **values: Any) -> Row:
    """A row with every other column null. Raises KeyError for an unknown column name or status."""
    row: Row = dict.fromkeys(NAMES)
    row |= {"document_id": document_id, "source": source, "status": status, "error": error, "attempts": 0}
    if status not in STATUSES:
        raise KeyError(status)
    unknown = values.keys() - row.keys()
    if unknown:
        raise KeyError(sorted(unknown))
    return row | values


def error_row(document: Document, error: str, status: str = "error") -> Row:
    """The row of a document that no worker made one of."""
    return new_row(
        document.document_id, document.source, status, error, input_stamp=document.stamp, finished_at=utc_now()
    )


def is_cut(row: Row) -> bool:
    """Whether a row's output ends where --max-new-tokens cut it off."""
    return row["status"] == "ok" and row["finish_reason"] == "length"


def utc_now() -> datetime:
    """The present, in UTC."""
    return datetime.now(UTC)


def valid_text(text: str) -> str:
    """`text` with what UTF-8 cannot hold (lone surrogates) spelled out as \\uXXXX."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace").decode()
    return text


def to_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table of `schema`. Kept columns are arrays of one value in a row, or not there.

    A row that does not fit the schema (an engine gave a value of another type) becomes an error row, so that it cannot
    take its neighbours with it.
    """
    known = pa.schema([field for field in schema if field.name in NAMES])
    clean = [
        {name: valid_text(value) if isinstance(value, str) else value for name, value in row.items() if name in NAMES}
        for row in rows
    ]
    try:
        table = pa.Table.from_pylist(clean, schema=known)
    except _MISFITS:
        table = pa.concat_tables([_single(row, known) for row in clean])
    for field in schema:
        if field.name not in NAMES:
            null = pa.nulls(1, field.type)
            values = pa.chunked_array([row.get(field.name, null) for row in rows], field.type)
            table = table.append_column(field, values)
    return table


_MISFITS = (pa.ArrowException, UnicodeError, TypeError, ValueError, OverflowError)


def _single(row: Row, schema: pa.Schema) -> pa.Table:
    try:
        return pa.Table.from_pylist([row], schema=schema)
    except _MISFITS as error:
        message = one_line(f"its row does not fit the result schema: {error}")
        bad = new_row(row["document_id"], row["source"], "error", message)
        return pa.Table.from_pylist([bad | {"attempts": row["attempts"]}], schema=schema)
