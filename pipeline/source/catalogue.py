"""The list of documents: ids, places and sizes, a few dozen bytes a document; never the texts."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decoding import UTF_8
from pipeline.errors import JobError, one_line
from pipeline.results.columns import valid_text
from pipeline.results.kept_columns import common_type
from pipeline.source.protocol import Locator, SourceFile
from pipeline.source.streams import MOST_BYTES

MOST_NAMES = 100
# Questions by name and text.
Asked = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Document:
    """One document. size_bytes: of its text, as well as the listing knows. error: why it cannot be read, if so.

    stamp: the same as long as nobody has written to its file. questions: (name, text) of those to ask, text None where
    only the document knows; empty for all of the job's.
    """

    document_id: str
    source: str
    locator: Locator
    size_bytes: int
    error: str = ""
    stamp: str = ""
    questions: Asked = ()


class Catalogue:
    """Documents as columns. Rows are addressed by position; `order` says in which order to process them."""

    def __init__(
        self, files: list[SourceFile], ids: pa.Array, columns: np.ndarray, errors: dict[int, str],
        kept: list[pa.Field], id_column: str | None = None, questions: Sequence[Asked] = ((),),
        asked: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.files = files
        self.ids = ids
        self.columns = columns  # int64 [documents, 5]: file, start, length, size, line or row for people
        self.errors = errors
        self.kept = kept
        self.id_column = id_column
        # Of each document, which of `questions` are to be asked: int32 [documents].
        self.questions = questions
        self.asked = np.zeros(len(ids), np.int32) if asked is None else asked

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def total_bytes(self) -> int:
        """Bytes of all texts together."""
        return int(self.columns[:, 3].sum())

    def document(self, position: int) -> Document:
        """The document at `position`."""
        file_index, start, length, size, number = (int(x) for x in self.columns[position])
        file = self.files[file_index]
        document_id = self.ids[position].as_py()
        locator = Locator(file.filesystem, file.path, file.format.name, start, length, self.id_column, document_id)
        return Document(
            document_id, place(file, number), locator, size,
            self.errors.get(position, ""), self.stamp(position), self.questions[self.asked[position]],
        )  # fmt: skip

    def stamp(self, position: int) -> str:
        """The file's size and time of change, and the document's place in it."""
        file_index, start, length = (int(x) for x in self.columns[position, :3])
        file = self.files[file_index]
        return f"{file.size}:{file.modified_ns}:{start}:{length}"

    def select(self, keep: np.ndarray) -> Catalogue:
        """The documents where `keep` (bool [documents]) is true."""
        positions = np.flatnonzero(keep)
        moved = {old: new for new, old in enumerate(positions.tolist()) if old in self.errors} if self.errors else {}
        errors = {moved[old]: text for old, text in self.errors.items() if old in moved}
        ids = self.ids.take(pa.array(positions))
        return Catalogue(
            self.files, ids, self.columns[positions], errors, self.kept, self.id_column, self.questions,
            self.asked[positions],
        )  # fmt: skip

    def asking(self, asked: Asked, missing: np.ndarray) -> Catalogue:
        """The documents that lack an answer, each with the questions that it lacks.

        asked: all questions. missing: bool [documents, questions].
        """
        sets, which = np.unique(missing, axis=0, return_inverse=True)
        questions = [tuple(each for each, lacks in zip(asked, one, strict=True) if lacks) for one in sets.tolist()]
        some: np.ndarray = np.asarray(missing.any(axis=1))
        left = self.select(some)
        left.questions, left.asked = questions, which.reshape(-1)[some].astype(np.int32)
        return left

    def order(self) -> np.ndarray:
        """Positions, longest first, int64 [documents].

        Lengths within a factor of two count as equal; among equals the place in the input decides, so that a worker
        which reads a compressed file or a large row group finds the next document close by.
        """
        size = np.maximum(self.columns[:, 3], 1)
        octave = np.floor(np.log2(size)).astype(np.int64)
        return np.lexsort((self.columns[:, 2], self.columns[:, 1], self.columns[:, 0], -octave))

    def documents(self) -> Iterator[Document]:
        """All documents, longest first."""
        for position in self.order():
            yield self.document(int(position))


def place(file: SourceFile, number: int) -> str:
    """A document's source for people: file name, and line (from 1) or row (from 0) if the file holds several."""
    return file.name if number < 0 else f"{file.name} {file.format.number} {number}"


