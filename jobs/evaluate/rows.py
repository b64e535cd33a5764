"""The rows of an evaluation, one for each question and arm, as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.known.results import Row, question_key
from pipeline.errors import JobError

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


def setting_key(row: Row) -> tuple[Any, ...]:
    """One arm as it ran: everything that tells its rows from those of the others."""
    return row["length"], row["arm"], row["config"], row["precision"]
