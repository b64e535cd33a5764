"""CSV and TSV: listing by one pass over the file, reading by offset. The first line names the columns.

Records are found by Python's csv module, one at a time, and not by pyarrow.csv: that does not say where a row stands,
wants all of it in one block, and takes a column's type from the first block alone. A quote opens a field only at its
beginning and is doubled inside, as RFC 4180 has it; what breaks that costs its record.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decoding import UTF_8, looks_like
from pipeline.errors import DocumentError, one_line
from pipeline.location import open_filesystem
from pipeline.results.kept_columns import common_type
from pipeline.settings.shared import ReadSettings
from pipeline.source.catalogue import CatalogueBuilder
from pipeline.source.ids import column_problem, id_name, json_id
from pipeline.source.protocol import Locator, SourceFile
from pipeline.source.streams import MOST_BYTES, StretchReader, compression, lines, open_stream, stream_errors
from pipeline.source.texts import refuse_marked

# A first line of more bytes is a text, not names.
_MOST_HEADER = 1 << 20
_MOST_HEADERS = 64
# The types that fields can have, the narrowest first, with what is none of them though Arrow would take it: a code with
# zeros in front, and a number of more digits than a float has, would not come out as they were.
_TYPES = (
    (pa.int64(), r"^[+-]?0[0-9]"), (pa.float64(), r"^[+-]?(0[0-9]|[0-9]{16,}$)"), (pa.bool_(), "^[01]$"),
    (pa.date32(), ""), (pa.timestamp("us"), ""),
)  # fmt: skip
# So many fields are looked at together; one of more characters is a text.
_TOGETHER = 10_000
_LONGEST_TYPED = 40

csv.field_size_limit(max(csv.field_size_limit(), MOST_BYTES))  # records are bounded here, by `_Records`


def list_csv(file: SourceFile, builder: CatalogueBuilder) -> None:
    """Add a file's records. Broken ones become documents with an error."""
    number = 0
    if "\n".encode(builder.encoding) != b"\n":
        name = builder.encoding
        builder.add_broken_file(f"lines cannot be told apart in {name}; save it as UTF-8: iconv -f {name} -t UTF-8")
        return
    try:
        with open_stream(open_filesystem(file.filesystem), file.path) as stream:
            records = _Records(stream, _separator(file.path), builder.encoding)
            try:
                _list(records, file, builder)
            finally:
                number = records.last
    except stream_errors() as error:
        builder.add_broken_file(f"the file breaks off after line {number}: {one_line(error)}", number + 1)


def _list(records: _Records, file: SourceFile, builder: CatalogueBuilder) -> None:
    try:
        names = records.header()
    except DocumentError as raised:
        builder.add_broken_file(str(raised))
        return
    if not names:  # nothing in it
        return
    id_column = id_name(names, builder.id_column)
    problem = _separator_problem(names, file.path)
    if not problem:
        builder.saw(names)
        problem = column_problem(names, builder.text_column) or (column_problem(names, id_column) if id_column else "")
    if problem:
        builder.add_broken_file(f"{problem}; the first line names the columns; what follows is not read")
        return
    types = {name: _Types() for name in builder.keep_columns if names.count(name) == 1}
    while True:
        size, document_id, error = 0, "", ""
        try:
            fields = records.next()
            if fields is None:
                break
            if _is_blank(fields):
                continue
            values = _by_name(names, fields)
            document_id, wrong = json_id(values[id_column]) if id_column else ("", "")
            if wrong:
                raise DocumentError(f"its id ({id_column}) is {wrong}, expected text or a number")
            size = len(values[builder.text_column])
            for name, kind in types.items():
                kind.add(values[name])
        except DocumentError as raised:
            error = f"{records.place}: {raised}"
        fallback = f"{file.label}:{records.number}"
        builder.add(document_id or fallback, records.start, records.length, size, records.number, error)
    for name, kind in types.items():
        builder.keep(name, kind.found())


