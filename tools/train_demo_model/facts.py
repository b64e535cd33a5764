"""The facts of one training document, and the questions about them, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from jobs.known.grammar import ADJECTIVES, NOTES, NOUNS, PLACES, SAYS, number
from tools.train_demo_model.language import BEASTS, COLOURS, MARKS, UNITS, invented, name, sentence, worded

ASK_SUMMARY = [
    "List the key findings in order.",
    "List the key findings in order.",
    "List the key findings in order.",
    "Summarise the key findings.",
    "What are the key findings of this report?",
]
REPEATED = ["As noted above, the {}", "To repeat, the {}", "It was said earlier that the {}"]
LOTS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True)
class Ask:
    """A question and its answer. kind: as it is counted in the training log."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Needle:
    """A sentence of the document. asks: questions that it answers.

    family, order: needles of one family keep their order in the document. target: characters [first, last) that the
    model must predict, of a value said for the second time.
    """

    text: str
    asks: tuple[Ask, ...] = ()
    family: str = ""
    order: int = 0
    target: tuple[int, int] | None = None


@dataclass(frozen=True)
class Counts:
    """How many facts of each kind a document holds."""

    findings: int = 4
    notes: int = 4
    magic: int = 3
    codes: int = 2
    chains: int = 2
    repeats: int = 1


@dataclass
class Facts:
    """All facts of a document."""

    needles: list[Needle] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def summary(self, rng: Random) -> Ask:
        """The question for all findings."""
        listed = "\n".join(f"{place}. {said}" for place, said in enumerate(self.findings, start=1))
        return Ask(rng.choice(ASK_SUMMARY), listed or "No key findings.", "summary")

    def placed(self, rng: Random) -> list[Needle]:
        """The needles in random order, those of a family in theirs."""
        order = list(range(len(self.needles)))
        rng.shuffle(order)
        for family in sorted({needle.family for needle in self.needles if needle.family}):
            slots = [slot for slot, index in enumerate(order) if self.needles[index].family == family]
            members = sorted((order[slot] for slot in slots), key=lambda index: self.needles[index].order)
            for slot, index in zip(slots, members, strict=True):
                order[slot] = index
        return [self.needles[index] for index in order]


def make_facts(rng: Random, counts: Counts) -> Facts:
    """Facts whose keys are easily confused: parts of them are used again."""
    facts = Facts()
    _measures(facts, rng, counts)
    _magic_numbers(facts, rng, counts.magic)
    for _ in range(counts.codes):
        owner = f"{name(rng)} {rng.choice(PLACES)}"
        code = f"{rng.choice(COLOURS)} {rng.choice(BEASTS)}"
        ask = Ask(f"What is the code name of the {owner} project?", code, "code")
        facts.needles.append(Needle(f'The {owner} project carries the code name "{code}".', (ask,)))
    _chains(facts, rng, counts.chains)
    return facts


def _measures(facts: Facts, rng: Random, counts: Counts) -> None:
    """Findings, values said twice, and side notes."""
    used: list[tuple[str, str, str]] = []
    numbered, mark = rng.random() < 0.3, rng.choice(MARKS)
    for index in range(counts.findings + counts.repeats + counts.notes):
        owner, place, quantity = key = _new_key(rng, used)
        used.append(key)
        about, value = f"{owner} {place} {quantity}", f"{number(rng)} {UNITS[quantity]}"
        said = f"The {about} {rng.choice(SAYS)} {value}."
        asked = f"What was the {about}?"
        if index < counts.findings:
            asks: tuple[Ask, ...] = (Ask(asked, value, "finding"),)
            if rng.random() < 0.4:  # only the summary asks for a finding that is no measure
                said, asks = rng.choice((worded, worded, sentence, invented))(rng), ()
            label = f"{mark} {index + 1}" if numbered else mark
            facts.findings.append(said)
            facts.needles.append(Needle(f"{label}: {said}", asks, "findings", index))
        elif index < counts.findings + counts.repeats:
            again = rng.choice(REPEATED).format(f"{about} {rng.choice(SAYS)} ")
            figure = value.split()[0]
            target = (len(again), len(again) + len(figure))
            facts.needles.append(Needle(rng.choice(NOTES).format(said), (), about, 0))
            facts.needles.append(Needle(f"{again}{value}.", (), about, 1, target))
        else:
            facts.needles.append(Needle(rng.choice(NOTES).format(said), (Ask(asked, value, "note"),)))


def _new_key(rng: Random, used: Sequence[tuple[str, str, str]]) -> tuple[str, str, str]:
    while True:
        fresh = (name(rng), rng.choice(PLACES), rng.choice(list(UNITS)))
        parts = [rng.choice(used)[part] if used and rng.random() < 0.4 else fresh[part] for part in range(3)]
        if (parts[0], parts[1], parts[2]) not in used:
            return parts[0], parts[1], parts[2]


def _magic_numbers(facts: Facts, rng: Random, count: int) -> None:
    """RULER's needles: keys of one to four values, often alike, and a question for several keys at once."""
    said: dict[str, str] = {}
    taken: set[str] = set()
    for _ in range(count):
        first, second = rng.choice(ADJECTIVES), rng.choice(NOUNS)
        if taken and rng.random() < 0.4:
            first = rng.choice(sorted(taken)).split("-")[0]
        key = f"{first}-{second}"
        if key in taken:
            continue
        taken.add(key)
        values = [str(rng.randrange(10**6, 10**7)) for _ in range(rng.choice((1, 1, 1, 1, 2, 3, 4)))]
        ask = ask_magic([key], values)
        if len(values) == 1:
            said[key] = values[0]
        for order, value in enumerate(values):
            text = f"One of the special magic numbers for {key} is: {value}."
            facts.needles.append(Needle(text, (ask,) if order == 0 else (), key, order))
    if len(said) > 1 and facts.needles:
        keys = rng.sample(sorted(said), rng.randint(2, min(4, len(said))))
        last = facts.needles[-1]
        several = ask_magic(keys, [said[key] for key in keys])
        facts.needles[-1] = Needle(last.text, (*last.asks, several), last.family, last.order)


def ask_magic(keys: Sequence[str], values: Sequence[str]) -> Ask:
    """As jobs.evaluate asks."""
    if len(values) == 1:
        return Ask(
            f"What is the special magic number for {keys[0]} mentioned in the provided text?", values[0], "magic"
        )
    listed = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    question = f"What are all the special magic numbers for {listed} mentioned in the provided text?"
    return Ask(question, ", ".join(values), "multivalue" if len(keys) == 1 else "multiquery")


def _chains(facts: Facts, rng: Random, count: int) -> None:
    """Lots of equal value. An answer names the lots on the way: each is one look back, the value alone is several."""
    taken: set[str] = set()
    for _ in range(count):
        lots: list[str] = []
        value, steps = number(rng), rng.choice((1, 2, 2, 3, 3, 4))
        while len(lots) < steps:
            lot = f"{rng.choice(LOTS)}{rng.randrange(10, 100)}"
            if lot not in taken:
                taken.add(lot)
                lots.append(lot)
        asked = steps - 1 if rng.random() < 0.5 else rng.randrange(steps)
        way = [f"lot {lot}, " for lot in reversed(lots[:asked])]
        ask = Ask(f"What is the value of lot {lots[asked]}?", f"{''.join(way)}{value} dollars", f"hop{asked + 1}")
        for step, lot in enumerate(lots):
            text = f"Lot {lot} was valued at {value} dollars."
            if step:
                text = f"Lot {lot} has the same value as lot {lots[step - 1]}."
            facts.needles.append(Needle(text, (ask,) if step == asked else ()))
