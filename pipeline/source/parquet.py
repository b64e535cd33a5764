"""Parquet: listing from ids and sizes alone, reading by row group and row.

Memory is bounded by what a file holds once it is decompressed, not by what its values come to: texts are read as
dictionaries, so that one that a thousand rows refer to is there once. Of a large row group one row at a time is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DocumentError, one_line
from pipeline.location import open_filesystem
from pipeline.results.kept_columns import is_bytes, is_text, storable
from pipeline.settings.shared import ReadSettings
from pipeline.source.catalogue import CatalogueBuilder
from pipeline.source.ids import column_problem, id_name, id_texts
from pipeline.source.protocol import Locator, SourceFile
from pipeline.source.streams import MOST_BYTES

# Up to so many bytes of Parquet files together the listing reads the texts to know their sizes; beyond, it takes
# row groups' means.
EXACT_SIZES_BYTES = 4 << 30
# A row group of up to so many bytes is read as a whole.
WHOLE_BYTES = 128 << 20
_CACHE_BYTES = 256 << 20
_BATCH_ROWS = 65536
_READ_ERRORS = (OSError, pa.ArrowException, ValueError)


def list_parquet(file: SourceFile, builder: CatalogueBuilder) -> None:
    """Add a file's rows."""
    try:
        with open_filesystem(file.filesystem).open_input_file(file.path) as opened:
            about = pq.read_metadata(opened)
            if about.num_rows:
                _list(opened, about, file, builder)
    except _READ_ERRORS as error:
        builder.add_broken_file(f"not a readable Parquet file: {one_line(error)}")


def _list(opened: pa.NativeFile, about: pq.FileMetaData, file: SourceFile, builder: CatalogueBuilder) -> None:
    schema = about.schema.to_arrow_schema()
    builder.saw(schema.names)
    id_column = id_name(schema.names, builder.id_column)
    problem = _text_problem(schema, builder.text_column) or (id_column and column_problem(schema.names, id_column))
    if problem:
        builder.add_broken_file(f"{problem}; its {about.num_rows:,} rows are not read")
        return
    for name in builder.keep_columns:
        if schema.names.count(name) == 1:
            builder.keep(name, storable(schema.field(name).type))
    exact_sizes = builder.format_bytes <= EXACT_SIZES_BYTES
    columns = ([id_column] if id_column else []) + ([builder.text_column] if exact_sizes else [])
    row = 0
    for group in range(about.num_row_groups):
        mean, inside = _mean_bytes(about, group), 0
        for count, batch in _listed(opened, about, group, list(dict.fromkeys(columns))):
            sizes = _sizes(batch.column(builder.text_column)) if exact_sizes else [mean] * count
            ids = id_texts(batch.column(id_column)) if id_column else [("", "")] * count
            for size, (document_id, wrong) in zip(sizes, ids, strict=True):
                if wrong:
                    what = f"row {row}: its id ({id_column}) is {wrong}, expected text or a number"
                    builder.add(f"{file.label}:{row}", group, inside, 0, row, what)
                else:
                    builder.add(document_id or f"{file.label}:{row}", group, inside, size, row)
                row, inside = row + 1, inside + 1


