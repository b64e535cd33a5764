"""One row for each question and arm, as Parquet; recall with intervals from the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.evaluate.answers import Answer
from jobs.evaluate.documents import Span
from pipeline.errors import JobError

Row = dict[str, Any]
PER_LAYER = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        ("document", pa.string()),
        ("kind", pa.string()),
        ("task", pa.string()),
        ("length", pa.int32()),  # asked for; the prompt has a little less
        ("prompt_tokens", pa.int32()),
        ("depth", pa.float32()),  # of the needle, or mean of several; null where the whole document is the needle
        ("arm", pa.string()),
        ("precision", pa.string()),  # of the engine; null where the evaluation's own reader answered
        ("block_size", pa.int32()),  # 0 for dense
        ("blocks", pa.int32()),
        ("dense_tail", pa.int32()),
        ("target_density", pa.float32()),  # null where the arm has a schedule of its own
        ("density", pa.float32()),  # kept share of the causal blocks in a sparse layer
        ("mean_density", pa.float32()),  # over all layers, leading dense ones included
        ("config", pa.string()),  # fingerprint of the StemConfig
        ("question", pa.string()),
        ("references", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("recall", pa.float32()),  # share of the references in the answer
        ("exact", pa.bool_()),  # the answer is the expected one word for word; null where wordings may differ
        ("first_token_kl", pa.float32()),  # nats, against dense
        ("answer_kl", pa.float32()),  # mean over the first tokens of the dense answer
        ("retained_mass", PER_LAYER),  # at the question's rows (a lookup: at rows of the document), by layer
        ("document_mass", PER_LAYER),  # at rows of the document
        ("needle_kept", PER_LAYER),  # share of heads that keep the needle's blocks where it is needed, by layer
        ("prefill_seconds", pa.float32()),  # of the document, shared by its questions
        ("answer_seconds", pa.float32()),
    ]
)
RESAMPLES = 2000
# The engine's precisions. What the first of them that ran found is what the others are compared with.
BY_EXACTNESS = ("fp32", "fp16", "bf16", "fp8")


def recall_of(answer: str, references: Sequence[str]) -> float:
    """RULER's string match: the share of the references that the answer contains, whatever their case."""
    said = answer.lower()
    return sum(reference.lower() in said for reference in references) / len(references)


def row_of(answer: Answer, layers: int, decode: Callable[[Sequence[int]], str]) -> Row:
    """The result row of an answer. decode: ids to text without control tokens."""
    document, prompt, arm = answer.reading.document, answer.prompt, answer.arm
    config = arm.config
    density, mean_density = arm.density(len(prompt.ids), layers)
    row: Row = {
        "document": document.name,
        "kind": document.kind,
        "length": document.length,
        "prompt_tokens": len(prompt.ids),
        "arm": arm.name,
        "precision": arm.precision,
        "block_size": config.block_size if config else 0,
        "blocks": -(-len(prompt.ids) // config.block_size) if config else 0,
        "dense_tail": config.dense_tail if config else 0,
        "target_density": config.density if config else 1.0,
        "density": density,
        "mean_density": mean_density,
        "config": config.fingerprint() if config else "",
        "first_token_kl": answer.first_kl,
        "answer_kl": answer.answer_kl,
        "retained_mass": answer.mass,
        "document_mass": answer.document_mass,
        "needle_kept": answer.needles,
        "prefill_seconds": answer.prefill_seconds,
        "answer_seconds": answer.answer_seconds,
    }
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
    text, question = decode(answer.token_ids), prompt.question
    return row | {
        "task": question.task,
        "depth": _depth(question.needles, document.text),
        "question": question.text,
        "references": list(question.references),
        "answer": text,
        "recall": recall_of(text, question.references),
        "exact": text.strip() == question.expected if question.expected else None,
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
            for row in pq.read_table(part, schema=SCHEMA).to_pylist():
                rows[setting_key(row), question_key(row)] = row
    return list(rows.values())


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval; n questions of `documents` documents."""

    mean: float
    low: float
    high: float
    n: int
    documents: int


def estimate(values: Sequence[float], documents: Sequence[str], seed: int = 0) -> Estimate:
    """Mean of `values` and a bootstrap interval over documents: questions of one document are not independent."""
    names = sorted(set(documents))
    sums = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)
    for value, name in zip(values, documents, strict=True):
        sums[name] += value
        counts[name] += 1
    totals, weights = np.array(list(sums.values())), np.array(list(counts.values()))
    drawn = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    means = totals[drawn].sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(totals.sum() / weights.sum()), float(low), float(high), len(values), len(names))


def question_key(row: Row) -> tuple[Any, ...]:
    """The same for one question under all arms."""
    return row["length"], row["document"], row["task"], row["question"], row["depth"]


def setting_key(row: Row) -> tuple[Any, ...]:
    """One arm as it ran: everything that tells its rows from those of the others."""
    return row["length"], row["block_size"], row["target_density"] or 0.0, row["dense_tail"], row["arm"], row["config"]
