"""The rows of a run as a list of outputs: what failed and what needs a look on top, each beside its document."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.page.numbers import figure, seconds
from jobs.page.outputs import Entry, Evidence, Excerpt, Label, Outputs, Pane, Question
from jobs.report.documents import Wanted, read_documents
from jobs.report.results import Run
from pipeline.results.rows import STATUSES

LOOK, FAILED, FINE = range(3)
GROUPS = (
    Label("look", "need a look", "cut off, repetitive or otherwise marked", "warn"),
    Label("failed", "failed", "there is no output, or none that fits its schema", "bad"),
    Label("fine", "look fine", "nothing speaks against them, which does not say that they are right", "good"),
)
_STATUS_WORDS = {"oom": "out of memory", "timeout": "timed out", "too_long": "too long", "worker_died": "worker died"}
STATUS_LABELS = {
    name: Label(name, _STATUS_WORDS.get(name, name), about, "" if name == "ok" else "bad")
    for name, about in STATUSES.items()
}
# Column `flags`. Of what is not here the name is shown.
FLAGS = {
    "cut": Label("cut", "cut off", "the output was cut off at its greatest length (--max-new-tokens)", "warn"),
    "repetitive": Label("repetitive", "repetitive", "the output repeats itself", "warn"),
    "empty": Label("empty", "empty", "the output is empty", "warn"),
    "refused": Label("refused", "refused", "the model declined to answer", "warn"),
    "other_language": Label(
        "other_language", "other language", "the output is in another language than the document", "warn"
    ),
    "copied": Label("copied", "copied", "the output copies the document word for word", ""),
    "no_passage": Label("no_passage", "no passage", "no passage of the document was found that is worded like it", ""),
}
# They say something about an output, but nothing against it: extracts are copies, and conclusions have no passage.
HARMLESS = ("copied", "no_passage")
_ORDERING = ["document_id", "question_id", "status", "finish_reason", "flags"]


@dataclass(frozen=True)
class Result:
    """A row as a reader needs it. Columns that an older run lacks are empty."""

    document_id: str
    question: str
    question_text: str
    status: str
    error: str
    output: str
    flags: tuple[str, ...]
    values: Mapping[str, Any]

    @property
    def group(self) -> int:
        """LOOK, FAILED or FINE."""
        if self.status != "ok":
            return FAILED
        return LOOK if any(flag not in HARMLESS for flag in self.flags) else FINE


def read_rows(run: Run, most: int | None = None) -> list[Result]:
    """The rows with their outputs, those that need a look on top, by id within a group; the first `most` of them."""
    table = run.with_texts
    # Of a million rows Python gets what decides about the order, and all columns of those alone that are shown.
    found = [_result(values) for values in table.select(_ORDERING).to_pylist()]
    order = sorted(range(len(found)), key=lambda at: (found[at].group, found[at].document_id, found[at].question))
    return [_result(values) for values in table.take(pa.array(order[:most], pa.int64())).to_pylist()]


def _result(values: dict[str, Any]) -> Result:
    flags = [str(flag) for flag in _listed(values.get("flags"))]
    if values.get("finish_reason") == "length" and values.get("status") == "ok" and "cut" not in flags:
        flags.insert(0, "cut")
    if values.get("evidence") == [] and (values.get("output") or "").strip():
        flags.append("no_passage")
    return Result(
        document_id=values.get("document_id") or "", question=str(values.get("question_id") or ""),
        question_text=str(values.get("question") or ""), status=values.get("status") or "",
        error=values.get("error") or "", output=values.get("output") or "", flags=tuple(dict.fromkeys(flags)),
        values=values,
    )  # fmt: skip


@dataclass(frozen=True)
class OnPage:
    """What a page has of a document: the place of its excerpt (-1: none) and a note.

    hash: of the text that was read. changed: it is another text now.
    """

    place: int
    note: str
    hash: str | None
    changed: bool

    def evidence(self, row: Result) -> list[Evidence] | None:
        """A row's evidence, unless it is of another text than the page shows."""
        return evidence_of(row.values) if self.shows(row) else None

    def shows(self, row: Result) -> bool:
        """Whether the row was made from the text that the page shows."""
        return not self.changed and row.values.get("input_hash") == self.hash


def outputs(run: Run, *, documents: str, inputs: Sequence[str], most: int) -> Outputs:
    """The list of a run. documents, inputs: see read_documents(). most: entries; what needs a look comes first."""
    rows, total = read_rows(run, most), len(run.with_texts)
    note = ""
    if total > most:
        note = f"The first {most:,} of {total:,} outputs, what needs a look before the others; --rows N shows more."
    excerpts: list[Excerpt] = []
    shown = documents_of(run, rows, excerpts, how=documents, inputs=inputs)
    statuses = labels_of((row.status for row in rows), STATUS_LABELS)
    flags = labels_of((flag for row in rows for flag in row.flags), FLAGS)
    questions = questions_of(rows)
    entries = [
        Entry(
            name=row.document_id, group=row.group, status=index_of(statuses, row.status),
            flags=[index_of(flags, flag) for flag in row.flags],
            question=next((at for at, each in enumerate(questions) if each.name == row.question), -1),
            tokens=int(row.values.get("prompt_tokens") or 0), seconds=_number(row.values.get("total_seconds")),
            panes=[Pane("Output", [(row.output, "")], evidence=shown[row.document_id].evidence(row))],
            error=_why(row), reasoning=row.values.get("reasoning") or "",
            answer=answer_fields(row.values.get("answer")), document=shown[row.document_id].place,
            document_note=shown[row.document_id].note, page_starts=page_starts_of(row), facts=facts_of(row),
        )
        for row in rows
    ]  # fmt: skip
    return Outputs(GROUPS, statuses, flags, questions, entries, excerpts, note=note)


