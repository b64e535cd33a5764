"""The language of synthetic reports, of tests of recall and of the demo: filler sentences, facts, names and numbers.

It is the language that models/tiny-reader was trained on. Every function draws from the `random.Random` it is given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random


def words(text: str) -> list[str]:
    """The words of a list kept as text."""
    return text.split()


NAMES = words("""
Marwick Calder Ostrava Linden Harrow Selby Brixton Tamar Orwell Kestrel Aldine Fenwick Garrow Hollis Ivers Jarrow Kelso
Lorne Morven Nairn Ogden Penrith Quarry Rydal Stroud Thirsk Ullswater Verdon Whitby Yarrow Zennor Ashford Belmont Corwen
Dunbar Elgin Falmouth Glossop Hexham Ilford Keswick Ludlow Malvern Newlyn Oakham Poole Ripon
""")
PLACES = words("""
harbour bridge reservoir tramway library hospital stadium airport tunnel railway museum market school laboratory
observatory quarry refinery warehouse terminal canal dam lighthouse theatre greenhouse substation depot shipyard foundry
brewery sawmill vineyard orchard nursery aquarium archive clinic courthouse garage hangar lagoon marina monastery pier
plaza pumphouse rink seawall silo station viaduct windmill workshop aqueduct bakery
""")
UNIT_OF_MEASURE = {
    "inspection cost": "dollars",
    "repair budget": "dollars",
    "annual revenue": "dollars",
    "insurance claim": "dollars",
    "operating loss": "dollars",
    "grant award": "dollars",
    "closure time": "days",
    "audit duration": "days",
    "delivery delay": "days",
    "rainfall total": "millimetres",
    "visitor count": "people",
    "staff total": "people",
    "passenger load": "people",
    "fuel use": "litres",
    "water intake": "litres",
    "waste output": "tonnes",
    "steel order": "tonnes",
    "cargo weight": "tonnes",
    "survey length": "metres",
    "cable run": "metres",
    "power draw": "kilowatts",
    "peak demand": "kilowatts",
    "leak rate": "litres",
    "complaint total": "letters",
    "training time": "hours",
    "overtime total": "hours",
    "flooded area": "hectares",
    "noise level": "decibels",
    "seat total": "seats",
    "ticket income": "dollars",
}
ADJECTIVES = words("""
quiet steady modest early sudden broad narrow careful simple heavy bright cold warm local regional public private annual
monthly final draft minor major useful common rare modern ancient rapid gentle formal partial complete recent northern
southern eastern western central upper lower inner outer shallow deep coastal rural urban technical seasonal reliable
temporary permanent detailed cautious expensive cheap distant nearby empty crowded fragile solid hollow smooth
""")
NOUNS = words("""
committee proposal budget survey council report garden river valley engine sensor record sample market street bridge
office journal lecture village festival weather season harvest machine pipeline network meeting contract supplier
inspector manager student teacher worker neighbour driver pilot farmer visitor designer analyst editor builder clerk
schedule forecast pattern method result figure chapter drawing sketch letter notice permit licence vehicle platform
window corridor entrance ceiling foundation channel filter valve turbine generator battery circuit cable antenna
signal meadow forest hillside coastline island beach cliff stream glacier summit trail path road junction
""")
VERBS = words("""
reviewed approved delayed measured recorded described compared repaired painted moved opened closed visited checked
praised questioned updated replaced cleaned counted collected studied discussed planned ordered rejected signed mapped
tested labelled stored shipped returned borrowed improved inspected restored extended reduced doubled photographed
""")
TIMES = [
    "in the spring",
    "last winter",
    "on Monday",
    "during the review",
    "before noon",
    "after the storm",
    "every autumn",
    "in March",
    "over the weekend",
    "at short notice",
    "in the first quarter",
    "without delay",
    "for the third time",
    "during the night shift",
    "in late July",
    "as planned",
    "by the end of the year",
    "with some difficulty",
]
LINKS = [
    "However,",
    "Meanwhile,",
    "In addition,",
    "As a result,",
    "Later,",
    "For this reason,",
    "In contrast,",
    "Overall,",
]
SENTENCES = [
    "The {noun} {verb} the {adjective} {noun} {time}.",
    "{link} the {adjective} {noun} was {verb} and the {noun} was {verb}.",
    "Residents of {name} {verb} the {noun} near the {adjective} {place}.",
    "About {number} {noun} entries were {verb} {time}.",
    "The {place} in {name} has a {adjective} {noun} and a {adjective} {noun}.",
    "A {adjective} {noun} is not the same as a {adjective} {noun}, as the {noun} of {name} explained {time}.",
    "Nobody {verb} the {noun} {time}, although the {noun} had been {verb} by the {noun}.",
    "In section {small}, the {noun} {verb} a {adjective} {noun} for the {adjective} {noun}.",
    "The {name} {place} {noun} was {verb} by the {adjective} {noun} and {verb} again {time}.",
    "Each {noun} needs a {adjective} {noun}, and each {noun} {verb} by the {noun} needs {small} of them.",
]
# What a fact that is not a finding looks like: the model must not report it as one.
NOTES = [
    "Side note: {}",
    "Background: {}",
    "Earlier records say the following. {}",
    "For reference only: {}",
    "{}",
]
SAYS = ["was", "reached", "came to", "stood at"]


@dataclass(frozen=True)
class Measure:
    """What a fact is about: two facts of one document never share all three parts, but often two of them."""

    name: str
    place: str
    quantity: str


def number(rng: Random) -> str:
    if rng.random() < 0.15:
        return f"{rng.randrange(1, 1000)}.{rng.randrange(10)}"
    return f"{rng.randrange(10, 10 ** rng.randint(2, 6)):,}"


def sentence(rng: Random) -> str:
    """One filler sentence."""
    words = {
        "noun": lambda: rng.choice(NOUNS),
        "verb": lambda: rng.choice(VERBS),
        "adjective": lambda: rng.choice(ADJECTIVES),
        "name": lambda: rng.choice(NAMES),
        "place": lambda: rng.choice(PLACES),
        "time": lambda: rng.choice(TIMES),
        "link": lambda: rng.choice(LINKS),
        "number": lambda: number(rng),
        "small": lambda: str(rng.randint(2, 90)),
    }
    text = re.sub(r"\{(\w+)\}", lambda field: words[field[1]](), rng.choice(SENTENCES))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def new_measure(rng: Random, used: list[Measure]) -> Measure:
    """A measure not yet in `used`, often sharing a name, place or quantity with one that is."""
    while True:
        name, place, quantity = (
            getattr(rng.choice(used), part) if used and rng.random() < 0.4 else rng.choice(choices)
            for part, choices in (("name", NAMES), ("place", PLACES), ("quantity", list(UNIT_OF_MEASURE)))
        )
        measure = Measure(name, place, quantity)
        if measure not in used:
            return measure


def fact(rng: Random, measure: Measure) -> str:
    """For example "The Calder bridge repair budget was 12,410 dollars."."""
    unit = UNIT_OF_MEASURE[measure.quantity]
    return f"The {measure.name} {measure.place} {measure.quantity} {rng.choice(SAYS)} {number(rng)} {unit}."