class CatalogueBuilder:
    """Collects documents file by file."""

    def __init__(
        self, text_column: str, id_column: str | None, keep_columns: tuple[str, ...], encoding: str = UTF_8,
        prompt_columns: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.text_column = text_column
        self.encoding = encoding
        self._prompt_columns = prompt_columns
        self.id_column = id_column
        self.keep_columns = keep_columns
        self.files: list[SourceFile] = []
        self.format_bytes = 0  # of all files together that are of the current one's format
        self.broken_files = 0
        self._kept: dict[str, pa.DataType] = {}
        self._columns: dict[str, None] = {}  # of all files, as far as people need to be told
        self._wanted = {text_column, *([id_column] if id_column else []), *keep_columns, *prompt_columns}
        self._ids: list[str] = []
        self._values = array("q")
        self._errors: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def start_file(self, file: SourceFile, format_bytes: int) -> None:
        """Documents added from now on are in `file`."""
        self.files.append(file)
        self.format_bytes = format_bytes

    def add(self, document_id: str, start: int, length: int, size: int, number: int = -1, error: str = "") -> None:
        """A document of the current file; `error` marks it as unreadable."""
        if size > MOST_BYTES:
            error = error or f"its text has {size:,} bytes; at most {MOST_BYTES:,} are read"
        if error:
            self._errors[len(self._ids)] = one_line(error)
        self._ids.append(valid_text(document_id))
        self._values.extend((len(self.files) - 1, start, length, size, number))

    def add_broken_file(self, reason: str, number: int = -1) -> None:
        """The current file cannot be read (from line `number` on); one error row stands for what is lost."""
        self.broken_files += 1
        label = self.files[-1].label
        self.add(label if number < 0 else f"{label}:{number}", 0, 0, 0, number, reason)

    def saw(self, names: Iterable[str]) -> None:
        """Note which columns the current file, or a line of it, has."""
        for name in names:
            if name not in self._columns and (name in self._wanted or len(self._columns) < MOST_NAMES):
                self._columns[name] = None

    def keep(self, name: str, kind: pa.DataType) -> None:
        """Note the type of a kept column in the current file."""
        self._kept[name] = common_type(self._kept.get(name, pa.null()), kind)

    def refuse_unknown_columns(self) -> None:
        """Raise JobError for a column that no file has, if any file has columns at all."""
        wanted = [("--text-column", self.text_column), ("--id-column", self.id_column)]
        wanted += [("--keep-columns", name) for name in self.keep_columns]
        for flag, name in wanted + [(flag, name) for name, flag in self._prompt_columns.items()]:
            if name and self._columns and name not in self._columns:
                found = ", ".join(list(self._columns)[:MOST_NAMES])
                raise JobError(f"{flag} {name}: no file or line of the input has it; found: {found}")

    def build(self) -> Catalogue:
        """The catalogue. Raises JobError if ids occur twice."""
        columns = np.frombuffer(self._values, dtype=np.int64).reshape(-1, 5).copy()
        ids = pa.array(self._ids, pa.large_string())
        self._ids = []
        kept = [pa.field(name, self._type_of(name)) for name in self.keep_columns]
        catalogue = Catalogue(self.files, ids, columns, self._errors, kept, self.id_column)
        refuse_duplicates(catalogue)
        return catalogue

    def _type_of(self, name: str) -> pa.DataType:
        kind = self._kept.get(name, pa.null())
        return pa.string() if pa.types.is_null(kind) else kind


def refuse_duplicates(catalogue: Catalogue) -> None:
    """Raise JobError, naming the ids and where they stand, if ids occur more than once."""
    counts = pc.value_counts(catalogue.ids)
    twice = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
    if not len(twice):
        return
    named, by_place = [], True
    for value in twice[:3].to_pylist():
        positions = np.flatnonzero(pc.equal(catalogue.ids, value).to_numpy(zero_copy_only=False))[:3]
        named.append(f"{value!r} ({', '.join(catalogue.document(int(p)).source for p in positions)})")
        by_place &= all(_is_place(catalogue, int(p), value) for p in positions)
    more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
    mend = (
        "these files have the same name in several inputs: give the folder above them as the one --input, so that ids "
        "have its subfolders, or run a job for each"
        if by_place
        else "remove the repeats, name a column of unique ids with --id-column, or give --id-column '' for ids of file "
        "name and row"
    )
    what = "a document id occurs" if len(twice) == 1 else f"{len(twice)} document ids occur"
    raise JobError(f"{what} more than once: {'; '.join(named)}{more}; {mend}")


def _is_place(catalogue: Catalogue, position: int, document_id: str) -> bool:
    """Whether an id is made of its file's name."""
    file_index, number = (int(x) for x in catalogue.columns[position, [0, 4]])
    label = valid_text(catalogue.files[file_index].label)
    return document_id in (label, f"{label}:{number}")


def in_shard(ids: Iterable[str], index: int, count: int) -> np.ndarray:
    """bool [documents]: whether a document falls into share `index` of `count`, by a hash of its id."""

    def share(document_id: str) -> int:
        return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "big") % count

    return np.fromiter((share(x) == index for x in ids), dtype=bool)