def _listed(
    opened: pa.NativeFile, about: pq.FileMetaData, group: int, columns: list[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    if columns:
        for batch in _batches(opened, about, group, columns):
            yield len(batch), batch
    else:
        yield about.row_group(group).num_rows, pa.record_batch([])


def _batches(opened: pa.NativeFile, about: pq.FileMetaData, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a row group. What a dictionary holds all at once, or else each row by itself."""
    whole = about.row_group(group).total_byte_size <= WHOLE_BYTES
    schema = about.schema.to_arrow_schema()
    texts = [name for name in columns if _is_binary(_plain(schema.field(name).type))]
    options: dict[str, Any] = {"read_dictionary": texts} if whole else {"buffer_size": 8 << 20}
    parquet = pq.ParquetFile(opened, metadata=about, pre_buffer=whole, **options)
    rows = _BATCH_ROWS if whole else 1
    for batch in parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        for column in batch.columns:
            _check_indices(column)
        yield batch


def _check_indices(column: pa.Array) -> None:
    """Raise ArrowInvalid for what a damaged file refers to and does not hold."""
    if pa.types.is_dictionary(column.type):
        found = pc.min_max(column.indices)
        low, high = found["min"].as_py(), found["max"].as_py()
        if low is not None and (low < 0 or high >= len(column.dictionary)):
            raise pa.ArrowInvalid(f"a row refers to value {high} of {len(column.dictionary)}")


def _text_problem(schema: pa.Schema, name: str) -> str:
    problem = column_problem(schema.names, name)
    if problem:
        return problem
    kind = schema.field(name).type
    fits = _is_binary(_plain(kind)) or pa.types.is_null(kind)
    return "" if fits else f"its column {name!r} is {kind}, expected text"


def _plain(kind: pa.DataType) -> pa.DataType:
    """What a dictionary or an extension consists of."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    return is_text(kind) or is_bytes(kind) or kind in (pa.string_view(), pa.binary_view())


def _mean_bytes(about: pq.FileMetaData, group: int) -> int:
    """Bytes of a row, all columns together: what a footer says of one column ends the process if it is damaged."""
    described = about.row_group(group)
    return max(0, min(described.total_byte_size // max(described.num_rows, 1), MOST_BYTES))


def _sizes(texts: pa.Array) -> list[int]:
    """Bytes of each text, 0 for null."""
    if isinstance(texts, pa.ExtensionArray):
        texts = texts.storage
    if pa.types.is_dictionary(texts.type):
        sizes = pa.array(_sizes(texts.dictionary), pa.int64()).take(texts.indices)
    elif pa.types.is_null(texts.type):
        return [0] * len(texts)
    else:
        sizes = pc.binary_length(texts.cast(pa.large_binary()))
    return pc.fill_null(sizes, 0).to_pylist()


class ParquetReader:
    """Reads rows. The last row groups stay in memory, up to 256 MiB; in a large one it goes on from row to row."""

    def __init__(self, columns: tuple[str, ...], settings: ReadSettings) -> None:
        self._columns = list(dict.fromkeys(columns))
        self._groups: OrderedDict[tuple[str, str, int], pa.Table] = OrderedDict()
        self._large: _Rows | None = None

    def read(self, at: Locator) -> dict[str, pa.Array]:
        """The row at a locator: by column, an array of one value. Raises DocumentError."""
        try:
            return self._row(at)
        except (*_READ_ERRORS, IndexError) as error:
            raise DocumentError(f"cannot be read: {one_line(error)}") from None

    def _row(self, at: Locator) -> dict[str, pa.Array]:
        key = (at.filesystem, at.path, at.start)
        if key in self._groups:
            self._groups.move_to_end(key)
            return _one_row(self._groups[key], at.length)
        if self._large is not None and self._large.key == key and self._large.next <= at.length:
            return self._large.row(at.length)
        opened = open_filesystem(at.filesystem).open_input_file(at.path)
        about = pq.read_metadata(opened)
        there = about.schema.to_arrow_schema().names
        # Of two columns of one name none is read.
        wanted = dict.fromkeys([*self._columns, id_name(there, at.id_column) or ""])
        batches = _batches(opened, about, at.start, [name for name in wanted if there.count(name) == 1])
        if about.row_group(at.start).total_byte_size > WHOLE_BYTES:
            self._large = _Rows(key, batches)
            return self._large.row(at.length)
        with opened:
            self._groups[key] = pa.Table.from_batches(batches)
        while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > _CACHE_BYTES:
            self._groups.popitem(last=False)
        return _one_row(self._groups[key], at.length)


class _Rows:
    """The rows of a row group one by one. next: the one that comes next."""

    def __init__(self, key: tuple[str, str, int], batches: Iterator[pa.RecordBatch]) -> None:
        self.key, self.next = key, 0
        self._batches = batches

    def row(self, number: int) -> dict[str, pa.Array]:
        """A row that is still to come."""
        for batch in self._batches:
            self.next += 1
            if self.next > number:
                return _one_row(pa.Table.from_batches([batch]), 0)
        raise IndexError(_FEWER)


_FEWER = "the file has fewer rows than when it was listed"


def _one_row(table: pa.Table, number: int) -> dict[str, pa.Array]:
    if number >= table.num_rows:
        raise IndexError(_FEWER)
    return {name: _one_value(table.column(name), number) for name in table.column_names}


def _one_value(column: pa.ChunkedArray, number: int) -> pa.Array:
    """The value with nothing of its neighbours, which a slice would take along to wherever it is sent."""
    value = column.slice(number, 1).combine_chunks()
    value = value.chunk(0) if isinstance(value, pa.ChunkedArray) else value
    if pa.types.is_dictionary(value.type):
        index = value.indices[0].as_py()
        if index is None:
            return pa.nulls(1, value.type.value_type)
        return pa.concat_arrays([value.dictionary.slice(index, 1)])
    return pa.concat_arrays([value])