def documents_of(
    run: Run, rows: Sequence[Result], excerpts: list[Excerpt], *, how: str, inputs: Sequence[str]
) -> dict[str, OnPage]:
    """What a page shows of each document of `rows`, by id, with the passages of all of them. Adds to `excerpts`.

    Of rows that were made from different texts, the first one's counts. how, inputs: see read_documents().
    """
    groups: dict[str, list[Result]] = {}
    for row in rows:
        groups.setdefault(row.document_id, []).append(row)
    asked = []
    for name, group in groups.items():
        made_from = group[0].values.get("input_hash")
        fitting = [row for row in group if row.values.get("input_hash") == made_from]
        spans = [(one.start, one.end) for row in fitting for one in evidence_of(row.values) or ()]
        asked.append(Wanted(name, group[0].values.get("input_stamp"), made_from, spans))
    shown = {}
    for item, found in zip(asked, read_documents(run, asked, how=how, inputs=inputs), strict=True):
        of_input = groups[item.document_id][0].values.get("input_note") or ""
        note = " ".join(part for part in (found.note, of_input) if part)
        place = -1 if found.excerpt is None else len(excerpts)
        shown[item.document_id] = OnPage(place, note, item.hash, found.changed)
        if found.excerpt is not None:
            excerpts.append(found.excerpt)
    return shown


def page_starts_of(row: Result) -> list[int]:
    """Offsets of the document's pages, if it has any."""
    return [int(start) for start in _listed(row.values.get("page_starts"))]


def labels_of(names: Any, known: Mapping[str, Label]) -> list[Label]:
    """The labels of the names that occur, in the order of `known`; of others the names."""
    found = dict.fromkeys(names)
    return [
        *(label for name, label in known.items() if name in found),
        *(Label(name, name.replace("_", " "), "", "warn") for name in sorted(found) if name not in known),
    ]


def index_of(labels: Sequence[Label], name: str) -> int:
    """The place of a label."""
    return next(at for at, label in enumerate(labels) if label.name == name)


def questions_of(rows: Sequence[Result]) -> list[Question]:
    """The questions in the order of their ids, each with one of its wordings."""
    found = {row.question: row.question_text for row in rows if row.question or row.question_text}
    return [Question(name, text) for name, text in sorted(found.items())]


def _why(row: Result) -> str:
    return "" if row.status == "ok" else row.error or STATUSES.get(row.status, row.status)


def evidence_of(values: Mapping[str, Any]) -> list[Evidence] | None:
    """Evidence as a row has it; None if nobody looked for any. What is no span at all is left out."""
    if values.get("evidence") is None:
        return None
    found = []
    for one in _listed(values["evidence"]):
        try:
            written = int(one["output_start"]), int(one["output_end"])
            read = int(one["start"]), int(one["end"])
        except (KeyError, TypeError, ValueError):
            continue
        if 0 <= written[0] < written[1] and 0 <= read[0] < read[1]:
            found.append(Evidence(*written, *read, _number(one.get("score"))))
    return sorted(found, key=lambda one: (one.output_start, one.start))


def answer_fields(answer: Any) -> list[tuple[str, str]]:
    """A typed answer field by field; of a text that is JSON its fields. Empty without one."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError:
            return [("answer", answer)] if answer else []
    if answer is None:
        return []
    if not isinstance(answer, dict):
        return [("answer", _plain(answer))]
    return [(str(name), _plain(value)) for name, value in answer.items()]


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return "\n".join(map(str, value)) or "-"
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def facts_of(row: Result) -> list[tuple[str, str]]:
    """What was measured of a row, in words."""
    values = row.values
    attention = values.get("attention")
    told = [
        ("source", values.get("source")),
        ("prompt", _counted(values.get("prompt_tokens"), "tokens")),
        ("output", _counted(values.get("output_tokens"), "tokens")),
        ("in the worker", seconds(_number(values.get("total_seconds")))),
        ("first token after", seconds(_number(values.get("time_to_first_token")))),
        ("attention", f"{attention}, density {figure(_number(values.get('density')))}" if attention else ""),
        ("left out of the document", _counted(values.get("truncated_tokens"), "tokens")),
        ("read in", _counted(values.get("parts"), "parts") if (values.get("parts") or 1) > 1 else ""),
        ("attempts", str(values["attempts"]) if (values.get("attempts") or 1) > 1 else ""),
    ]
    return [(what, text) for what, text in told if text and text != "-"]


def _counted(value: Any, what: str) -> str:
    return f"{int(value):,} {what}" if value else ""


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
