"""What a caller in Python hands over, texts or paths, as documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.location import is_remote
from pipeline.results.columns import valid_text
from pipeline.results.kept_columns import Kept, keep
from pipeline.settings.config import JobConfig
from pipeline.settings.options import short
from pipeline.source import Document, DocumentReader, Locator, SourceFile, find_files, list_documents
from pipeline.source.texts import checked_text

Texts = str | Path | Iterable[Any] | Mapping[Any, Any]
_MEMORY = Locator("", "", "memory", 0, 0)


@dataclass(frozen=True)
class TextDocument(Document):
    """A document that the caller holds. text: a string or UTF-8 bytes; anything else ends in an error row.

    columns: those that prompts are made from.
    """

    text: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)


class TextReader(DocumentReader):
    """Reads documents by locator, or takes the text that they bring along."""

    def read(self, document: Document) -> tuple[str, Kept]:
        """The text and the kept columns. Raises DocumentError with what is wrong with the document."""
        if isinstance(document, TextDocument):
            return checked_text(document.text), keep(document.columns, self._kept, self._columns)
        return super().read(document)


@dataclass(frozen=True)
class Inputs:
    """Documents in the order in which they were given, and the fields of --keep-columns that their files have."""

    documents: list[Document]
    kept: list[pa.Field] = field(default_factory=list)


def text_document(
    document_id: str, text: Any, source: str, columns: Mapping[str, Any] = MappingProxyType({})
) -> TextDocument:
    """A document of a text that need not be one: what is wrong with it goes to its row."""
    size = len(text) if isinstance(text, str | bytes) else 0
    return TextDocument(valid_text(document_id), source, _MEMORY, size, text=text, columns=dict(columns))


def list_inputs(
    texts: Texts | None, inputs: tuple[str, ...], config: JobConfig, columns: Mapping[str, str] = MappingProxyType({})
) -> Inputs:
    """The documents of a call. Strings are texts, Paths are read as the job reads its input.

    Ids are the mapping's keys, a text's place in the list, or those that the job gives to files and rows.
    columns: those that prompts are made from, with the flags that ask for them.
    Raises JobError if there are none, if an id occurs twice, for paths that do not exist and for strings that name one.
    """
    items = list(_items(texts))
    files = [find_files((str(item),))[0] if isinstance(item, Path) else [] for _, item in items]
    if isinstance(texts, Mapping):  # files of the same name in different folders, each with an id of its own
        files = [
            [replace(file, label=f"{number}/{file.label}") for file in group] for number, group in enumerate(files)
        ]
    files.append(find_files(inputs)[0] if inputs else [])
    from_files, kept = _list_files(files, config, columns)
    documents: list[Document] = []
    for (name, item), found in zip(items, from_files, strict=False):
        if not isinstance(item, Path):
            _refuse_names(name, item)
            for column, flag in columns.items():
                raise JobError(f"{flag} {column}: texts have no columns; give files that have, by input=")
            found = [text_document(str(name), item, "memory")]
        elif isinstance(texts, Mapping):
            if len(found) != 1:
                raise JobError(f"documents[{short(name)}]: {item} holds {len(found)} documents, one was expected")
            found = [replace(found[0], document_id=valid_text(str(name)))]
        documents += found
    documents += from_files[-1]
    if not documents:
        raise JobError("there are no documents: give texts, {id: text}, pathlib.Paths, or input=")
    _refuse_doubles(documents)
    return Inputs(documents, kept)


def _items(texts: Texts | None) -> Iterator[tuple[Any, Any]]:
    """(id, text or Path) of what was given."""
    if texts is None:
        return iter(())
    if isinstance(texts, Mapping):
        return iter(texts.items())
    if isinstance(texts, str | Path):
        return iter([(0, texts)])
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise JobError(f"documents must be texts, {{id: text}} or pathlib.Paths, got {short(texts)}")
    return iter(enumerate(texts))


def _list_files(
    groups: list[list[SourceFile]], config: JobConfig, columns: Mapping[str, str]
) -> tuple[list[list[Document]], list[pa.Field]]:
    """The documents of each group of files, and the kept columns."""
    files = [file for group in groups for file in group]
    if not files:
        if config.keep_columns:
            raise JobError(f"keep_columns {config.keep_columns[0]}: texts have no columns")
        return [[] for _ in groups], []
    catalogue = list_documents(
        files,
        text_column=config.text_column,
        id_column=config.id_column,
        keep_columns=config.keep_columns,
        settings=config,
        prompt_columns=columns,
    )
    owner = [number for number, group in enumerate(groups) for _ in group]
    documents: list[list[Document]] = [[] for _ in groups]
    for position, file in enumerate(catalogue.columns[:, 0].tolist()):
        documents[owner[file]].append(catalogue.document(position))
    return documents, catalogue.kept


def _refuse_names(name: Any, text: Any) -> None:
    """Raise JobError for a string that is meant as a path, which nobody would want summarised."""
    if not isinstance(text, str) or not text or len(text) > 1000 or "\n" in text or "\0" in text:
        return
    if is_remote(text) and " " not in text:
        raise JobError(f"documents[{short(name)}] is {short(text)}, a URI, but a string is taken as a text: use input=")
    try:
        exists = not text.isspace() and Path(text).exists()
    except (OSError, ValueError):
        return
    if exists:
        raise JobError(
            f"documents[{short(name)}] is {short(text)}, the name of a file or folder, but a string is taken as a "
            "text: give pathlib.Path(...) or use input="
        )


def _refuse_doubles(documents: list[Document]) -> None:
    seen: dict[str, Document] = {}
    for document in documents:
        other = seen.setdefault(document.document_id, document)
        if other is not document:
            raise JobError(
                f"two documents have the id {document.document_id!r} ({other.source}, {document.source}); "
                "give them as {id: text}"
            )
