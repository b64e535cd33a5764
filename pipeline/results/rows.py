"""A result row: one for every document and question, whatever became of it.

Its columns are fields of the dataclasses below, by who measures them. Schema, docs/results.md and what the parts of a
document add up to follow from the declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import JobError, one_line
from pipeline.results.columns import Column, column, columns_of, group, schema_of, utc_now, values_of
from pipeline.review.evidence import Passage
from pipeline.review.flags import FLAGS

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

# Who measures, and why there is nothing.
INPUT, ENGINE = "input", "engine"
NOT_OK = "the status is not ok"
NO_WORKER = "no worker made the row"
NOT_STARTED = "the engine did not start on the prompt"
# The column whose type is that of the job's --schema.
ANSWER = "answer"
MISFIT = "only in a row that did not fit the columns"
PASSAGES = pa.list_(
    pa.struct(
        {
            "output_start": pa.int32(), "output_end": pa.int32(), "start": pa.int64(), "end": pa.int64(),
            "score": pa.float32(),
        }
    )
)  # fmt: skip

# The value of a column for a document whose parts the engine read one by one.
Joined = Callable[[Sequence["EngineFields"], str], Any]


def total(parts: Sequence[EngineFields], name: str) -> Any:
    """The sum."""
    return sum(getattr(each, name) for each in parts)


def most(parts: Sequence[EngineFields], name: str) -> Any:
    """The largest."""
    return max(getattr(each, name) for each in parts)


def largest(parts: Sequence[EngineFields], name: str) -> Any:
    """The largest of those that were measured."""
    return max((value for each in parts if (value := getattr(each, name)) is not None), default=None)


def of_the_first(parts: Sequence[EngineFields], name: str) -> Any:
    """That of the part that came back first."""
    return getattr(parts[0], name)


def of_a_sparse_one(parts: Sequence[EngineFields], name: str) -> Any:
    """That of the first part that ran sparse, or of the first one if none did."""
    return getattr(next((each for each in parts if each.attention == "stem"), parts[0]), name)


def mean_by_tokens(parts: Sequence[EngineFields], name: str) -> Any:
    """The mean over the parts that have it, weighted with their prompt tokens."""
    known = [(value, each.prompt_tokens) for each in parts if (value := getattr(each, name)) is not None]
    read = sum(tokens for _, tokens in known)
    return sum(value * tokens for value, tokens in known) / read if read else None


def layers_by_tokens(parts: Sequence[EngineFields], name: str) -> Any:
    """mean_by_tokens of each layer; None if no part ran sparse."""
    if not any(each.attention == "stem" for each in parts):
        return None
    known = [(layers, each.prompt_tokens) for each in parts if (layers := getattr(each, name)) is not None]
    read = sum(tokens for _, tokens in known)
    weighted = ([density * tokens for density in layers] for layers, tokens in known)
    return tuple(sum(layer) / read for layer in zip(*weighted, strict=True))


def mean_by_steps(parts: Sequence[EngineFields], name: str) -> Any:
    """Tokens of all decode steps over the number of steps; the first token of a part comes with its prefill."""
    known = [(value, each.output_tokens - 1) for each in parts if (value := getattr(each, name))]
    steps = sum(tokens / value for value, tokens in known)
    return sum(tokens for _, tokens in known) / steps if steps else None


def reason_of_parts(parts: Sequence[EngineFields], name: str) -> Any:
    """Of the part that stands for the document; if parts of a sparse one went dense while they ran, theirs."""
    started = [each for each in parts if each.attention]
    given_up = [each for each in started if each.attention == "dense" and each.output_error is not None]
    if given_up and any(each.attention == "stem" for each in parts):
        return f"{len(given_up)} of {len(started)} prompts are dense: {getattr(given_up[0], name)}"
    return (of_a_sparse_one(parts, name) or "") if started else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a document, or of a part of it. Raises ValueError for an unknown status."""

    status: str = column("one of " + ", ".join(STATUSES))
    error: str = column("why the status is not ok; empty if it is", default="")
    output: str | None = column(
        "the generated text; null unless ok, but of an answer that is not what `--schema` asks for",
        null=f"{NOT_OK}, and `answer_error` is null", origin=ENGINE, default=None,
    )  # fmt: skip
    finish_reason: str | None = column(
        "stop (end-of-sequence token), stop_string (cut before a text of `--stop`) or length (cut off at max_new_tokens, "
        "or a part was); null unless ok",
        null=NOT_OK, origin=ENGINE, default=None,
    )  # fmt: skip
    reasoning: str | None = column(
        "what the model thought before its output, in a document of parts before the merged one; the status is error "
        "where it ended there",
        null="the model did not think, or gave nothing", origin=ENGINE, default=None,
    )  # fmt: skip
    flags: tuple[str, ...] | None = column(
        "what is suspicious about the output: " + ", ".join(FLAGS) + "; empty if nothing is (docs/evidence.md)",
        null=f"{NOT_OK}, or the review failed", arrow=pa.list_(pa.string()), origin="worker", default=None,
    )  # fmt: skip
    evidence: tuple[Passage, ...] | None = column(
        "for sentences of the output, or fields of a JSON answer, from character `output_start` to before "
        "`output_end`: passages of the document's text, from `start` to before `end`, that say the like, with a "
        "score of 0 to 1; a sentence without support has none (docs/evidence.md)",
        null=f"{NOT_OK}, `--evidence off`, or the review failed", arrow=PASSAGES, origin="worker", default=None,
    )  # fmt: skip
    answer: object | None = column(
        "the output as a value, by `--schema`: struct, list, text, number or true and false, as the schema has it; "
        "JSON text where Arrow has no type for that",
        null=f"without `--schema`, {NOT_OK}, or the answer is null", arrow=pa.string(), origin="worker", default=None,
    )  # fmt: skip
    answer_error: str | None = column(
        "why the output is no answer by `--schema`: it was cut off, say; the status is error then",
        null="without `--schema`, or nothing is wrong with the answer", origin="worker", default=None,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"the status of a row is one of {', '.join(STATUSES)}, got {self.status!r}")

    @property
    def is_cut(self) -> bool:
        """Whether the output ends where --max-new-tokens cut it off."""
        return self.status == "ok" and self.finish_reason == "length"


