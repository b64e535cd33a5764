"""Documents from Parquet, JSON lines and text files; the driver lists them, workers read them one by one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

from pipeline.errors import DocumentError, JobError, one_line
from pipeline.records import valid_text
from pipeline.source.catalogue import Catalogue, CatalogueBuilder, Document, Locator, in_shard
from pipeline.source.files import SourceFile, find_files, open_filesystem
from pipeline.source.jsonl import JsonlReader, id_name, list_jsonl
from pipeline.source.parquet import ParquetReader, list_parquet

__all__ = [
    "Catalogue",
    "Document",
    "DocumentReader",
    "Locator",
    "SourceFile",
    "find_files",
    "input_hash",
    "list_documents",
]

# Up to so many bytes of Parquet the listing reads the texts to know their sizes; beyond, it takes row groups' means.
EXACT_SIZES_BYTES = 4 << 30


def list_documents(
    files: list[SourceFile],
    *,
    text_column: str = "text",
    id_column: str | None = None,
    keep_columns: tuple[str, ...] = (),
    shard: tuple[int, int] = (0, 1),
) -> Catalogue:
    """All documents of `files`, or one stable share (i, n) of them.

    Raises JobError: missing column (the message lists what there is), ids that occur twice, nothing readable at all.
    """
    builder = CatalogueBuilder(text_column, id_column, keep_columns)
    exact = sum(file.size for file in files if file.kind == "parquet") <= EXACT_SIZES_BYTES
    if keep_columns and all(file.kind == "text" for file in files):
        raise JobError(f"--keep-columns {keep_columns[0]}: text files have no columns")
    for file in files:
        builder.start_file(file)
        if file.kind == "parquet":
            list_parquet(file, builder, exact)
        elif file.kind == "text":
            builder.add(file.label, 0, file.size, file.size)
        else:
            list_jsonl(file, builder)
    catalogue = builder.build()
    if not len(catalogue):
        raise JobError(f"the input holds no documents: {len(files)} files, none with a line or row")
    if builder.broken_files == len(catalogue):
        first = catalogue.document(0)
        raise JobError(f"no input file can be read; the first: {first.source}: {first.error}")
    index, count = shard
    return catalogue if count == 1 else catalogue.select(in_shard(catalogue.ids.to_pylist(), index, count))


class DocumentReader:
    """Reads documents by locator, inside a worker."""

    def __init__(self, text_column: str, kept: list[pa.Field]) -> None:
        self._text_column = text_column
        self._kept = kept
        self._jsonl = JsonlReader()
        self._parquet = ParquetReader((text_column, *(field.name for field in kept)))

    def read(self, document: Document) -> tuple[str, dict[str, Any]]:
        """The text and the kept columns. Raises DocumentError with what is wrong with the document."""
        at = document.locator
        if at.kind == "text":
            return self._checked(self._read_file(at)), dict.fromkeys(field.name for field in self._kept)
        values = self._parquet.read(at) if at.kind == "parquet" else self._jsonl.read(at)
        _refuse_another(values, at)
        if self._text_column not in values:
            raise DocumentError(f"it has no {self._text_column!r}; found: {', '.join(map(str, values))}")
        kept = {field.name: _kept_value(values.get(field.name), field.type, at.kind) for field in self._kept}
        return self._checked(values[self._text_column]), kept

    def _read_file(self, at: Locator) -> bytes:
        try:
            with open_filesystem(at.filesystem).open_input_file(at.path) as file:
                return file.read()
        except (OSError, pa.ArrowException) as error:
            raise DocumentError(f"cannot be read: {one_line(error)}") from None

    def _checked(self, value: Any) -> str:
        if isinstance(value, bytes):
            try:
                value = value.decode().removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise DocumentError(
                    f"invalid UTF-8 at byte {error.start}: {error.reason}; save the text as UTF-8"
                ) from None
        if value is None:
            raise DocumentError("its text is null")
        if not isinstance(value, str):
            raise DocumentError(f"its text is {type(value).__name__}, expected a string")
        if not value:
            raise DocumentError("its text is empty (0 bytes)")
        if value.isspace():
            raise DocumentError(f"its text is blank ({len(value)} characters of white space)")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DocumentError(
                f"its text has a lone surrogate at character {error.start}; no UTF-8 can hold it"
            ) from None
        return value


def _refuse_another(values: dict[str, Any], at: Locator) -> None:
    """Raise DocumentError if another document stands in a document's place since its file was listed."""
    name = id_name(values, at.id_column)
    found = valid_text(str(values.get(name))) if name else at.listed_id
    if at.listed_id not in ("", found):
        raise DocumentError(
            f"its file was written to after it was listed: {found!r} stands in its place; run the job again"
        )


def input_hash(text: str, kept: dict[str, Any]) -> str:
    """16 hex digits over what a row depends on of its document: the text and the kept columns."""
    digest = hashlib.blake2b(text.encode(), digest_size=8)
    if kept:
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _kept_value(value: Any, kind: pa.DataType, source_kind: str) -> Any:
    if source_kind != "parquet" and pa.types.is_string(kind) and value is not None and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return value
