"""Result rows to Parquet part files, and back: at no time two rows of a document's question, at the end of a job one.

A row is done when its part file is there. A row that is to be replaced (its document changed, or is tried again) stays
until the new one takes its place: in the same part, by one write of that part. At any moment, and whatever is
interrupted, such a question has its old row or its new one.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import JobError, one_line
from pipeline.results.kept_columns import concat
from pipeline.results.rows import COLUMNS, SUMMARY, Row, to_table
from pipeline.results.seal import seal_problem, sealed
from pipeline.results.store import Store
from pipeline.results.wide import widened

PREFIX, SUFFIX = "part-", ".parquet"
PART = re.compile(r"(?:^|/)part-\d{6,}-[0-9a-f]{8}\.parquet$")
JOURNAL = "compaction.json"
COMPACT_ROWS = 100_000
COMPACT_BYTES = 256 << 20
COMPACT_ABOVE = 100
# Putting rows in the place of old ones writes whole parts again. After that the driver writes nothing for so many times
# as long as it took, so that it has time for the workers.
REST = 10
# What parts of every version have.
ADDED = ("question_id", "prefix_tokens")
REQUIRED = ("output", *(column.name for column in COLUMNS if not column.nullable and column.name not in ADDED))
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
        old = _decoded(data)
        stay = [key not in gone for key in keys(old)]
        new = concat([old.filter(pa.array(stay, pa.bool_())), table])
        self._store.write(place, encode(new))
        now = self._clock()
        self._rests_until = max(self._rests_until, now) + REST * (now - begun)


def keys(rows: pa.Table) -> list[Key]:
    """(document_id, question_id) of rows; those of earlier versions, which had one question a job, have SUMMARY."""
    names = rows["document_id"].to_pylist()
    questions = rows["question_id"].to_pylist() if "question_id" in rows.column_names else [None] * len(names)
    return list(zip(names, (question or SUMMARY for question in questions), strict=True))


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


def encode(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file."""
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    return sealed(stream.getvalue().to_pybytes())