@dataclass(frozen=True, kw_only=True)
class EngineFields:
    """What the engine measures of a prompt, and so of a document. Of one that did not start, defaults stand."""

    prompt_tokens: int = column(
        "tokens of the prompt; all parts together where it was processed in parts",
        unit="tokens", joined=total, default=0,
    )  # fmt: skip
    prefix_tokens: int = column(
        "of these, tokens of the document that were read for another question; their prefill_seconds are in the row of "
        "that question, where this is 0",
        unit="tokens", joined=total, default=0,
    )  # fmt: skip
    output_tokens: int = column(
        "tokens generated; all parts together where it was processed in parts", unit="tokens", joined=total, default=0
    )
    attention: str | None = column(
        "stem or dense, as it ran for this document", null=NOT_STARTED, joined=of_a_sparse_one, default=None
    )
    attention_reason: str | None = column(
        "why the attention is not the one asked for; empty if it is",
        null=NOT_STARTED, joined=reason_of_parts, default=None,
    )  # fmt: skip
    density: float | None = column(
        "share of causal key blocks that prefill computed, over layers and heads, sliding windows included; 1 is all",
        null=NOT_STARTED, joined=mean_by_tokens, default=None,
    )  # fmt: skip
    density_by_layer: tuple[float, ...] | None = column(
        "density of each layer, the model's first layer first; 1 in the leading layers that are dense",
        null="`attention` is not stem", arrow=pa.list_(pa.float32()), joined=layers_by_tokens, default=None,
    )  # fmt: skip
    output_error: float | None = column(
        "relative error of sparse prefill's attention output against dense attention's, in the sampled block of rows "
        "that is furthest off, mean over its rows and layers",
        null="nothing was measured: without `--max-output-error`, or dense from the start", arrow=pa.float32(),
        joined=largest, default=None,
    )  # fmt: skip
    kernel: str | None = column(
        "implementation that ran; in brackets why not a faster one",
        null=NOT_STARTED, joined=of_a_sparse_one, default=None,
    )  # fmt: skip
    prefill_seconds: float = column("engine steps that read the prompt", unit="seconds", joined=total, default=0.0)
    decode_seconds: float = column("engine steps that wrote the output", unit="seconds", joined=total, default=0.0)
    tokens_per_step: float | None = column(
        "tokens that a decode step gave the document, mean; above 1 where prompt lookup found what came next",
        unit="tokens", null="no decode step gave it a token", arrow=pa.float32(), joined=mean_by_steps, default=None,
    )  # fmt: skip
    time_to_first_token: float | None = column(
        "seconds from the engine's first step on the prompt to the first output token",
        unit="seconds", null="no token was generated", joined=of_the_first, default=None,
    )  # fmt: skip
    peak_gpu_bytes: int = column(
        "most GPU memory allocated while the document was in the engine; 0 on a CPU",
        unit="bytes", joined=most, default=0,
    )  # fmt: skip

    @staticmethod
    def of_parts(parts: Sequence[EngineFields]) -> EngineFields:
        """Those of a document that the engine read in `parts`, one or more, in the order in which they came back."""
        own = fields(EngineFields)
        return EngineFields(**{item.name: item.metadata["joined"](parts, item.name) for item in own})


