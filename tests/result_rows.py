"""Result rows for tests, from the columns that a test is about."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pipeline.results.kept_columns import Kept
from pipeline.results.rows import EngineFields, Outcome, Row, WorkerFields

UNKNOWN = {item.name: None for item in fields(WorkerFields)}


def make_row(document_id: str, source: str, status: str = "ok", error: str = "", **columns: Any) -> Row:
    """A row with these columns. The engine and the worker have measured something if one of theirs is among them; of
    the worker's the others are null. Raises TypeError for a name that no column has.
    """
    groups = {}
    for group, names in (("from_engine", fields(EngineFields)), ("from_worker", fields(WorkerFields))):
        groups[group] = {item.name: columns.pop(item.name) for item in names if item.name in columns}
    engine, worker = groups["from_engine"], groups["from_worker"]
    of_outcome = [item.name for item in fields(Outcome) if item.name not in ("status", "error")]
    ended = {name: columns.pop(name) for name in of_outcome if name in columns}
    return Row(
        document_id=document_id, source=source, outcome=Outcome(status=status, error=error, **ended),
        from_engine=EngineFields(**engine) if engine else None,
        from_worker=WorkerFields(**(UNKNOWN | worker)) if worker else None,
        **columns,
    )  # fmt: skip


def kept_columns(kept: Kept) -> dict[str, Any]:
    """What make_row() takes for a document's kept columns."""
    return {"kept": kept.columns, "kept_error": kept.problem or None}
