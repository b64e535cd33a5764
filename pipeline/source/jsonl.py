"""JSON lines, plain or compressed: listing by one pass over the file, reading by offset."""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import DocumentError, JobError, one_line
from pipeline.source.catalogue import CatalogueBuilder, Locator
from pipeline.source.files import SourceFile, open_filesystem
from pipeline.source.streams import MOST_BYTES, lines, open_stream, stream_errors

DEFAULT_IDS = ("id", "document_id")


def parse_line(line: bytes) -> dict[str, Any]:
    """The object on a line. Raises DocumentError with what is wrong with it."""
    try:
        text = line.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DocumentError(f"invalid UTF-8 at byte {error.start} of the line: {error.reason}") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"broken JSON: {one_line(error, 200)}") from None
    if not isinstance(value, dict):
        raise DocumentError(f"expected a JSON object, got {type(value).__name__}")
    return value


def list_jsonl(file: SourceFile, builder: CatalogueBuilder) -> None:
    """Add a file's lines. Broken lines become documents with an error.

    Raises JobError if no line has the text column or a line lacks the id column that was asked for by name.
    """
    offset, number, objects, texts = 0, 0, 0, 0
    columns: dict[str, None] = {}
    kept: dict[str, set[type]] = {name: set() for name in builder.keep_columns}
    try:
        with open_stream(open_filesystem(file.filesystem), file.path, file.kind) as stream:
            for line, length in lines(stream):
                number, start, offset = number + 1, offset, offset + length
                if not line.strip():
                    continue
                fallback = f"{file.label}:{number}"
                if length > len(line):
                    what = f"line {number}: it has {length:,} bytes; at most {MOST_BYTES:,} are read"
                    builder.add(fallback, start, length, 0, number, what)
                    continue
                try:
                    value = parse_line(line)
                except DocumentError as error:
                    builder.add(fallback, start, len(line), 0, number, f"line {number}: {error}")
                    continue
                objects += 1
                if len(columns) < 100:
                    columns |= dict.fromkeys(value)
                text = value.get(builder.text_column)
                texts += builder.text_column in value
                for name, kinds in kept.items():
                    kinds.add(type(value.get(name)))
                size = len(text) if isinstance(text, str) else 0
                try:
                    builder.add(_line_id(value, builder, fallback), start, len(line), size, number)
                except DocumentError as error:
                    builder.add(fallback, start, len(line), 0, number, f"line {number}: {error}")
    except stream_errors() as error:
        builder.add_broken_file(f"the file breaks off after line {number}: {one_line(error)}", number + 1)
    if objects and not texts:
        raise JobError(
            f"--text-column {builder.text_column}: no line of {file.name} has it; found: {', '.join(columns)}"
        )
    if builder.id_column and objects and builder.id_column not in columns:
        raise JobError(f"--id-column {builder.id_column}: no line of {file.name} has it; found: {', '.join(columns)}")
    for name, kinds in kept.items():
        if objects and name not in columns:
            raise JobError(f"--keep-columns {name}: no line of {file.name} has it; found: {', '.join(columns)}")
        if objects:
            builder.keep(name, _arrow_type(kinds - {type(None)}))


def id_name(names: Container[str], id_column: str | None) -> str | None:
    """Which of a line's or file's columns holds the id; None if it gets one from its place."""
    return id_column or next((name for name in DEFAULT_IDS if name in names), None)


def _line_id(value: dict[str, Any], builder: CatalogueBuilder, fallback: str) -> str:
    name = id_name(value, builder.id_column)
    if name is None:
        return fallback
    document_id = value.get(name)
    if document_id is None or isinstance(document_id, dict | list | bool) or document_id == "":
        raise DocumentError(f"its id ({name}) is {json.dumps(document_id)[:60]}, expected text or a number")
    return str(document_id)


def _arrow_type(kinds: set[type]) -> pa.DataType:
    if kinds <= {str}:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds <= {int, float}:
        return pa.float64()
    return pa.string()  # mixed or nested values are kept as JSON text


class JsonlReader:
    """Reads lines by offset; a compressed file is read on from where the last document ended, if it can be."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], tuple[BinaryIO, int]] = {}

    def read(self, at: Locator) -> dict[str, Any]:
        """The object on the line at a locator. Raises DocumentError."""
        try:
            line = self._plain(at) if at.kind == "jsonl" else self._compressed(at)
        except stream_errors() as error:
            raise DocumentError(f"cannot be read: {one_line(error)}") from None
        return parse_line(line)

    def _plain(self, at: Locator) -> bytes:
        with open_filesystem(at.filesystem).open_input_file(at.path) as file:
            file.seek(at.start)
            return file.read(at.length)

    def _compressed(self, at: Locator) -> bytes:
        key = (at.filesystem, at.path)
        stream, position = self._open.pop(key, (None, 0))
        if stream is None or position > at.start:
            if stream is not None:
                stream.close()
            while len(self._open) >= 4:
                self._open.pop(next(iter(self._open)))[0].close()
            stream, position = open_stream(open_filesystem(at.filesystem), at.path, at.kind), 0
        while position < at.start:
            skipped = len(stream.read(min(1 << 20, at.start - position)))
            if not skipped:
                raise DocumentError("cannot be read: the file is shorter than it was when it was listed")
            position += skipped
        line = stream.read(at.length)
        self._open[key] = (stream, position + len(line))
        return line