@dataclass(kw_only=True)
class WorkerFields:
    """What a worker measures of a document and knows of itself; it fills this in while the document is in work."""

    queue_seconds: float = column("waiting in the worker for the tokeniser and the engine", unit="seconds", default=0.0)
    load_seconds: float = column("reading the document from its source", unit="seconds", default=0.0)
    tokenize_seconds: float = column(
        "building the prompt, decoding the output, finding its evidence and flags", unit="seconds", default=0.0
    )
    total_seconds: float = column("from the worker's taking the document to its result", unit="seconds", default=0.0)
    truncated_tokens: int = column("tokens cut from the document's middle to make it fit", unit="tokens", default=0)
    parts: int = column(
        "1, or the number of parts that were processed alone before their outputs were merged",
        arrow=pa.int32(), default=1,
    )  # fmt: skip
    precision: str = column(
        "fp8, bf16, fp16 or fp32: of the weights, the attention and its keys and values; behind fp8 the layers whose "
        "attention stays in another one, `fp8, layer 0 in bf16` say"
    )
    worker: str = column("node and process that made the row")
    gpu: str = column("name of the device")
    model: str = column("path or hub id")
    config_hash: str = column("fingerprint of all settings that can change an output")
    prompt_hash: str = column(
        "of the question, the prompt template and what else is asked; manifest.json has it with the questions"
    )
    input_hash: str | None = column(
        "of the text and kept columns as they were read; null if they could not be",
        null=f"{NO_WORKER}, or the text could not be read", default=None,
    )  # fmt: skip
    page_starts: tuple[int, ...] | None = column(
        "characters of the document's text before each of its pages, the first page first",
        unit="characters", null=f"{NO_WORKER}, the format has no pages, or the text could not be read",
        arrow=pa.list_(pa.int64()), default=None,
    )  # fmt: skip
    input_note: str | None = column(
        "what of the document is not in its text: pages that are pictures, say",
        null="nothing is known to be missing", default=None,
    )  # fmt: skip
    kept_error: str | None = column(
        "kept columns that are null though the document has a value, and why; null if none is",
        null="the kept values are as they were", default=None,
    )  # fmt: skip
    started_at: datetime = column("UTC")


# The question_id of a document that is only summarised.
SUMMARY = "summary"


