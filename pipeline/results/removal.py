"""Rows that stand for no document any more, taken out of the results."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.results.sink import encode, part_names, read_part
from pipeline.results.store import Store


def remove_rows(store: Store, ids: Sequence[str]) -> None:
    """Take the rows of `ids` out, part by part, each by one write. Only under the lock."""
    gone = pa.array(ids, pa.string())
    for name in part_names(store) if ids else ():
        with store.named_failures(f"{name} cannot be read"):
            rows = read_part(store, name)
        left = rows.filter(pc.invert(pc.is_in(rows["document_id"], value_set=gone)))
        if len(left) == len(rows):
            continue
        if len(left):
            store.write(name, encode(left))
        else:
            store.delete(name)
