"""What a format of input files is. Each has a module of its own here; `formats.FORMATS` is the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.source.streams import compression

if TYPE_CHECKING:
    from pipeline.settings.shared import ReadSettings
    from pipeline.source.catalogue import CatalogueBuilder


@dataclass(frozen=True)
class Format:
    """A format of input files: what it is called, how its documents are listed, and how one of them is read.

    name: for people, and in locators. suffixes: of its files' names. lister: adds the documents of a file to the
    builder, without holding their texts. What is wrong with one document goes into `CatalogueBuilder.add`, what ends
    the file into `add_broken_file`; nothing is raised on account of what a file holds.
    reader: makes a worker's reader from the names of the columns that are wanted, of the text, then of what is kept,
    and from the settings of reading.
    compressed: its files may be compressed as a whole, and their names end so (`streams.COMPRESSIONS`).
    has_columns: a document has more than its text: an id, columns to keep. number: what the place of a document in its
    file counts, if a file holds several: "line" or "row".
    is_converted: its texts come out of other processes, so that waiting for one must not keep others from being read;
    its reader may be called from several threads at once. needs: packages that it imports, of the extra `documents`.
    """

    name: str
    suffixes: tuple[str, ...]
    lister: Callable[[SourceFile, CatalogueBuilder], None]
    reader: Callable[[tuple[str, ...], ReadSettings], Reader]
    compressed: bool = False
    has_columns: bool = True
    number: str = "row"
    is_converted: bool = False
    needs: tuple[str, ...] = ()


class Reader(Protocol):
    """Reads documents of one format, one after the other; it may keep files open and remember what it has read."""

    def read(self, at: Locator) -> dict[str, Any]:
        """By column, what the document has: arrays of one value, or values as JSON has them. Texts may be UTF-8 bytes.

        A format without columns gives the text under its column's name, or a `Converted` there.
        Raises DocumentError with what is wrong.
        """
        ...


@dataclass(frozen=True)
class SourceFile:
    """A file of documents.

    filesystem: URI that pyarrow opens the filesystem by; "" is this machine's. path: inside that filesystem.
    label: short name that document ids are made of. name: for people; without credentials or query.
    """

    filesystem: str
    path: str
    label: str
    name: str
    format: Format
    size: int
    modified_ns: int

    @property
    def kind(self) -> str:
        """Format and compression, `jsonl.gz` say; a part of the input's fingerprint."""
        return self.format.name + compression(self.path)


@dataclass(frozen=True)
class Locator:
    """Where a worker finds a document.

    format: the name of it. start, length: as the format's lister gave them: byte offset and bytes of the line or record
    (jsonl, csv; of the decompressed stream where compressed), row group and row inside it (parquet), 0 and file size
    (text). id_column: as asked for. listed_id: what was found there, since the file may be written to meanwhile.
    """

    filesystem: str
    path: str
    format: str
    start: int
    length: int
    id_column: str | None = None
    listed_id: str = ""
