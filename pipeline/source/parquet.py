"""Parquet: listing from ids and sizes alone, reading by row group and row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DocumentError, JobError, one_line
from pipeline.source.catalogue import CatalogueBuilder, Locator
from pipeline.source.files import SourceFile, open_filesystem
from pipeline.source.jsonl import id_name
from pipeline.source.streams import MOST_BYTES

_BATCH_BYTES = 64 << 20
_CACHE_BYTES = 512 << 20
_READ_ERRORS = (OSError, pa.ArrowException, ValueError)


def list_parquet(file: SourceFile, builder: CatalogueBuilder, exact_sizes: bool) -> None:
    """Add a file's rows. exact_sizes: measure each text (reads the text column), else take the row group's mean.

    Raises JobError for a missing column or one of the wrong type.
    """
    try:
        with pq.ParquetFile(open_filesystem(file.filesystem).open_input_file(file.path)) as parquet:
            _list(parquet, file, builder, exact_sizes)
    except _READ_ERRORS as error:
        builder.add_broken_file(f"not a readable Parquet file: {one_line(error)}")


def _list(parquet: pq.ParquetFile, file: SourceFile, builder: CatalogueBuilder, exact_sizes: bool) -> None:
    schema = parquet.schema_arrow
    _need(schema, builder.text_column, "--text-column", file)
    if not _is_text(schema.field(builder.text_column).type):
        kind = schema.field(builder.text_column).type
        raise JobError(f"--text-column {builder.text_column}: it is {kind} in {file.name}, expected text")
    for name in builder.keep_columns:
        _need(schema, name, "--keep-columns", file)
        kind = schema.field(name).type
        builder.keep(name, kind.value_type if pa.types.is_dictionary(kind) else kind)
    id_column = id_name(schema.names, builder.id_column)
    if id_column:
        _need(schema, id_column, "--id-column", file)
    row = 0
    for group in range(parquet.num_row_groups):
        row = _list_group(parquet, group, row, id_column, file, builder, exact_sizes)


def _list_group(
    parquet: pq.ParquetFile, group: int, row: int, id_column: str | None,
    file: SourceFile, builder: CatalogueBuilder, exact_sizes: bool,
) -> int:  # fmt: skip
    mean = _mean_bytes(parquet, group)
    columns = ([id_column] if id_column else []) + ([builder.text_column] if exact_sizes else [])
    inside = 0
    for count, batch in _batches(parquet, group, list(dict.fromkeys(columns)), mean):
        sizes = _sizes(batch.column(builder.text_column)) if exact_sizes else [mean] * count
        ids = _values(batch.column(id_column)) if id_column else [None] * count
        for size, document_id in zip(sizes, ids, strict=True):
            fallback = f"{file.label}:{row}"
            if not id_column:
                builder.add(fallback, group, inside, size, row)
            elif document_id is None or document_id == "" or isinstance(document_id, bytes | dict | list):
                shown = "not valid UTF-8" if isinstance(document_id, bytes) else repr(document_id)[:60]
                builder.add(fallback, group, inside, 0, row, f"row {row}: its id ({id_column}) is {shown}")
            else:
                builder.add(str(document_id), group, inside, size, row)
            row, inside = row + 1, inside + 1
    return row


def _batches(
    parquet: pq.ParquetFile, group: int, columns: list[str], mean: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    if not columns:
        yield parquet.metadata.row_group(group).num_rows, pa.record_batch([])
        return
    rows = max(1, min(65536, _BATCH_BYTES // max(mean, 1)))
    for batch in parquet.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
        yield len(batch), batch


def _need(schema: pa.Schema, name: str, flag: str, file: SourceFile) -> None:
    if name not in schema.names:
        raise JobError(f"{flag} {name}: {file.name} has no such column; found: {', '.join(schema.names)}")
    if schema.names.count(name) > 1:
        raise JobError(f"{flag} {name}: {file.name} has {schema.names.count(name)} columns of that name; rename them")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    return any(test(kind) for test in tests)


def _mean_bytes(parquet: pq.ParquetFile, group: int) -> int:
    """Bytes of a row, all columns together: what a footer says of one column ends the process if it is damaged."""
    about = parquet.metadata.row_group(group)
    return max(0, min(about.total_byte_size // max(about.num_rows, 1), MOST_BYTES))


def _sizes(texts: pa.Array) -> list[int]:
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    if not pa.types.is_binary(texts.type):
        texts = texts.cast(pa.large_binary())
    return pc.fill_null(pc.binary_length(texts), 0).to_pylist()


def _values(column: pa.Array) -> list[Any]:
    """Python values; a string that is not valid UTF-8 comes as its bytes."""
    try:
        return column.to_pylist()
    except ValueError:  # UnicodeDecodeError is one
        return [_value(item) for item in column]


def _value(item: pa.Scalar) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return item.cast(pa.large_binary()).as_py()
    except ValueError:  # nanoseconds, which only pandas has an object for
        return item.value


class ParquetReader:
    """Reads rows; the last row groups stay in memory, up to 512 MiB."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self._columns = list(dict.fromkeys(columns))
        self._groups: OrderedDict[tuple[str, str, int], pa.Table] = OrderedDict()

    def read(self, at: Locator) -> dict[str, Any]:
        """The row at a locator, by column; text that is not valid UTF-8 comes as bytes. Raises DocumentError."""
        try:
            table = self._group(at)
        except (*_READ_ERRORS, IndexError) as error:
            raise DocumentError(f"cannot be read: {one_line(error)}") from None
        if at.length >= table.num_rows:
            raise DocumentError("cannot be read: the file has fewer rows than when it was listed")
        return {name: _value(table.column(name)[at.length]) for name in table.column_names}

    def _group(self, at: Locator) -> pa.Table:
        key = (at.filesystem, at.path, at.start)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        with pq.ParquetFile(open_filesystem(at.filesystem).open_input_file(at.path)) as parquet:
            there = parquet.schema_arrow.names
            wanted = [name for name in (*self._columns, id_name(there, at.id_column)) if name in there]
            table = parquet.read_row_group(at.start, columns=list(dict.fromkeys(wanted)))
        self._groups[key] = table
        while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > _CACHE_BYTES:
            self._groups.popitem(last=False)
        return table
