"""Part files: rows as bytes with checksums, merged, set right after an interruption, and read as tables."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import JobError, one_line
from pipeline.results.kept_columns import concat
from pipeline.results.rows import COLUMNS, SUMMARY
from pipeline.results.seal import seal_problem, sealed
from pipeline.results.store import Store
from pipeline.results.wide import widened

PREFIX, SUFFIX = "part-", ".parquet"
PART = re.compile(r"(?:^|/)part-\d{6,}-[0-9a-f]{8}\.parquet$")
JOURNAL = "compaction.json"
COMPACT_ROWS = 100_000
COMPACT_BYTES = 256 << 20
COMPACT_ABOVE = 100
# What parts of every version have.
ADDED = ("question_id", "prefix_tokens")
REQUIRED = ("output", *(column.name for column in COLUMNS if not column.nullable and column.name not in ADDED))


def encode(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file."""
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    return sealed(stream.getvalue().to_pybytes())


def read_part(store: Store, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A part's rows, or those of `columns` that it has. All of the file is read and compared with its checksums.

    Raises OSError or ArrowException.
    """
    return decode(store.read_all(name), columns)


def decode(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A part's rows, of its bytes; as `read_part`. Rows of versions that asked one question a job are of SUMMARY."""
    problem = seal_problem(data)
    if problem:
        raise OSError(problem)
    parquet = pq.ParquetFile(pa.BufferReader(_in_arrow(data)), page_checksum_verification=True)
    names = parquet.schema_arrow.names
    lacking = [name for name in REQUIRED if name not in names]
    if lacking and problem is None:  # an earlier version, whose checksums do not cover the names of columns
        raise OSError(f"it has no column {lacking[0]}")
    rows = parquet.read([name for name in columns if name in names] if columns is not None else None)
    if "question_id" in rows.column_names:  # null where such rows were merged with newer ones
        at = rows.column_names.index("question_id")
        return rows.set_column(at, rows.schema.field(at), pc.fill_null(rows["question_id"], SUMMARY))
    if columns is None or "question_id" in columns:
        return rows.append_column("question_id", pa.array([SUMMARY] * len(rows), pa.string()))
    return rows


def _in_arrow(data: bytes) -> pa.Buffer:
    """A copy in memory of Arrow's: one of its threads may be the last to let go of it, and aborts the process if that
    needs Python's lock while Python ends."""
    copied = pa.allocate_buffer(len(data))
    with pa.FixedSizeBufferWriter(copied) as writer:
        writer.write(data)
    return copied


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
