"""The documents of a job, read once more from where they are, and the passages of them that a page shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jobs.page.outputs import Excerpt, wide_characters
from jobs.report.results import Run
from pipeline.errors import DocumentError, JobError
from pipeline.prompts.task import template_columns
from pipeline.settings.config import JobConfig
from pipeline.settings.shared import ReadSettings
from pipeline.source import Catalogue, Document, DocumentReader, find_files, input_hash, list_documents

# Characters of documents that a page holds, compressed about a third of it in bytes; shared out evenly.
PAGE_CHARACTERS = 32_000_000
FEWEST, MOST = 1_500, 200_000  # characters that a document may have of these
AROUND = 600  # characters shown before and behind a passage, fewer where documents are many
# Documents are read for so long and up to so many bytes; the page says which it lacks.
READ_SECONDS, READ_BYTES = 120.0, 2 << 30

Span = tuple[int, int]


@dataclass(frozen=True)
class Wanted:
    """A document of which a page is to show something. stamp, hash: of its row, to tell if it has changed since.

    spans: offsets of the passages that support outputs, [start, end) in characters.
    """

    document_id: str
    stamp: str | None
    hash: str | None
    spans: Sequence[Span]


@dataclass(frozen=True)
class Found:
    """What there is to show of a document, or why nothing; a note beside it. changed: passages no longer fit it."""

    excerpt: Excerpt | None
    note: str = ""
    changed: bool = False


def read_documents(
    run: Run, wanted: Sequence[Wanted], *, how: str, inputs: Sequence[str] = (),
    clock: Callable[[], float] = time.monotonic,
) -> list[Found]:  # fmt: skip
    """What a page shows of each document, the first ones first, as long as time and bytes last.

    how: "none"; "passages", with all of a document where there is room for it; "full": all of each, however long that
    takes. inputs: where the documents are now; empty: where the job found them.
    """
    if how == "none":
        return [Found(None)] * len(wanted)
    try:
        catalogue, reader = _listed(run, inputs)
    except JobError as error:
        return [Found(None, f"The documents cannot be shown: {error}")] * len(wanted)
    places = {name: place for place, name in enumerate(catalogue.ids.to_pylist())}
    share = min(MOST, max(FEWEST, PAGE_CHARACTERS // max(1, len(wanted))))
    bounded, until, left = how == "passages", clock() + READ_SECONDS, READ_BYTES
    found = []
    for item in wanted:
        place = places.get(item.document_id)
        if place is None:
            found.append(Found(None, "The document is no longer where the job found it."))
            continue
        document = catalogue.document(place)
        left -= document.size_bytes
        if bounded and (left < 0 or clock() > until):
            told = "The page was made without this document, to be done in time: --documents full reads all of them."
            found.append(Found(None, told))
            continue
        found.append(_read(reader, document, item, share if bounded else None))
    return found


def _listed(run: Run, inputs: Sequence[str]) -> tuple[Catalogue, DocumentReader]:
    """The job's documents as they are now. Raises JobError."""
    config: Mapping[str, Any] = (run.manifest or {}).get("config") or {}
    inputs = tuple(inputs or config.get("input") or ())
    if not inputs:
        raise JobError("nothing says where they are; give --input")
    known = {item.name for item in fields(ReadSettings)}
    reading = ReadSettings(**{name: value for name, value in config.items() if name in known})
    text_column, id_column = config.get("text_column") or "text", config.get("id_column")
    try:
        columns = _prompt_columns(run.manifest or {})
        shard = JobConfig(input=("-",), output="-", model="-", shard=config.get("shard")).shard_pair()
        catalogue = list_documents(
            find_files(inputs)[0], text_column=text_column, id_column=id_column,
            keep_columns=tuple(config.get("keep_columns") or ()), shard=shard,
            settings=reading, prompt_columns=columns,
        )  # fmt: skip
    except JobError as error:
        raise JobError(f"{error}; if they are elsewhere now, give --input") from None
    return catalogue, DocumentReader(text_column, catalogue.kept, reading, tuple(columns))


def _prompt_columns(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Columns in the job's prompts, on which a document's hash depends, with the flags that asked for them."""
    template = (manifest.get("prompt") or {}).get("template") or ""
    own = (manifest.get("config") or {}).get("questions_column")
    return dict.fromkeys(template_columns(template), "--prompt-file") | ({own: "--questions-column"} if own else {})


def _read(reader: DocumentReader, document: Document, item: Wanted, share: int | None) -> Found:
    if document.error:
        return Found(None, f"The document cannot be read: {document.error}")
    try:
        text, kept = reader.read(document)
    except DocumentError as error:
        return Found(None, f"The document cannot be read: {error}")
    wide = wide_characters(text)
    unchanged = item.stamp == document.stamp or item.hash is None or item.hash == input_hash(text, kept)
    if not unchanged:
        start = _piece(text, 0, min(len(text), share or len(text)))
        note = "The document has changed since this was written: what is shown is the new text, without evidence."
        return Found(Excerpt([start], len(text), wide), note, changed=True)
    if share is None or len(text) <= share:
        return Found(Excerpt([(0, text)], len(text), wide))
    return Found(Excerpt(passages(text, item.spans, share), len(text), wide))


def passages(text: str, spans: Iterable[Span], share: int) -> list[tuple[int, str]]:
    """(offset, text) of the passages that `spans` name, with what is around them, together about `share` characters.

    Without spans the beginning of the text. Borders are moved to the next blank, so that no word is cut. Passages that
    touch become one; a span that is longer than the share is cut, and the last ones give way.
    """
    inside = sorted({(max(0, start), min(len(text), end)) for start, end in spans if start < len(text) and end > start})
    if not inside:
        return [_piece(text, 0, share)]
    around = max(120, min(AROUND, (share // len(inside) - 200) // 2))
    joined: list[list[int]] = []
    for start, end in inside:
        start, end = max(0, start - around), min(len(text), min(end, start + share) + around)
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    found: list[tuple[int, str]] = []
    left = 4 * share  # a bound for texts full of evidence, not a measure
    for start, end in joined:
        piece = _piece(text, start, min(end, start + left))
        left -= len(piece[1])
        found.append(piece)
        if left <= 0:
            break
    return found


def _piece(text: str, start: int, end: int) -> tuple[int, str]:
    """text[start:end] without the halves of words at its ends, but never less than the middle of it."""
    first = text.find(" ", start, start + 40) + 1 if start else 0
    last = text.rfind(" ", max(start, end - 40), end) if end < len(text) else end
    start, end = first or start, last if last > start else end
    return start, text[start:end]