def read_part(store: Store, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A part's rows, or those of `columns` that it has. All of the file is read and compared with its checksums.

    Raises OSError or ArrowException.
    """
    return _decoded(store.read_all(name), columns)


def _decoded(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """`read_part` for the bytes of a part."""
    problem = seal_problem(data)
    if problem:
        raise OSError(problem)
    parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    names = parquet.schema_arrow.names
    lacking = [name for name in REQUIRED if name not in names]
    if lacking and problem is None:  # an earlier version, whose checksums do not cover the names of columns
        raise OSError(f"it has no column {lacking[0]}")
    return parquet.read([name for name in columns if name in names] if columns is not None else None)


def damage(store: Store, name: str) -> str:
    """What is wrong with a part file, all of it read and its checksums compared; empty if nothing is."""
    try:
        read_part(store, name)
    except (OSError, pa.ArrowException) as error:
        return one_line(error, 120)
    return ""


def part_names(store: Store) -> list[str]:
    """Names of the part files that count: all but those that an interrupted merge has already replaced."""
    names = store.list(PREFIX, SUFFIX)
    journal = _journal(store)
    if journal and journal["merged"] in names:
        replaced = set(journal["replaced"])
        names = [name for name in names if name not in replaced]
    return names


def _journal(store: Store) -> dict | None:
    data = store.read(JOURNAL)
    if data is None:
        return None
    try:
        journal = json.loads(data)
        return {"merged": str(journal["merged"]), "replaced": list(journal["replaced"])}
    except (ValueError, KeyError, TypeError):
        return None


def recover(store: Store) -> list[str]:
    """Bring the folder to a clean state under the lock: finish or undo a merge, set damaged parts aside.

    Returns messages about what was found.
    """
    store.clear_temporary()
    messages = []
    journal = _journal(store)
    if journal:
        names = store.list(PREFIX, SUFFIX)
        if journal["merged"] in names:
            problem = damage(store, journal["merged"])
            if problem:  # then what it was to replace still counts
                messages.append(_set_aside(store, journal["merged"], problem))
            else:
                for name in journal["replaced"]:
                    store.delete(name)
    store.delete(JOURNAL)
    for name in part_names(store):
        problem = damage(store, name)
        if problem:
            messages.append(_set_aside(store, name, problem))
    return messages


def _set_aside(store: Store, name: str, problem: str) -> str:
    store.rename(name, name + ".damaged")
    return f"{name} is damaged ({problem}); set aside, its documents are done again"


def read_columns(store: Store, columns: Sequence[str]) -> pa.Table:
    """Some columns of all results, null where an earlier version had none."""
    tables = _tables(store, columns)
    types = {name: next((column.type for column in COLUMNS if column.name == name), pa.string()) for name in columns}
    if not tables:
        return pa.table({name: pa.array([], kind) for name, kind in types.items()})
    table = concat(tables)
    for name in columns:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), types[name]))
    return table.select(list(columns))


def _tables(store: Store, columns: Sequence[str] | None) -> list[pa.Table]:
    """All parts, or some columns of them. A job may merge or replace parts meanwhile: then it is done anew.

    Raises JobError.
    """
    for last in (False, False, True):
        name = ""
        try:
            tables = []
            for name in part_names(store):
                tables.append(read_part(store, name, columns))
            return tables
        except (OSError, pa.ArrowException) as error:
            if last:
                what = "went away while it was read" if isinstance(error, FileNotFoundError) else "cannot be read"
                raise JobError(
                    f"{store.name}: {name} {what}: {one_line(error)}; the job's command, run again, sets damaged parts "
                    "aside and does their documents anew"
                ) from None
    raise AssertionError


def done_rows(store: Store) -> pa.Table:
    """document_id, question_id, status, attempts, input_stamp, input_hash of all rows.

    Raises JobError if a document's question has two (copies).
    """
    rows = read_columns(store, ["document_id", "question_id", "status", "attempts", "input_stamp", "input_hash"])
    questions = pc.fill_null(rows["question_id"], SUMMARY)
    rows = rows.set_column(1, "question_id", questions)
    counts = rows.group_by(["document_id", "question_id"]).aggregate([([], "count_all")])
    if len(counts) != len(rows):
        twice = counts.filter(pc.greater(counts["count_all"], 1)).to_pylist()
        example = f"{twice[0]['document_id']!r}, question {twice[0]['question_id']!r}"
        raise JobError(
            f"--output {store.name}: {len(twice)} documents have more than one row, e.g. {example}; "
            "remove the doubled part files"
        )
    return rows


def compact(store: Store) -> int:
    """Merge part files, up to 100,000 rows or 256 MiB each; the number of parts afterwards.

    A journal names what a merged file replaces, so that an interruption at any point neither loses nor doubles a row.
    """
    group: list[str] = []
    rows = size = 0
    for name in [*part_names(store), ""]:
        info, bytes_ = None, 0
        if name:
            with store.named_failures(f"{name} cannot be read"), store.open(name) as file:
                info, bytes_ = pq.read_metadata(file), file.size()
        if group and (info is None or rows + info.num_rows > COMPACT_ROWS or size + bytes_ > COMPACT_BYTES):
            _merge(store, group)
            group, rows, size = [], 0, 0
        if info is not None:
            group, rows, size = [*group, name], rows + info.num_rows, size + bytes_
    return len(part_names(store))


def _merge(store: Store, names: list[str]) -> None:
    if len(names) < 2:
        return
    tables = []
    for name in names:
        with store.named_failures(f"{name} cannot be read"):
            tables.append(read_part(store, name))
    merged = f"{names[0].removesuffix(SUFFIX).rpartition('-')[0]}-{secrets.token_hex(4)}{SUFFIX}"
    store.write(JOURNAL, json.dumps({"merged": merged, "replaced": names}).encode())
    store.write(merged, encode(concat(tables)))
    for name in names:
        store.delete(name)
    store.delete(JOURNAL)


def read_results(
    output: str | Path | Iterable[str | Path], columns: Sequence[str] | None = None, *, wide: bool = False
) -> pa.Table:
    """The results in one output folder or in several (shards of one job) as a table, one row a document and question.

    wide: one row a document instead: document_id, source, status (ok, or that of the first question that failed), error
    (what failed by question), the input's kept columns, and for each question a column with its output.
    Raises JobError if a folder holds no results.
    """
    if wide and columns is not None:
        raise JobError("read_results(): wide=True has columns of its own; leave columns out")
    folders = [output] if isinstance(output, str | Path) else list(output)
    tables = []
    for folder in folders:
        store = Store(str(folder))
        found = _tables(store, columns)
        if not found:
            raise JobError(f"{store.name} holds no results (no {PREFIX}*{SUFFIX} files)")
        tables += found
    table = concat(tables)
    return widened(table) if wide else table