@dataclass(kw_only=True)
class Row:
    """The row of a document and question, its columns grouped by who measures them; values_of() has them flat.

    kept: columns of --keep-columns, arrays of one value; one that is not there is null.
    """

    document_id: str = column("the id column's value, else file name or file name and row", origin=INPUT)
    question_id: str = column(
        "name of the question: as given, or made of its words; summary for the plain summary, own-1, own-2 for those "
        "that the document brought along, own where they could not be read",
        origin=INPUT, default=SUMMARY,
    )  # fmt: skip
    question: str | None = column(
        "what was asked; where a prompt file places no question, its message with {{ document }} in the text's place",
        null="the document's own questions could not be read", origin=INPUT, default=None,
    )  # fmt: skip
    source: str = column("where the document was read: file, and line or row", origin=INPUT)
    outcome: Outcome = group(origin="who ended it: listing, worker or driver")
    attempts: int = column(
        "times the document was given to a worker; 0 if the source already refused it",
        arrow=pa.int32(), origin="driver", default=0,
    )  # fmt: skip
    from_engine: EngineFields | None = group(ENGINE, "the engine gave nothing back", default=None)
    from_worker: WorkerFields | None = group("worker", NO_WORKER, default=None)
    input_stamp: str | None = column(
        "size and time of change of the input file, and the document's place in it",
        null=MISFIT, origin=INPUT, default=None,
    )  # fmt: skip
    finished_at: datetime | None = column("UTC", null=MISFIT, origin="worker or driver", default=None)
    kept: Mapping[str, pa.Array] = field(default_factory=dict)


def failed_rows(document: Document, status: str, error: str) -> list[Row]:
    """The rows of a document that no worker has seen to its end, one for each question; `error` says why."""
    return [
        Row(
            document_id=document.document_id, question_id=name, question=text, source=document.source,
            outcome=Outcome(status=status, error=error), input_stamp=document.stamp, finished_at=utc_now(),
        )
        for name, text in document.questions or ((SUMMARY, None),)
    ]  # fmt: skip


COLUMNS: tuple[Column, ...] = tuple(columns_of(Row))
NAMES = tuple(each.name for each in COLUMNS)
# Of what total_seconds is made, in this order: the columns <phase>_seconds.
PHASES = ("queue", "load", "tokenize", "prefill", "decode")


def result_schema(extra: Sequence[pa.Field] = (), answer: pa.DataType | None = None) -> pa.Schema:
    """The Parquet schema of results: COLUMNS, then the input's own columns.

    answer: the type of the column `answer`; None: JSON text.
    Raises JobError if a kept column has the name of a result column.
    """
    for item in extra:
        if item.name in NAMES:
            raise JobError(f"--keep-columns {item.name}: results have a column of that name; rename it or leave it out")
    own = schema_of(COLUMNS)
    if answer is not None:
        at = own.get_field_index(ANSWER)
        own = own.set(at, own.field(at).with_type(answer))
    return pa.schema([*own, *(pa.field(item.name, item.type) for item in extra)])


def to_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table of `schema`.

    A row that does not fit the schema (an engine gave a value of another type) becomes an error row, so that it cannot
    take its neighbours with it.
    """
    known = pa.schema([item for item in schema if item.name in NAMES])
    try:
        table = pa.Table.from_pylist([values_of(row, COLUMNS) for row in rows], schema=known)
    except _MISFITS:
        table = pa.concat_tables([_single(row, known) for row in rows])
    for item in schema:
        if item.name not in NAMES:
            null = pa.nulls(1, item.type)
            values = pa.chunked_array([row.kept.get(item.name, null) for row in rows], item.type)
            table = table.append_column(item, values)
    return table


_MISFITS = (pa.ArrowException, UnicodeError, TypeError, ValueError, OverflowError)


def _single(row: Row, schema: pa.Schema) -> pa.Table:
    try:
        return pa.Table.from_pylist([values_of(row, COLUMNS)], schema=schema)
    except _MISFITS as error:
        message = one_line(f"its row does not fit the result schema: {error}")
        bad = Row(
            document_id=row.document_id, question_id=row.question_id, question=row.question, source=row.source,
            outcome=Outcome(status="error", error=message), attempts=row.attempts,
        )  # fmt: skip
        return pa.Table.from_pylist([values_of(bad, COLUMNS)], schema=schema)
