"""Text files: each is a document."""

from __future__ import annotations

from typing import Any

from pipeline.errors import DocumentError
from pipeline.settings.shared import ReadSettings
from pipeline.source.catalogue import CatalogueBuilder
from pipeline.source.protocol import Locator, SourceFile
from pipeline.source.streams import MOST_BYTES, whole_file
from pipeline.source.texts import decoded


def list_text_file(file: SourceFile, builder: CatalogueBuilder) -> None:
    """Add the file; it is not opened."""
    builder.add(file.label, 0, file.size, file.size)


class TextFileReader:
    """Reads whole files."""

    def __init__(self, columns: tuple[str, ...], settings: ReadSettings) -> None:
        self._text_column, self._encoding = columns[0], settings.encoding

    def read(self, at: Locator) -> dict[str, Any]:
        """The text, under the text column's name. Raises DocumentError."""
        data = whole_file(at, MOST_BYTES)
        if len(data) > MOST_BYTES:
            raise DocumentError(f"its text has more than {MOST_BYTES:,} bytes; no more are read")
        return {self._text_column: decoded(data, self._encoding)}
