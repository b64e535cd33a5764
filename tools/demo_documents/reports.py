"""Reports with known key findings: invented ones, and real texts with findings planted in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from jobs.known.grammar import NOTES, Measure, fact, new_measure, sentence

FREE_FORM_SHARE = 0.25  # findings that are a plain sentence instead of a measured fact
PARAGRAPH_SENTENCES = (4, 12)
# A sentence end inside a paragraph: the model reads a finding only where it follows another sentence.
SENTENCE_END = re.compile(r"(?<=[a-z]{2}[.]) (?=[A-Z])")


@dataclass(frozen=True)
class Report:
    """A text and the sentences that a list of its key findings must hold, in order."""

    text: str
    findings: tuple[str, ...]


def invent_facts(rng: Random, n_findings: int, n_notes: int) -> tuple[list[str], list[str]]:
    """Findings and side notes about different, easily confused measures."""
    used: list[Measure] = []
    facts = []
    for _ in range(n_findings + n_notes):
        used.append(new_measure(rng, used))
        facts.append(fact(rng, used[-1]))
    findings = [sentence(rng) if rng.random() < FREE_FORM_SHARE else said for said in facts[:n_findings]]
    return findings, facts[n_findings:]


def plant(rng: Random, text: str, findings: list[str], notes: list[str]) -> Report:
    """Put the findings (in order) and the notes at random sentence ends inside the paragraphs of `text`.

    Findings are spread: each third, fourth ... of the text holds one. Raises ValueError if there are too few sentences.
    """
    ends = [match.start() for match in SENTENCE_END.finditer(text)]
    if len(ends) < 4 * (len(findings) + len(notes)):
        raise ValueError(f"{len(ends)} sentence ends are too few for {len(findings) + len(notes)} facts")
    spots = {}
    for index, finding in enumerate(findings):
        share = [len(ends) * part // len(findings) for part in (index, index + 1)]
        spots[rng.choice(ends[share[0] : share[1]])] = f" Key finding: {finding}"
    for note in notes:
        spot = rng.choice([end for end in ends if end not in spots])
        spots[spot] = " " + rng.choice(NOTES).format(note)
    pieces, last = [], 0
    for spot in sorted(spots):
        pieces += [text[last:spot], spots[spot]]
        last = spot
    return Report("".join(pieces) + text[last:], tuple(findings))


def synthetic_report(
    rng: Random, title: str, n_tokens: int, n_findings: int, n_notes: int, count_tokens: Callable[[str], int]
) -> Report:
    """A report of about `n_tokens` (never more, at most a paragraph less) as `count_tokens` counts them."""
    findings, notes = invent_facts(rng, n_findings, n_notes)
    room = n_tokens - count_tokens(title) - count_tokens(" Key finding: ".join(findings + notes)) - 8 * n_notes
    paragraphs: list[str] = []
    while True:
        paragraph = " ".join(sentence(rng) for _ in range(rng.randint(*PARAGRAPH_SENTENCES)))
        room -= count_tokens(paragraph) + 2
        if room < 0:
            break
        paragraphs.append(paragraph)
    return plant(rng, "\n\n".join([title, *paragraphs]) + "\n", findings, notes)
