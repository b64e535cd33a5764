"""How good the passages of `evidence` are, on documents whose facts have known places: python -m tools.evidence

Facts are woven into fillers, and an output says them again: word for word, reworded by rules, two in a sentence. It
also says what the document does not: other facts, and its own with other numbers. With --essay FILE the filler is that
text, and shortened sentences of it are looked up too; without, filler and facts are of one grammar, which is harder.
"""

from __future__ import annotations

import re
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from random import Random

from jobs.cli import Parser, run_main
from jobs.demo.scoring import read_findings
from jobs.evaluate.haystacks import Keys, magic
from jobs.known.documents import Fact, Span, depths, weave
from jobs.known.grammar import NOTES, SAYS, Measure, fact, new_measure, number
from jobs.known.report import essay_filler
from jobs.known.wording import RULER
from pipeline.imports import ROOT
from pipeline.review.evidence import THRESHOLD, find_evidence

THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8)
KINDS = ("copied", "reworded", "two in a sentence", "shortened prose")
UNSUPPORTED = ("other number", "not in the document")
# Characters of a document of 128K tokens; facts of each kind in it.
LENGTH, FACTS = 600_000, 20
# What pipeline.review.evidence does was chosen on documents of seeds below.
FIRST_SEED = 200
SYNONYMS = {
    "was": "amounted to", "reached": "was", "came to": "was", "stood at": "came to", "dollars": "USD",
    "litres": "l", "people": "persons", "metres": "m", "hours": "h",
}  # fmt: skip


@dataclass
class Claim:
    """A sentence of an output, and where the document says it; nowhere if it does not."""

    kind: str
    text: str
    places: list[Span] = field(default_factory=list)


@dataclass
class Tally:
    """places: known ones; found: those that a passage points to. passages: given; right: those at a known place.

    claims: sentences; answered: those with a passage.
    """

    places: int = 0
    found: int = 0
    passages: int = 0
    right: int = 0
    claims: int = 0
    answered: int = 0


