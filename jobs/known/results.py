"""One row for each question and arm; jobs.evaluate.rows names the columns."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jobs.known.documents import Span
from jobs.known.prompts import Reading
from jobs.known.reader import Answer, Reader, Reference

Row = dict[str, Any]
# The engine's precisions. What the first of them that ran found is what the others are compared with.
BY_EXACTNESS = ("fp32", "fp16", "bf16", "fp8")
# A task that dense attention itself fails more often than this says nothing about a selection.
LEARNED = 0.5


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


def reading_rows(
    reader: Reader, reading: Reading, reference: Reference, decode: Callable[[Sequence[int]], str]
) -> list[Row]:
    """The rows of a document under the reader's arm. reference, decode: see Reader.read() and row_of()."""
    return [row_of(answer, reader.precision, decode) for answer in reader.read(reading, reference)]


def row_of(answer: Answer, precision: str, decode: Callable[[Sequence[int]], str]) -> Row:
    """The result row of an answer; of a text what was measured alone. decode: ids to text without control tokens."""
    config = answer.arm.config
    row: Row = {
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
    if answer.reading is None:
        return row
    document = answer.reading.document
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


def question_key(row: Row) -> tuple[Any, ...]:
    """The same for one question under all arms."""
    return row["length"], row["document"], row["task"], row["question"], row["depth"]
