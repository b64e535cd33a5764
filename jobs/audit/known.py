"""Facts woven into real text: what each arm still finds of what dense attention finds of them.

Outputs that are like dense's need not hold what stands in the middle of a document, and a summary that lacks it looks
as good. So values are stated and stated again in the text of the user's documents, as jobs.evaluate does it: whether
the arm expects each value where it comes again is read along, and what stands once is asked for at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.audit.options import Arm, Options
from jobs.audit.sample import Sampled
from jobs.evaluate.arms import Arm as KnownArm
from jobs.evaluate.estimates import paired
from jobs.evaluate.prompts import BEHIND, Reading, Tokenizer, make_document, read_prompts
from jobs.evaluate.reader import Reader
from jobs.evaluate.results import Row, question_key
from jobs.evaluate.run import read_document
from jobs.evaluate.wording import pick_style
from pipeline.engine.model.runner import ModelRunner
from pipeline.errors import JobError, one_line

QUESTIONS = 4
TASKS = {"lookup": "lookups", "report_facts": "questions"}


@dataclass(frozen=True)
class Known:
    """Documents with known answers; where there are none, why."""

    readings: Sequence[Reading] = ()
    tokenizer: Tokenizer | None = None
    why_none: str = ""


def known_documents(options: Options, documents: Sequence[Sampled]) -> Known:
    """As long as the longest prompt of the sample, of --essay's text or else of the sample's own.

    documents: longest first.
    """
    if options.random_weights:
        return Known(why_none="the weights are random")
    length = min(len(documents[0].prompt), options.context - BEHIND)
    text = options.essay or "\n\n".join(document.text for document in documents)
    try:
        tokenizer = Tokenizer(options.tokenizer, options.job.revision)
        style = pick_style("auto", tokenizer.vocabulary)
        made = [
            make_document("report", length, index, style, tokenizer, QUESTIONS, options.seed, text).only([*TASKS])
            for index in range(options.known)
        ]
    except JobError as error:
        return Known(why_none=one_line(error))
    return Known([read_prompts(document, style, tokenizer) for document in made], tokenizer)


def read_known(known: Known, runner: ModelRunner, arm: Arm) -> list[Row]:
    """The rows of jobs.evaluate for all that is known, under one arm."""
    if not known.readings or known.tokenizer is None:
        return []
    longest = max(len(prompt.ids) for reading in known.readings for prompt in reading.prompts) + BEHIND
    reader = Reader(arm.config, longest, runner)
    reader.allocate(1.0)
    used = [KnownArm(arm.name, arm.config.attention)]
    return [row for reading in known.readings for row in read_document(reading, [reader], used, known.tokenizer)]


def known_figures(rows: Sequence[Row], reference: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By "lookups" and "questions": what dense finds of them, and the arm's difference to it with its interval."""
    found = {}
    dense = {question_key(row): row["recall"] for row in reference}
    for task, name in TASKS.items():
        pairs = [(row["recall"], dense[question_key(row)], row["document"]) for row in rows if row["task"] == task]
        if pairs:
            mine, theirs, documents = zip(*pairs, strict=True)
            found[name] = {"dense": sum(theirs) / len(theirs), **asdict(paired(mine, theirs, documents))}
    return found
