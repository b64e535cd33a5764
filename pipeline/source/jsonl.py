"""JSON lines, plain or compressed: listing by one pass over the file, reading by offset."""

from __future__ import annotations

import json
from typing import Any

from pipeline.errors import DocumentError, one_line
from pipeline.location import open_filesystem
from pipeline.results.kept_columns import json_type
from pipeline.settings.shared import ReadSettings
from pipeline.source.catalogue import CatalogueBuilder
from pipeline.source.ids import id_name, json_id
from pipeline.source.protocol import Locator, SourceFile
from pipeline.source.streams import MOST_BYTES, StretchReader, lines, open_stream, stream_errors


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
    """Add a file's lines. Broken lines become documents with an error."""
    offset, number = 0, 0
    kept: dict[str, set[type]] = {name: set() for name in builder.keep_columns}
    try:
        with open_stream(open_filesystem(file.filesystem), file.path) as stream:
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
                    builder.saw(value)
                    for name in kept.keys() & value.keys():
                        kept[name].add(type(value[name]))
                    text = value.get(builder.text_column)
                    size = len(text) if isinstance(text, str) else 0
                    builder.add(_line_id(value, builder.id_column) or fallback, start, len(line), size, number)
                except DocumentError as error:
                    builder.add(fallback, start, len(line), 0, number, f"line {number}: {error}")
    except stream_errors() as error:
        builder.add_broken_file(f"the file breaks off after line {number}: {one_line(error)}", number + 1)
    for name, kinds in kept.items():
        if kinds:
            builder.keep(name, json_type(kinds))


def _line_id(value: dict[str, Any], id_column: str | None) -> str:
    """The id in a line, empty if lines have none. Raises DocumentError for what is none."""
    name = id_name(value, id_column)
    if name is None:
        return ""
    text, wrong = json_id(value.get(name))
    if wrong:
        raise DocumentError(f"its id ({name}) is {wrong}, expected text or a number")
    return text


class JsonlReader:
    """Reads lines by their offsets."""

    def __init__(self, columns: tuple[str, ...], settings: ReadSettings) -> None:
        self._lines = StretchReader()

    def read(self, at: Locator) -> dict[str, Any]:
        """The object on the line at a locator. Raises DocumentError."""
        return parse_line(self._lines.read(at))
