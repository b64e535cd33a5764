"""Result rows to Parquet part files: at no time two rows of a document's question, at the end of a job one.

A row is done when its part file is there. A row that is to be replaced (its document changed, or is tried again) stays
until the new one takes its place: in the same part, by one write of that part. At any moment, and whatever is
interrupted, such a question has its old row or its new one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence

import pyarrow as pa

from pipeline.results.kept_columns import concat
from pipeline.results.parts import PREFIX, SUFFIX, decode, encode, part_names, read_part
from pipeline.results.rows import Row, to_table
from pipeline.results.store import Store

# Putting rows in the place of old ones writes whole parts again. After that the driver writes nothing for so many times
# as long as it took, so that it has time for the workers.
REST = 10
# What rows are told apart by: document_id and question_id.
Key = tuple[str, str]


class Sink:
    """The one writer of a job: collects rows and writes them as part files that appear whole.

    A row counts as done when its part file is there; there is no other record of it. Call `tick` often: it writes when
    `flush_documents` rows wait or the oldest has waited `flush_seconds`. replaces: (document_id, question_id) of
    rows that give way to new ones. written: gets rows once they are in a part.
    """

    def __init__(
        self, store: Store, schema: pa.Schema, *, flush_documents: int, flush_seconds: float,
        replaces: Sequence[Key] = (), clock: Callable[[], float] = time.monotonic,
        written: Callable[[pa.Table], None] = lambda rows: None,
    ) -> None:  # fmt: skip
        self._store = store
        self._schema = schema
        self._flush_documents = flush_documents
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._written = written
        self._waiting: list[Sequence[Row]] = []
        self._oldest = 0.0
        heads = [name[len(PREFIX) :].split("-")[0] for name in part_names(store)]
        numbers = [int(head) for head in heads if head.isdecimal()]
        self._next = max(numbers, default=-1) + 1
        self._part = ""
        self._places = _places(store, replaces)
        self._rests_until = float("-inf")
        self.rows_written = 0

    @property
    def rows_to_replace(self) -> int:
        """Old rows whose questions are not answered again yet."""
        return sum(map(len, self._places.values()))

    def add(self, *rows: Row) -> None:
        """Take the rows of a document that came to its end; all of its rows that give way do so to these."""
        if not self._waiting:
            self._oldest = self._clock()
        self._waiting.append(rows)
        self.tick()

    def tick(self) -> None:
        """Write if it is time to."""
        now = self._clock()
        rows = sum(map(len, self._waiting))
        full = rows >= self._flush_documents or now - self._oldest >= self._flush_seconds
        if self._waiting and full and now >= self._rests_until:
            self.flush()

    def flush(self) -> None:
        """Write all rows that wait. Raises JobError if that fails; what was not written by then is not done."""
        by_place: dict[str, list[Row]] = {}
        for rows in self._waiting:
            old = self._places.get(rows[0].document_id, {})
            first = next(iter(old.values()), "")
            for row in rows:
                by_place.setdefault(old.get(row.question_id, first), []).append(row)
            for place in old.values():  # of a question that is not asked any more: its old row goes
                by_place.setdefault(place, [])
        done = {rows[0].document_id for rows in self._waiting}
        for place, rows in by_place.items():
            olds = ((name, self._places.get(name, {})) for name in done)
            gone = {(name, question) for name, old in olds for question, at in old.items() if at == place}
            table = to_table(rows, self._schema)
            self._write(place, table, gone)
            self.rows_written += len(rows)
            written = set(map(id, rows))
            left = ([row for row in waiting if id(row) not in written] for waiting in self._waiting)
            self._waiting = [waiting for waiting in left if waiting]
            for name, question in gone:
                del self._places[name][question]
            self._written(table)

    def _write(self, place: str, table: pa.Table, gone: set[Key]) -> None:
        """A new part, or the part `place` with these rows in the place of those in `gone`."""
        begun = self._clock()
        data = self._store.read(place) if place else None
        if data is None:
            # A write that failed may have taken effect all the same: the next try, with these rows, goes over it.
            self._part = self._part or f"{PREFIX}{self._next:06d}-{secrets.token_hex(4)}{SUFFIX}"
            self._store.write(self._part, encode(table))
            self._next, self._part = self._next + 1, ""
            return
        old = decode(data)
        stay = [key not in gone for key in keys(old)]
        new = concat([old.filter(pa.array(stay, pa.bool_())), table])
        self._store.write(place, encode(new))
        now = self._clock()
        self._rests_until = max(self._rests_until, now) + REST * (now - begun)


def keys(rows: pa.Table) -> list[Key]:
    """(document_id, question_id) of rows."""
    return list(zip(rows["document_id"].to_pylist(), rows["question_id"].to_pylist(), strict=True))


def _places(store: Store, replaces: Sequence[Key]) -> dict[str, dict[str, str]]:
    """By document and question, the part that holds its row."""
    places: dict[str, dict[str, str]] = {}
    wanted = set(replaces)
    for name in part_names(store) if wanted else ():
        with store.named_failures(f"{name} cannot be read"):
            found = keys(read_part(store, name, ["document_id", "question_id"]))
        for document_id, question in found:
            if (document_id, question) in wanted:
                places.setdefault(document_id, {})[question] = name
    return places
