"""Files that are converted into text: each is a document, and its bytes go to a process that takes the text out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from functools import partial
from typing import Any

from pipeline.converters.protocol import MOST_BYTES
from pipeline.errors import DocumentError, JobError
from pipeline.settings.shared import ReadSettings
from pipeline.source.catalogue import CatalogueBuilder
from pipeline.source.processes import shared_converters
from pipeline.source.protocol import Format, Locator, SourceFile
from pipeline.source.streams import whole_file

EXTRA = "documents"


def converted_format(name: str, *suffixes: str, needs: tuple[str, ...]) -> Format:
    """The format whose files `pipeline.converters.<name>` converts. needs: the packages that it imports."""
    make = partial(ConvertingReader, f"pipeline.converters.{name}")
    return Format(name, suffixes, list_whole_file, make, has_columns=False, is_converted=True, needs=needs)


def list_whole_file(file: SourceFile, builder: CatalogueBuilder) -> None:
    """Add the file; it is not opened."""
    large = f"the file has {file.size:,} bytes; at most {MOST_BYTES:,} are converted"
    builder.add(file.label, 0, file.size, file.size, error=large if file.size > MOST_BYTES else "")


def refuse_missing_packages(files: Iterable[SourceFile]) -> None:
    """Raise JobError if the packages that some files need are not installed."""
    for form in dict.fromkeys(file.format for file in files):
        missing = [name for name in form.needs if importlib.util.find_spec(name) is None]
        if missing:
            raise JobError(
                f"--input: {form.suffixes[0]} files are read with the package {missing[0]}, which is not installed: "
                f"pip install 'stemline[{EXTRA}]' (or leave these files out: --input 'FOLDER/**/*.txt')"
            )


class ConvertingReader:
    """Reads whole files through a converter. It may be called from several threads at once."""

    def __init__(self, converter: str, columns: tuple[str, ...], settings: ReadSettings) -> None:
        self._converter, self._text_column, self._encoding = converter, columns[0], settings.encoding
        self._converters = shared_converters(settings.conversion_seconds, settings.conversion_memory)

    def read(self, at: Locator) -> dict[str, Any]:
        """What the converter gives back, under the text column's name. Raises DocumentError."""
        data = whole_file(at, MOST_BYTES)
        if not data:
            raise DocumentError("its file is empty (0 bytes)")
        if len(data) > MOST_BYTES:
            raise DocumentError(f"the file has more than {MOST_BYTES:,} bytes; no more are converted")
        return {self._text_column: self._converters.convert(self._converter, data, self._encoding)}