def main(arguments: Sequence[str]) -> int:
    """Measure and print a table; 0."""
    parser = Parser(prog="python -m tools.evidence", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--essay", type=Path, help="text to weave the facts into; unset: the demo's grammar")
    parser.add_argument("--documents", type=int, default=4, help="documents to make")
    args = parser.parse_args(arguments)
    found, planted = demo_score()
    print(f"demo: {found} of {planted} findings point to their own passage, threshold {THRESHOLD}\n")
    essay = args.essay.read_text(encoding="utf-8") if args.essay else ""
    cases = [make_case(Random(FIRST_SEED + number), essay) for number in range(args.documents)]
    print("| threshold | " + " | ".join(f"{kind}: recall, precision" for kind in KINDS if essay or kind != KINDS[3])
          + " | " + " | ".join(f"{kind}: with a passage" for kind in UNSUPPORTED) + " |")  # fmt: skip
    seconds = []
    for threshold in THRESHOLDS:
        tallies: dict[str, Tally] = defaultdict(Tally)
        for text, claims in cases:
            begun = time.process_time()
            judge(text, claims, threshold, tallies)
            seconds.append(time.process_time() - begun)
        known = [tallies[kind] for kind in KINDS if kind in tallies]
        cells = [f"{each.found / each.places:.3f}, {each.right / max(each.passages, 1):.3f}" for each in known]
        cells += [f"{tallies[kind].answered / tallies[kind].claims:.3f}" for kind in UNSUPPORTED]
        print(f"| {threshold} | " + " | ".join(cells) + " |")
    claims_each = len(cases[0][1])
    print(f"\n{len(cases)} documents of {len(cases[0][0]):,} characters, {claims_each} sentences each")
    short = [claim.text for claim in cases[0][1]][:10]
    begun = time.process_time()
    find_evidence(cases[0][0], " ".join(short))
    told = f"{len(' '.join(short)):,} characters ({len(short)} sentences)"
    print(f"CPU seconds for {told}: {time.process_time() - begun:.3f}; for {claims_each}: {min(seconds):.3f}")
    return 0


def demo_score(threshold: float = THRESHOLD) -> tuple[int, int]:
    """Of the demo's findings, listed as the demo lists them, those whose only passage is their own; and all."""
    found = planted = 0
    for name, findings in read_findings(ROOT / "examples/findings.jsonl").items():
        text = (ROOT / "examples/documents" / name).read_text(encoding="utf-8")
        claims = []
        for finding in findings:
            begin = text.index(f"Key finding: {finding}") + len("Key finding: ")
            claims.append(Claim("demo", finding, [(begin, begin + len(finding))]))
        tallies: dict[str, Tally] = defaultdict(Tally)
        judge(text, claims, threshold, tallies)
        found, planted = found + tallies["demo"].right, planted + len(claims)
    return found, planted


def judge(text: str, claims: Sequence[Claim], threshold: float, tallies: dict[str, Tally]) -> None:
    """Look claims up, as the lines of one output, and count."""
    output = "\n".join(claim.text for claim in claims)
    passages = find_evidence(text, output, threshold=threshold)
    begin = 0
    for claim in claims:
        end = begin + len(claim.text)
        given = [(each["start"], each["end"]) for each in passages if begin <= each["output_start"] < end]
        hits = [any(same_place(one, place) for place in claim.places) for one in given]
        tally = tallies[claim.kind]
        tally.claims, tally.answered = tally.claims + 1, tally.answered + bool(given)
        tally.places, tally.passages = tally.places + len(claim.places), tally.passages + len(given)
        tally.found += sum(any(same_place(one, place) for one in given) for place in claim.places)
        tally.right += sum(hits)
        begin = end + 1


def same_place(one: Span, other: Span) -> bool:
    """Whether two spans share at least half of what they cover together."""
    shared = min(one[1], other[1]) - max(one[0], other[0])
    return 2 * shared >= max(one[1], other[1]) - min(one[0], other[0])


def make_case(rng: Random, essay: str) -> tuple[str, list[Claim]]:
    """A document, and claims about it."""
    used: list[Measure] = []
    keys = Keys(rng)
    told: list[Fact] = []
    plans: list[tuple[str, str, list[int]]] = []

    def tell(said: str) -> int:
        told.append(Fact(rng.choice(NOTES).format(said), 0.0, said))
        return len(told) - 1

    for count in range(FACTS):
        said, again, _ = one_fact(rng, used, keys, count)
        plans.append(("copied", said, [tell(said)]))
        said, again, _ = one_fact(rng, used, keys, count)
        plans.append(("reworded", again, [tell(said)]))
        (first, again, _), (second, _, _) = (one_fact(rng, used, keys, count + place) for place in range(2))
        joined = f"{again.rstrip('.')}, while {second[0].lower()}{second[1:]}"
        plans.append(("two in a sentence", joined, [tell(first), tell(second)]))
        said, _, wrong = one_fact(rng, used, keys, count)
        tell(said)
        plans.append(("other number", wrong, []))
        plans.append(("not in the document", one_fact(rng, used, keys, count)[0], []))
    told = [Fact(each.text, at, each.mark) for each, at in zip(told, depths(rng, len(told)), strict=True)]
    filler = list(islice(essay_filler(rng, essay), LENGTH // 20))
    ends = list(accumulate(map(len, filler)))
    del filler[bisect(ends, LENGTH) :]
    text, spans = weave(filler, told)
    claims = [Claim(kind, said, [spans[place] for place in places]) for kind, said, places in plans]
    if essay:
        long = [each.strip() for each in filler if 80 < len(each) < 250 and "\n" not in each.strip()]
        for said in rng.sample(long, FACTS):
            begin = text.index(said)
            if text.find(said, begin + 1) < 0:
                claims.append(Claim("shortened prose", shortened(said, rng), [(begin, begin + len(said))]))
    rng.shuffle(claims)
    return text, claims


def one_fact(rng: Random, used: list[Measure], keys: Keys, count: int) -> tuple[str, str, str]:
    """A fact, the same in other words, and with another number."""
    if count % 4 == 0:  # a needle of RULER's
        key, value, other = keys.new(), magic(rng), magic(rng)
        said = RULER.needle.format(key=key, value=value)
        return said, f"{value} is given as a magic number for {key}.", RULER.needle.format(key=key, value=other)
    used.append(new_measure(rng, used))
    measure = used[-1]
    said = fact(rng, measure)
    says = next(each for each in SAYS if f" {each} " in said)
    before, value_unit = said.rstrip(".").split(f" {says} ")
    value, unit = value_unit.rsplit(" ", 1)
    plain = value.replace(",", "")
    again = rng.choice(
        (
            f"At the {measure.place} in {measure.name}, the {measure.quantity} {SYNONYMS[says]} {plain} {unit}.",
            f"A total of {value} {SYNONYMS.get(unit, unit)} is stated for the {measure.quantity} of {measure.name} "
            f"{measure.place}.",
            f"{measure.name}'s {measure.place} had a {measure.quantity} of {value} {SYNONYMS.get(unit, unit)}.",
        )
    )
    other = number(rng)
    return said, again, f"{before} {says} {other if other != value else value + '1'} {unit}."


def shortened(said: str, rng: Random) -> str:
    """A sentence without every fourth word or so, its halves exchanged."""
    words = [word for word in re.split(r"\s+", said) if rng.random() > 0.25]
    middle = len(words) // 2
    return " ".join([*words[middle:], *words[:middle]]).rstrip(".,;") + "."


if __name__ == "__main__":
    run_main(main)
