"""A list of outputs that a reader can search, filter and open, and how it is packed into a page.

The list itself (names, marks, first words) is one compressed block of JSON that the page reads at once. Whole texts are
in further blocks, which it reads when they are searched or opened, so that ten thousand outputs cost no waiting.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

# A block of texts, as JSON before it is compressed; the browser unpacks one in a few milliseconds.
BLOCK_CHARACTERS = 400_000
PREVIEW_CHARACTERS = 240


class Label(NamedTuple):
    """A group, a status or a flag: what the data calls it, what people do, what it means, and how to take it."""

    name: str
    label: str
    about: str = ""
    tone: Literal["", "good", "warn", "bad"] = ""


class Question(NamedTuple):
    """What was asked of every document, by its id."""

    name: str
    text: str


class Evidence(NamedTuple):
    """Where a passage of the document supports a piece of the output: offsets in characters, [start, end)."""

    output_start: int
    output_end: int
    start: int
    end: int
    score: float | None


@dataclass(frozen=True)
class Pane:
    """A text that an entry opens. parts: (text, "" or "only" for what the other pane lacks).

    evidence: passages of the entry's document that support it; None if nobody looked for any.
    """

    title: str
    parts: Sequence[tuple[str, str]]
    note: str = ""
    evidence: Sequence[Evidence] | None = None

    @property
    def text(self) -> str:
        """All parts."""
        return "".join(text for text, _ in self.parts)


@dataclass(frozen=True)
class Entry:
    """A line of the list, and what it opens.

    group, status, flags, question: places in the lists of `Outputs`; -1 is none. tokens, seconds: to sort by.
    document: place in `Outputs.documents`, -1 for none, and then `document_note` says why. preview: what the list shows
    of it; empty: its error, or the beginning of its last pane. answer: a typed answer, field by field. facts: (what,
    figure). page_starts: offsets of the document's pages.
    """

    name: str
    group: int
    panes: Sequence[Pane]
    status: int = 0
    flags: Sequence[int] = ()
    question: int = -1
    tokens: int = 0
    seconds: float | None = None
    document: int = -1
    document_note: str = ""
    error: str = ""
    preview: str = ""
    reasoning: str = ""
    answer: Sequence[tuple[str, str]] = ()
    page_starts: Sequence[int] = ()
    facts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Excerpt:
    """What a page has of a document: passages (offset of the first character, text), and its length in characters.

    wide: offsets of the characters that JavaScript counts twice.
    """

    passages: Sequence[tuple[int, str]]
    length: int
    wide: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class Outputs:
    """The list. Entries come in the order in which they are shown first, which `order` names.

    note: what is not in it, and why.
    """

    groups: Sequence[Label]
    statuses: Sequence[Label]
    flags: Sequence[Label]
    questions: Sequence[Question]
    entries: Sequence[Entry]
    documents: Sequence[Excerpt] = ()
    order: str = "Needs a look first"
    note: str = ""

    @property
    def counts(self) -> list[tuple[Label, int]]:
        """Each group with the number of its entries."""
        found = np.bincount([entry.group for entry in self.entries] or [0], minlength=len(self.groups))
        return list(zip(self.groups, found.tolist() if self.entries else [0] * len(self.groups), strict=True))

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """(name, data) of each block: `index` first, then `rows-0`, ..., `documents-0`, ...; data: `packed`."""
        rows, row_starts = _in_blocks("rows", (self._row(entry) for entry in self.entries))
        documents, document_starts = _in_blocks("documents", map(_document, self.documents))
        index = {
            "groups": [each._asdict() for each in self.groups],
            "statuses": [each._asdict() for each in self.statuses],
            "flags": [each._asdict() for each in self.flags],
            "questions": [each._asdict() for each in self.questions],
            "order": self.order,
            "starts": {"rows": row_starts, "documents": document_starts},
            "name": [entry.name for entry in self.entries],
            "group": [entry.group for entry in self.entries],
            "status": [entry.status for entry in self.entries],
            "flagged": [list(entry.flags) for entry in self.entries],
            "question": [entry.question for entry in self.entries],
            "tokens": [entry.tokens for entry in self.entries],
            "seconds": [_rounded(entry.seconds) for entry in self.entries],
            "preview": [_preview(entry) for entry in self.entries],
        }
        return [("index", packed(index)), *rows, *documents]

    def _row(self, entry: Entry) -> dict[str, Any]:
        wide = self.documents[entry.document].wide if entry.document >= 0 else _NONE
        return {
            "panes": [
                pane.__dict__ | {"evidence": _in_utf16(pane.evidence, wide_characters(pane.text), wide)}
                for pane in entry.panes
            ],
            "document": entry.document,
            "documentNote": entry.document_note,
            "error": entry.error,
            "reasoning": entry.reasoning,
            "answer": entry.answer,
            "pages": [_utf16(wide, start) for start in entry.page_starts],
            "facts": entry.facts,
        }


_NONE = np.empty(0, np.int64)


def wide_characters(text: str) -> np.ndarray:
    """Offsets of the characters that UTF-16, and so JavaScript, counts twice; int64, rising."""
    if text.isascii():
        return _NONE
    return np.flatnonzero(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32) > 0xFFFF)


def packed(value: Any) -> str:
    """A value as JSON, compressed (raw deflate) and in base64: nothing in it can end an element or start a script."""
    data = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    squeezer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return base64.b64encode(squeezer.compress(data) + squeezer.flush()).decode()


def _in_blocks(name: str, values: Iterator[Any]) -> tuple[list[tuple[str, str]], list[int]]:
    """Blocks of BLOCK_CHARACTERS or one value, and the number of the first value in each."""
    blocks: list[tuple[str, str]] = []
    starts: list[int] = []
    group: list[Any] = []
    size = 0
    for number, value in enumerate(values):
        length = len(json.dumps(value, ensure_ascii=False))
        if group and size + length > BLOCK_CHARACTERS:
            blocks.append((f"{name}-{len(blocks)}", packed(group)))
            group, size = [], 0
        if not group:
            starts.append(number)
        group.append(value)
        size += length
    if group:
        blocks.append((f"{name}-{len(blocks)}", packed(group)))
    return blocks, starts


def _document(excerpt: Excerpt) -> dict[str, Any]:
    passages = [(_utf16(excerpt.wide, start), text) for start, text in excerpt.passages]
    return {"passages": passages, "length": _utf16(excerpt.wide, excerpt.length)}


def _in_utf16(
    evidence: Sequence[Evidence] | None, output: np.ndarray, document: np.ndarray
) -> list[tuple[int, int, int, int, float | None]] | None:
    if evidence is None:
        return None
    return [
        (_utf16(output, one.output_start), _utf16(output, one.output_end), _utf16(document, one.start),
         _utf16(document, one.end), _rounded(one.score))
        for one in evidence
    ]  # fmt: skip


def _utf16(wide: np.ndarray, offset: int) -> int:
    return offset + int(np.searchsorted(wide, offset)) if len(wide) else offset


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


def _preview(entry: Entry) -> str:
    told = entry.preview or entry.error or entry.panes[-1].text
    return " ".join(told[: 4 * PREVIEW_CHARACTERS].split())[:PREVIEW_CHARACTERS]
