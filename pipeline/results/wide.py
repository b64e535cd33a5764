"""Rows of documents and questions as a table with a row for each document and a column for each question."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import JobError
from pipeline.results.rows import NAMES

# Columns that stand before those of the input and of the questions.
FIRST = ("document_id", "source", "status", "error")


def widened(rows: pa.Table) -> pa.Table:
    """One row a document, in the order in which documents first occur; read_results() says which columns.

    Raises JobError if a kept column has the name of a question.
    """
    names = rows["question_id"].to_pylist()
    questions = list(dict.fromkeys(names))
    kept = [name for name in rows.column_names if name not in NAMES]
    clash = next((name for name in questions if name in kept or name in FIRST), None)
    if clash is not None:
        raise JobError(
            f"wide=True: a column of the input and a question are both called {clash!r}; read the rows, or name the "
            "question otherwise"
        )
    ids = rows["document_id"].combine_chunks()
    documents = pc.unique(ids)
    place = pc.index_in(ids, value_set=documents).to_pylist()
    first = [-1] * len(documents)
    where: dict[str, list[int | None]] = {name: [None] * len(documents) for name in questions}
    for number, (document, name) in enumerate(zip(place, names, strict=True)):
        where[name][document] = number
        if first[document] < 0:
            first[document] = number
    status, error = _endings(rows, place, names, len(documents))
    table = rows.select(["document_id", "source"]).take(pa.array(first, pa.int64()))
    table = table.append_column("status", pa.array(status, pa.string()))
    table = table.append_column("error", pa.array(error, pa.string()))
    for name in kept:
        table = table.append_column(rows.schema.field(name), rows[name].take(pa.array(first, pa.int64())))
    for name in questions:
        table = table.append_column(name, rows["output"].take(pa.array(where[name], pa.int64())))
    return table


def _endings(rows: pa.Table, place: list[int], names: list[str], documents: int) -> tuple[list[str], list[str]]:
    """Status and errors of each document."""
    status = ["ok"] * documents
    errors: list[list[str]] = [[] for _ in range(documents)]
    for document, name, ended, why in zip(
        place, names, rows["status"].to_pylist(), rows["error"].to_pylist(), strict=True
    ):
        if ended != "ok":
            status[document] = ended if status[document] == "ok" else status[document]
            errors[document].append(f"{name}: {why}")
    return status, ["; ".join(each) for each in errors]
