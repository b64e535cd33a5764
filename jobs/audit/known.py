"""Facts woven into real text: what each arm still finds of what dense attention finds of them.

Outputs that are like dense's need not hold what stands in the middle of a document, and a summary that lacks it looks
as good. So values are stated and stated again in the text of the user's documents: whether the
arm expects each value where it comes again is read along, and what stands once is asked for at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.audit.options import Arm, Options
from jobs.audit.sample import Sampled
from jobs.known.estimates import paired
from jobs.known.prompts import MOST_ANSWER_TOKENS, Reading, Tokenizer, make_document, read_prompts
from jobs.known.reader import Arm as KnownArm
from jobs.known.reader import Reader
from jobs.known.report import REPORT
from jobs.known.results import Row, question_key, reading_rows
from jobs.known.wording import pick_style
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
    length = min(len(documents[0].prompt), options.context - MOST_ANSWER_TOKENS)
    text = options.essay or "\n\n".join(document.text for document in documents)
    try:
        tokenizer = Tokenizer(options.tokenizer, options.job.revision)
        style = pick_style("auto", tokenizer.vocabulary)
        made = [
            make_document(REPORT, length, index, style, tokenizer, QUESTIONS, options.seed, text).only([*TASKS])
            for index in range(options.known)
        ]
    except JobError as error:
        return Known(why_none=one_line(error))
    return Known([read_prompts(document, style, tokenizer) for document in made], tokenizer)


def read_known(known: Known, runner: ModelRunner, arm: Arm) -> list[Row]:
    """The rows of all that is known, under one arm."""
    if not known.readings or known.tokenizer is None:
        return []
    longest = max(len(prompt.ids) for reading in known.readings for prompt in reading.prompts) + MOST_ANSWER_TOKENS
    reader = Reader(arm.config, longest, runner)
    reader.allocate(1.0)
    reader.use(KnownArm(arm.name, arm.config.attention))
    decode = known.tokenizer.decode
    return [row for reading in known.readings for row in reading_rows(reader, reading, {}, decode)]


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