class _Records:
    """The records of a stream, from the first line on.

    Of the one that `next` came upon last: start, length: its place in bytes; number, last: its first and last line,
    from 1.
    """

    def __init__(self, stream: BinaryIO, separator: str, encoding: str) -> None:
        self._encoding, self._hint = encoding, ""
        self.start = self.length = self.number = self.last = 0
        self._lines = lines(stream)
        self._invalid, self._ended = "", False
        # Not a generator: it goes on behind what it raises.
        self._reader = csv.reader(iter(self._line, None), delimiter=separator, strict=True)

    @property
    def place(self) -> str:
        """The record's lines, for people."""
        return f"line {self.number}" if self.last <= self.number else f"lines {self.number} to {self.last}"

    def header(self) -> list[str]:
        """The names of the columns, none if the file is empty. Raises DocumentError."""
        fields = self.next()
        while fields is not None and _is_blank(fields):
            fields = self.next()
        if self.length > _MOST_HEADER:
            raise DocumentError(f"its first line has {self.length:,} bytes; it must name the columns")
        return fields or []

    def next(self) -> list[str] | None:
        """The fields of the next record, None at the end. Raises DocumentError if it is broken; then call again."""
        self.start, self.length, self.number = self.start + self.length, 0, self.last + 1
        self._invalid = ""
        try:
            fields = next(self._reader, None)
        except csv.Error as error:
            if self._ended:
                raise DocumentError("a quote opens a field, and none closes it before the file ends") from None
            raise DocumentError(f"broken CSV: {one_line(error, 200)}; quotes in a field are doubled") from None
        if self._invalid:
            raise DocumentError(self._invalid)
        return fields

    def _line(self) -> str | None:
        """The next line of the file. Raises DocumentError if the record grows too long by it."""
        line, length = next(self._lines, (b"", 0))
        self._ended = not length
        if self._ended:
            return None
        self.length, self.last = self.length + length, self.last + 1
        if self.last == 1:
            refuse_marked(line)
            line = line.removeprefix(b"\xef\xbb\xbf")
        if self.length > MOST_BYTES:
            raise DocumentError(
                f"it has more than {MOST_BYTES:,} bytes, no more are read; is there a quote that none closes?"
            )
        try:
            return line.decode(self._encoding)
        except UnicodeDecodeError as error:
            where = f"byte {self.length - length + error.start}"
            name = "UTF-8" if self._encoding == UTF_8 else self._encoding
            self._hint = self._hint or looks_like(line)
            self._invalid = self._invalid or f"invalid {name} at {where}: {error.reason}; {self._hint}"
            return line.decode(self._encoding, errors="replace")


class _Types:
    """Finds the type of a column: the narrowest that all its fields have. Empty ones are null."""

    def __init__(self) -> None:
        self._kind, self._fields = pa.null(), list[str]()

    def add(self, field: str) -> None:
        """A field of the column."""
        if not field or pa.types.is_string(self._kind):
            return
        if len(field) > _LONGEST_TYPED:
            self._kind = pa.string()
            return
        self._fields.append(field)
        if len(self._fields) == _TOGETHER:
            self.found()

    def found(self) -> pa.DataType:
        """The type as far as fields were added."""
        if self._fields and not pa.types.is_string(self._kind):
            self._kind = common_type(self._kind, _type_of(pa.array(self._fields)))
        self._fields.clear()
        return self._kind


def _type_of(fields: pa.Array) -> pa.DataType:
    for kind, unlike in _TYPES:
        if unlike and pc.any(pc.match_substring_regex(fields, unlike)).as_py():
            continue
        try:
            fields.cast(kind)
        except pa.ArrowException:
            continue
        return kind
    return pa.string()


class CsvReader:
    """Reads records by their offsets. Fields are strings as they stand in the file; empty ones are null."""

    def __init__(self, columns: tuple[str, ...], settings: ReadSettings) -> None:
        self._text_column, self._encoding = columns[0], settings.encoding
        self._records = StretchReader()
        self._header = lru_cache(_MOST_HEADERS)(self._read_header)

    def read(self, at: Locator) -> dict[str, Any]:
        """The record at a locator. Raises DocumentError."""
        names, data = self._header(at.filesystem, at.path), self._records.read(at)
        try:
            fields = next(csv.reader([data.decode(self._encoding)], delimiter=_separator(at.path), strict=True), [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise DocumentError(f"broken CSV: {one_line(error, 200)}") from None
        values = _by_name(names, fields)
        return {name: field if field or name == self._text_column else None for name, field in values.items()}

    def _read_header(self, filesystem: str, path: str) -> list[str]:
        try:
            with open_stream(open_filesystem(filesystem), path) as stream:
                return _Records(stream, _separator(path), self._encoding).header()
        except stream_errors() as error:
            raise DocumentError(f"cannot be read: {one_line(error)}") from None


def _separator(path: str) -> str:
    return "\t" if path.lower().removesuffix(compression(path)).endswith(".tsv") else ","


def _is_blank(fields: list[str]) -> bool:
    """Whether a line holds nothing; one with separators is a record."""
    return len(fields) < 2 and not "".join(fields).strip()


def _separator_problem(names: list[str], path: str) -> str:
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        used = "tabs" if _separator(path) == "\t" else "commas (in .tsv: tabs)"
        return f"its columns are not separated by {used}: {one_line(names[0], 80)!r}"
    return ""


def _by_name(names: list[str], fields: list[str]) -> dict[str, str]:
    """The fields of a record; of two columns of one name none. Raises DocumentError if it has more or fewer."""
    if len(fields) != len(names):
        raise DocumentError(f"it has {len(fields)} fields, expected {len(names)} as in the first line")
    values = dict(zip(names, fields, strict=True))
    if len(values) < len(names):
        values = {name: field for name, field in values.items() if names.count(name) == 1}
    return values
