"""What the training documents are written in: the demo's grammar, and other filler around the same facts."""

from __future__ import annotations

from random import Random

from jobs.known.grammar import (
    ADJECTIVES,
    NAMES,
    NOUNS,
    PLACES,
    TIMES,
    UNIT_OF_MEASURE,
    VERBS,
    number,
    words,
)
from jobs.known.grammar import sentence as report_sentence

UNITS = UNIT_OF_MEASURE | {
    "evacuation total": "people",
    "paint order": "litres",
    "ore yield": "tonnes",
    "fence length": "metres",
    "night temperature": "degrees",
    "maintenance time": "hours",
    "land area": "hectares",
    "legal expense": "dollars",
    "solar yield": "kilowatts",
    "timber volume": "logs",
}
COLOURS = words("""
Silver Crimson Golden Amber Violet Indigo Scarlet Emerald Copper Ivory Cobalt Coral Jade Bronze
""")
BEASTS = words("""
Falcon Otter Heron Badger Lynx Raven Tiger Marten Salmon Condor Bison Gecko Walrus Magpie Panther
""")
COMMON = words("""
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than
into them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many off before must well back through years much where your way down should because long
each just state those people too very good make world still see own work men day get here between both under never
same another know while last might us great old year come since against go came right used take three small large
house number part water form
""")
MARKS = ["Key finding"] * 7 + ["Key result", "Main finding", "Important finding"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Findings as people word them. {n} is a figure, {name} and {place} as in the grammar, {noun} and the rest single words.
WORDED = [
    "{name} spent {n} dollars on the {place}, more than in any year before.",
    "Of the {n} people who were asked, most had never seen the {place}.",
    "The {noun} at the {name} {place} rose by {d} percent in one year.",
    "Costs fell from {n} to {m} dollars after the {noun} was {verb}.",
    "Nearly {n} litres of water are lost every day between {name} and the {place}.",
    "It took {small} days to find out why the {adjective} {noun} had failed.",
    "No {noun} was {verb} {time}, and the {place} stayed closed.",
    "The {adjective} {noun} of {name} will not last beyond {year}.",
    "Since {year}, the {place} has lost {n} visitors and half of its {noun}.",
    "{name} and {other} agreed to share the {place} for {small} years.",
    "At {d} degrees the {noun} breaks; nobody had {verb} it before.",
    "Only {small} of {n} entries in the {noun} could be traced.",
    "The {place} earns {n} dollars a month, but its {noun} costs {m}.",
    "A {adjective} {noun} is cheaper than a {adjective} {noun}, says the {noun} of {name}.",
    "Half of the {noun} was {verb} twice; the other half was never {verb}.",
    "What the {noun} needs most is a {adjective} {place}, not another {noun}.",
]
_ONSETS = words("""
b br c ch d dr f g gl h j k kl kr l m n p pl pr r s sh sk st t tr v w y z
""")
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]
_CODAS = ["", "", "n", "r", "l", "s", "th", "nd", "rk", "m", "lt", "x"]


def name(rng: Random) -> str:
    """A known name, or as often an invented one."""
    if rng.random() < 0.5:
        return rng.choice(NAMES)
    parts = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((2, 2, 3))))
    return "".join(parts).capitalize()


def sentence(rng: Random) -> str:
    """A sentence of the grammar, now and then common words without sense."""
    if rng.random() < 1 / 11:
        return " ".join(rng.choice(COMMON) for _ in range(rng.randint(5, 14))).capitalize() + "."
    return report_sentence(rng)


def invented(rng: Random) -> str:
    """A sentence of invented words, names, figures and punctuation: text outside the vocabulary."""

    def word() -> str:
        draw = rng.random()
        if draw < 0.75:
            return name(rng).lower()
        return rng.choice(COMMON) if draw < 0.92 else name(rng) if draw < 0.97 else number(rng)

    marks = ("", "", "", "", "", "", ",", " -", ":", ")", "'s")
    text = " ".join(word() + rng.choice(marks) for _ in range(rng.randint(4, 16)))
    return text[0].upper() + text[1:] + "."


def worded(rng: Random) -> str:
    """A finding as people word it."""
    text = rng.choice(WORDED)
    for field, make in {
        "{name}": lambda: name(rng),
        "{other}": lambda: name(rng),
        "{place}": lambda: rng.choice(PLACES),
        "{noun}": lambda: rng.choice(NOUNS),
        "{adjective}": lambda: rng.choice(ADJECTIVES),
        "{verb}": lambda: rng.choice(VERBS),
        "{time}": lambda: rng.choice(TIMES),
        "{n}": lambda: number(rng),
        "{m}": lambda: number(rng),
        "{d}": lambda: f"{rng.randrange(1, 200)}.{rng.randrange(10)}",
        "{small}": lambda: str(rng.randint(2, 90)),
        "{year}": lambda: str(rng.randint(1950, 2060)),
    }.items():
        while field in text:
            text = text.replace(field, make(), 1)
    return text


def filler(kind: str, rng: Random, sentences: int) -> str:
    """Sentences of a kind of filler, "report", "salad", "invented" or "noise", in paragraphs; begins with a space."""
    if kind == "noise":
        return f" {NOISE}" * (sentences // 5)
    words = ADJECTIVES + NOUNS + VERBS + COMMON + PLACES
    pieces = []
    for _ in range(sentences):
        if kind == "report":
            said = sentence(rng)
        elif kind == "invented":
            said = invented(rng)
        else:
            said = " ".join(rng.choice(words) for _ in range(rng.randint(4, 18))).capitalize() + "."
        pieces.append(("\n\n" if rng.random() < 0.12 else " ") + said)
    return "".join(pieces)
