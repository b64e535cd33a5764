"""One row for each question and arm, as Parquet."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.evaluate.documents import Span
from jobs.evaluate.prompts import Text
from jobs.evaluate.reader import Answer
from pipeline.errors import JobError

Row = dict[str, Any]
SCHEMA = pa.schema(
    [
        ("document", pa.string()),
        ("kind", pa.string()),
        ("task", pa.string()),
        ("length", pa.int32()),  # asked for; the prompt has a little less
        ("prompt_tokens", pa.int32()),
        ("depth", pa.float32()),  # of the needle, or mean of several; null where the whole document is the needle
        ("arm", pa.string()),
        ("precision", pa.string()),
        ("block_size", pa.int32()),  # 0 for dense
        ("density", pa.float32()),  # computed share of the causal blocks in the sparsest layer
        ("mean_density", pa.float32()),  # over all layers, leading dense ones included
        ("config", pa.string()),  # fingerprint of the StemConfig
        ("question", pa.string()),
        ("references", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("recall", pa.float32()),  # share of the references in the answer, of a list in their order; null along text
        ("exact", pa.bool_()),  # the answer is the expected one word for word; null where wordings may differ
        ("top1", pa.float32()),  # of a lookup: share of the value's tokens put first; along text: agreement with dense
        ("kl", pa.float32()),  # nats, against dense in the first precision; of a question at the first token
        ("nll", pa.float32()),  # nats a token, of a lookup's value and of text
        ("prefill_seconds", pa.float32()),  # of the document, shared by its questions
        ("answer_seconds", pa.float32()),
    ]
)
# The engine's precisions. What the first of them that ran found is what the others are compared with.
BY_EXACTNESS = ("fp32", "fp16", "bf16", "fp8")


def recall_of(answer: str, references: Sequence[str]) -> float:
    """RULER's string match: the share of the references that the answer contains, whatever their case."""
    said = answer.lower()
    return sum(reference.lower() in said for reference in references) / len(references)


def ordered_recall(answer: str, references: Sequence[str]) -> float:
    """The share of the references that the answer contains in their order: the longest rising run of their places."""
    said = answer.lower()
    places = [place for reference in references if (place := said.find(reference.lower())) >= 0]
    run: list[int] = []
    for place in places:
        at = bisect_left(run, place)
        run[at : at + 1] = [place]
    return len(run) / len(references)


def row_of(answer: Answer, precision: str, decode: Callable[[Sequence[int]], str]) -> Row:
    """The result row of an answer. decode: ids to text without control tokens."""
    config = answer.arm.config
    row: Row = dict.fromkeys(SCHEMA.names) | {
        "prompt_tokens": answer.prompt_tokens,
        "arm": answer.arm.name,
        "precision": precision,
        "block_size": config.block_size if config else 0,
        "density": answer.density[0],
        "mean_density": answer.density[1],
        "config": config.fingerprint() if config else "",
        "top1": answer.top1,
        "kl": answer.kl,
        "nll": answer.nll,
        "prefill_seconds": answer.prefill_seconds,
        "answer_seconds": answer.answer_seconds,
    }
    if isinstance(answer.document, Text):
        text = answer.document
        return row | {"document": text.name, "kind": text.kind, "length": text.length, "task": f"text {answer.part}"}
    document = answer.document.document
    row |= {"document": document.name, "kind": document.kind, "length": document.length}
    if answer.lookup is not None:
        lookup = answer.lookup.lookup
        return row | {
            "task": lookup.task,
            "depth": _depth([lookup.second], document.text),
            "question": "",
            "references": [lookup.value],
            "answer": "",
            "recall": float(answer.correct),
            "exact": answer.correct,
        }
    assert answer.prompt is not None
    said, question = decode(answer.token_ids), answer.prompt.question
    recall = ordered_recall if question.task == "summary" else recall_of
    return row | {
        "task": question.task,
        "depth": _depth(question.needles, document.text),
        "question": question.text,
        "references": list(question.references),
        "answer": said,
        "recall": recall(said, question.references),
        "exact": said.strip() == question.expected if question.expected else None,
    }


def _depth(spans: Sequence[Span], text: str) -> float | None:
    return float(np.mean([first for first, _ in spans])) / len(text) if spans else None


def write_rows(rows: Sequence[Row], folder: Path, part: int) -> None:
    """One part; a reader never sees half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden = folder / f".part-{part:04}"
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), hidden)
    hidden.rename(folder / f"part-{part:04}.parquet")


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """The rows of one or more evaluations, each once. Raises JobError where there are none."""
    rows: dict[Any, Row] = {}
    for folder in folders:
        parts = sorted((folder / "rows").glob("part-*.parquet"))
        if not parts:
            raise JobError(f"{folder} holds no rows of an evaluation (rows/part-*.parquet)")
        for part in parts:
            table = pq.read_table(part)
            if table.schema.names != SCHEMA.names:
                raise JobError(f"{part} was written by another version of jobs.evaluate: evaluate again")
            for row in table.to_pylist():
                rows[setting_key(row), question_key(row)] = row
    return list(rows.values())


def question_key(row: Row) -> tuple[Any, ...]:
    """The same for one question under all arms."""
    return row["length"], row["document"], row["task"], row["question"], row["depth"]


def setting_key(row: Row) -> tuple[Any, ...]:
    """One arm as it ran: everything that tells its rows from those of the others."""
    return row["length"], row["arm"], row["config"], row["precision"]
