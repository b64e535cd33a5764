"""Two runs of the same documents: what got better or worse, and both outputs beside their document."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import Indel

from jobs.page.outputs import Entry, Excerpt, Label, Outputs, Pane
from jobs.report.outputs import (
    FLAGS,
    HARMLESS,
    STATUS_LABELS,
    OnPage,
    Result,
    documents_of,
    facts_of,
    index_of,
    labels_of,
    page_starts_of,
    questions_of,
    read_rows,
)  # fmt: skip
from jobs.report.results import Run

WORSE, BETTER, DIFFERENT, ALONE, SAME = range(5)
GROUPS = (
    Label("worse", "got worse", "failed, or marked more, in the second run than in the first", "bad"),
    Label("better", "got better", "failed, or marked more, in the first run than in the second", "good"),
    Label("different", "read differently", "the outputs differ, neither is marked more than the other", "warn"),
    Label("alone", "in one run only", "", ""),
    Label("same", "are the same", "word for word", ""),
)
SHOWN = ("output", "in the worker", "first token after")
OTHER_TEXT = "The first run read another text of it, or other columns: the passages are those of the second run."
Pair = tuple[Result | None, Result | None]
# Longer outputs are shown without marks: comparing them would take minutes.
MOST_WORDS = 20_000


def changes(one: Run, two: Run, *, documents: str, inputs: Sequence[str], most: int) -> Outputs:
    """The list of the pairs of rows of two runs: what got worse first, then what differs most.

    documents, inputs: see read_documents(). most: pairs.
    """
    first, second = _by_key(read_rows(one), read_rows(two))
    pairs = [(first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second])]
    judged = sorted(((_group(*pair), _likeness(*pair), pair) for pair in pairs), key=lambda item: item[:2])
    note = f"The list has the outputs and marks of {two.name}, and those of {one.name} where that run alone has a row."
    if len(judged) > most:
        note += f" It shows the first {most:,} of {len(judged):,} pairs; --rows N shows more."
    judged = judged[:most]
    everything = [row for _, _, pair in judged for row in pair if row is not None]
    rows = [_later(*pair) for *_, pair in judged]
    statuses = labels_of((row.status for row in rows), STATUS_LABELS)
    flags = labels_of((flag for row in rows for flag in row.flags), FLAGS)
    questions = questions_of(everything)
    names = [each.name for each in questions]
    excerpts: list[Excerpt] = []
    shown = _documents(one, two, [pair for *_, pair in judged], excerpts, documents, inputs)
    entries = [
        Entry(
            name=row.document_id, group=group, status=index_of(statuses, row.status),
            flags=[index_of(flags, flag) for flag in row.flags],
            question=names.index(row.question) if row.question in names else -1,
            tokens=int(row.values.get("prompt_tokens") or 0), seconds=row.values.get("total_seconds"),
            panes=[
                Pane(
                    run.name, parts, _told(side, asked_alike=_asked_alike(*pair)),
                    evidence=shown[row.document_id].evidence(side) if side else None,
                )
                for run, parts, side in zip((one, two), _marked(*pair), pair, strict=True)
            ],
            document=shown[row.document_id].place, document_note=_document_note(shown[row.document_id], *pair),
            page_starts=page_starts_of(row), preview=row.error or row.output,
            facts=[("words in common", f"{likeness:.0%}")] if all(pair) else (),
        )
        for row, (group, likeness, pair) in zip(rows, judged, strict=True)
    ]  # fmt: skip
    return Outputs(GROUPS, statuses, flags, questions, entries, excerpts, order="Worst first", note=note)


def _documents(
    one: Run, two: Run, pairs: Sequence[Pair], excerpts: list[Excerpt], how: str, inputs: Sequence[str]
) -> dict[str, OnPage]:
    """What the page shows of each document: as the second run read it, or the first where that run alone did."""
    second = [row for _, row in pairs if row is not None]
    names = {row.document_id for row in second}
    first = [row for row, _ in pairs if row is not None]
    both = [*second, *(row for row in first if row.document_id in names)]
    alone = [row for row in first if row.document_id not in names]
    return {
        name: found
        for run, rows in ((two, both), (one, alone))
        if rows
        for name, found in documents_of(run, rows, excerpts, how=how, inputs=inputs).items()
    }


def _document_note(shown: OnPage, one: Result | None, two: Result | None) -> str:
    if one is None or two is None or shown.changed or (shown.shows(one) and shown.shows(two)):
        return shown.note
    return f"{shown.note} {OTHER_TEXT}".strip()


def _by_key(*runs: Sequence[Result]) -> list[dict[tuple[str, str], Result]]:
    """The rows of each run by document and question; of runs that asked one question each, by document alone.

    Two wordings of a question have different names, and are what such runs are compared for.
    """
    single = all(len({row.question for row in rows}) == 1 for rows in runs)
    return [{(row.document_id, "" if single else row.question): row for row in rows} for rows in runs]


def _asked_alike(one: Result | None, two: Result | None) -> bool:
    return one is None or two is None or one.question_text == two.question_text


def _later(one: Result | None, two: Result | None) -> Result:
    row = two or one
    assert row is not None
    return row


def _group(one: Result | None, two: Result | None) -> int:
    if one is None or two is None:
        return ALONE
    if _badness(one) != _badness(two):
        return WORSE if _badness(two) > _badness(one) else BETTER
    return SAME if (one.status, one.output) == (two.status, two.output) else DIFFERENT


def _badness(row: Result) -> tuple[bool, int]:
    return row.status != "ok", sum(flag not in HARMLESS for flag in row.flags)


def _likeness(one: Result | None, two: Result | None) -> float:
    """Share of the words of both outputs that they have in common, in order: 0 to 1."""
    if one is None or two is None:
        return 0.0
    if one.output == two.output:
        return 1.0
    words = one.output.split(), two.output.split()
    return Indel.normalized_similarity(*words) if max(map(len, words)) <= MOST_WORDS else 0.0


def _marked(first: Result | None, second: Result | None) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Both outputs in parts, ("only" for what the other one lacks)."""
    one, two = (row.output if row else "" for row in (first, second))
    words = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in (one, two)]
    if one == two or not one or not two or max(map(len, words)) > MOST_WORDS:
        return [(one, "")], [(two, "")]
    left: list[tuple[str, str]] = []
    right: list[tuple[str, str]] = []
    for edit in Indel.opcodes(*words):
        kind = "" if edit.tag == "equal" else "only"
        for parts, text in (
            (left, words[0][edit.src_start : edit.src_end]),
            (right, words[1][edit.dest_start : edit.dest_end]),
        ):
            if text:
                parts.append(("".join(text), kind))
    return left, right


def _told(row: Result | None, asked_alike: bool) -> str:
    if row is None:
        return "This run has no such row."
    status = STATUS_LABELS[row.status].label if row.status in STATUS_LABELS else row.status
    flags = [FLAGS[flag].about if flag in FLAGS else flag for flag in row.flags]
    told = ", ".join([status, *flags, *([row.error] if row.error else [])])
    asked = [] if asked_alike else [f'asked: "{row.question_text}"']
    return "; ".join([*asked, told, *(f"{what} {text}" for what, text in facts_of(row) if what in SHOWN)])
