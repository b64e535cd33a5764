"""Rows that stand for no document any more, taken out of the results."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.sink import encode, part_names
from pipeline.store import Store


def remove_rows(store: Store, ids: Sequence[str]) -> None:
    """Take the rows of `ids` out, part by part, each by one write. Only under the lock."""
    gone = pa.array(ids, pa.string())
    for name in part_names(store) if ids else ():
        with store.opened(name) as file:
            parquet = pq.ParquetFile(file)
            if not pc.any(pc.is_in(parquet.read(["document_id"])["document_id"], value_set=gone)).as_py():
                continue
            rows = parquet.read()
        rows = rows.filter(pc.invert(pc.is_in(rows["document_id"], value_set=gone)))
        if len(rows):
            store.write(name, encode(rows))
        else:
            store.delete(name)
