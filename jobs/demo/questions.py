"""Questions to one document of the demo, with the passages that support the answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pipeline import summarize
from pipeline.settings.config import read_job_file

# Facts of report-02.txt.
QUESTIONS = (
    "What was the Corwen courthouse rainfall total?",
    "What was the Harrow silo cargo weight?",
    "What was the Fenwick courthouse audit duration?",
)
AROUND = 60  # characters of the document that are shown on either side of a passage


def ask(document: Path, settings: Path) -> None:
    """Ask QUESTIONS of a document, read once for all of them, and print what came back."""
    values = read_job_file(str(settings)) | {"question": list(QUESTIONS)}
    values["model"] = str(settings.parents[1] / values["model"])
    text = document.read_text(encoding="utf-8")
    print(f"\nQuestions to {document.name}, which is read once for all of them (pipeline.summarize, in this process):")
    started = time.monotonic()
    taken = {name: value for name, value in values.items() if name != "input"}
    rows = summarize({document.name: text}, **taken).to_pylist()
    for row in rows:
        print(f"\n{row['question']}\n    {row['output']}\n    {evidence_in_words(row, text)}")
    print(f"\n{len(rows)} answers in {time.monotonic() - started:.0f} s, with the start of the model.")


def evidence_in_words(row: dict[str, Any], text: str) -> str:
    """The first passage that supports a row's output, in [brackets] with what stands around it."""
    if not row["evidence"]:
        return "no passage of the document supports this answer: read it with doubt"
    first = row["evidence"][0]
    start, end = first["start"], first["end"]
    before, after = text[max(0, start - AROUND) : start], text[end : end + AROUND]
    return f"characters {start:,} to {end:,}: " + " ".join(f"...{before}[{text[start:end]}]{after}...".split())
