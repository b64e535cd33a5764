"""Documents from files of the formats in FORMATS; the driver lists them, workers read them one by one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline.converters.protocol import Converted
from pipeline.errors import DocumentError, JobError, one_line
from pipeline.interruptible import interruptible
from pipeline.results.kept_columns import Kept, keep
from pipeline.settings.shared import ReadSettings
from pipeline.source.catalogue import Asked, Catalogue, CatalogueBuilder, Document, in_shard
from pipeline.source.converted import refuse_missing_packages
from pipeline.source.files import find_files
from pipeline.source.formats import FORMATS
from pipeline.source.ids import id_name, id_texts, json_id
from pipeline.source.protocol import Format, Locator, Reader, SourceFile
from pipeline.source.texts import checked_text

__all__ = [
    "FORMATS",
    "Asked",
    "Catalogue",
    "Document",
    "DocumentReader",
    "Format",
    "Locator",
    "SourceFile",
    "find_files",
    "input_hash",
    "list_documents",
]


def list_documents(
    files: list[SourceFile],
    *,
    text_column: str = "text",
    id_column: str | None = None,
    keep_columns: tuple[str, ...] = (),
    shard: tuple[int, int] = (0, 1),
    settings: ReadSettings = ReadSettings(),
    prompt_columns: Mapping[str, str] = MappingProxyType({}),
) -> Catalogue:
    """All documents of `files`, or one stable share (i, n) of them.

    prompt_columns: columns that prompts are made from, each with the flag that asks for it.

    What is wrong with one file costs that file's documents. Raises JobError for a column that none has (the message
    lists what there is), ids that occur twice, a package that is not installed, nothing readable at all.
    """
    refuse_missing_packages(files)
    builder = CatalogueBuilder(text_column, id_column, keep_columns, settings.encoding, prompt_columns)
    for name, flag in (dict.fromkeys(keep_columns, "--keep-columns") | dict(prompt_columns)).items():
        if not any(file.format.has_columns for file in files):
            raise JobError(f"{flag} {name}: the input's files have no columns")
    sizes: Counter[str] = Counter()
    for file in files:
        sizes[file.format.name] += file.size
    for file in files:
        builder.start_file(file, sizes[file.format.name])
        try:
            interruptible(bool(file.filesystem), file.format.lister, file, builder)
        except Exception as error:
            if not file.filesystem:
                raise
            builder.add_broken_file(f"cannot be read: {one_line(error)}")  # filesystems of fsspec raise what they like
    builder.refuse_unknown_columns()
    catalogue = builder.build()
    if not len(catalogue):
        raise JobError(f"the input holds no documents: {len(files)} files, none with a line or row")
    if builder.broken_files == len(catalogue):
        first = catalogue.document(0)
        raise JobError(f"no input file can be read; the first: {first.source}: {first.error}")
    index, count = shard
    return catalogue if count == 1 else catalogue.select(in_shard(catalogue.ids.to_pylist(), index, count))


class DocumentReader:
    """Reads documents by locator, inside a worker. columns: those that prompts are made from."""

    def __init__(
        self,
        text_column: str,
        kept: list[pa.Field],
        settings: ReadSettings = ReadSettings(),
        columns: tuple[str, ...] = (),
    ) -> None:
        self._text_column = text_column
        self._kept = kept
        self._settings = settings
        self._columns = columns
        self._readers: dict[str, Reader] = {}  # by format, made when it first occurs

    @staticmethod
    def converts(document: Document) -> bool:
        """Whether another process takes the text out of it; then `read` may be called beside itself."""
        form = FORMATS.get(document.locator.format)
        return form is not None and form.is_converted

    def read(self, document: Document) -> tuple[str, Kept]:
        """The text and the kept columns. Raises DocumentError with what is wrong with the document."""
        try:
            return interruptible(bool(document.locator.filesystem), self._read, document.locator)
        except DocumentError:
            raise
        except Exception as error:  # filesystems of fsspec raise what they like
            if not document.locator.filesystem:
                raise
            raise DocumentError(f"cannot be read: {one_line(error)}") from None

    def _read(self, at: Locator) -> tuple[str, Kept]:
        form = FORMATS[at.format]
        if form.name not in self._readers:
            names = (self._text_column, *(field.name for field in self._kept), *self._columns)
            self._readers[form.name] = form.reader(tuple(dict.fromkeys(names)), self._settings)
        values = self._readers[form.name].read(at)
        if not form.has_columns:
            return _without_columns(values[self._text_column], self._kept, self._columns)
        _refuse_another(values, at)
        if self._text_column not in values:
            raise DocumentError(f"it has no {self._text_column!r}; found: {', '.join(map(str, values))}")
        return checked_text(_python(values[self._text_column])), keep(values, self._kept, self._columns)


def _without_columns(value: Any, kept: list[pa.Field], columns: tuple[str, ...]) -> tuple[str, Kept]:
    nothing = keep({}, kept, columns)
    if not isinstance(value, Converted):
        return checked_text(value), nothing
    return checked_text(value.text), replace(nothing, page_starts=value.page_starts, note=value.note)


def _python(value: Any) -> Any:
    """A text as Python knows it; in an array one that is not valid UTF-8 comes as its bytes."""
    if not isinstance(value, pa.Array):
        return value
    value = value.storage if isinstance(value, pa.ExtensionArray) else value
    try:
        return value[0].as_py()
    except UnicodeDecodeError:
        return value.cast(pa.large_binary())[0].as_py()


def _refuse_another(values: dict[str, Any], at: Locator) -> None:
    """Raise DocumentError if another document stands in a document's place since its file was listed."""
    name = id_name(values, at.id_column)
    value = values.get(name) if name else None
    found = id_texts(value)[0][0] if isinstance(value, pa.Array) else json_id(value)[0]
    if name and at.listed_id not in ("", found):
        raise DocumentError(
            f"its file was written to after it was listed: {found!r} stands in its place; run the job again"
        )


def input_hash(text: str, kept: Kept) -> str:
    """16 hex digits over what a row depends on of its document: the text, the kept columns and those in prompts."""
    digest = hashlib.blake2b(text.encode(), digest_size=8)
    for values in (kept.plain, kept.prompt):
        if values:
            digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    return digest.hexdigest()
