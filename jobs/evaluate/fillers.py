"""What documents are filled with around their facts: endless sentences, records, lists of words."""

from __future__ import annotations

from itertools import count, cycle
from random import Random

from jobs.known.documents import Filler
from jobs.known.grammar import NAMES, PLACES, UNIT_OF_MEASURE, Measure, number

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
COMMON_TIMES, UNCOMMON_TIMES = 30, 3


def noise_filler() -> Filler:
    """RULER's five sentences, over and over."""
    return (" " + said for said in cycle(NOISE))


def record_filler(rng: Random, used: set[tuple[str, str, str]]) -> Filler:
    """Key-value records, "The Calder bridge repair budget was 12,410 dollars."; `used` tells their keys."""
    while True:
        measure = Measure(rng.choice(NAMES), rng.choice(PLACES), rng.choice(list(UNIT_OF_MEASURE)))
        key = (measure.name, measure.place, measure.quantity)
        if key not in used or len(used) > 50_000:
            used.add(key)
            unit = UNIT_OF_MEASURE[measure.quantity]
            yield f" The {measure.name} {measure.place} {measure.quantity} was {number(rng)} {unit}."


def word_list(rng: Random, common: list[str], rare: list[str]) -> Filler:
    """A numbered list. Rare words come in portions, so that the list may end anywhere with common ones ahead."""
    place = count(1)
    made: set[str] = set(common) | set(rare)
    portion = [*common * COMMON_TIMES, *rng.sample(rare, 100) * UNCOMMON_TIMES]
    while True:
        rng.shuffle(portion)
        yield from (f" {next(place)}. {word}" for word in portion)
        fresh: list[str] = []
        while len(fresh) < 100:
            word = "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(3))
            if word not in made:
                made.add(word)
                fresh.append(word)
        portion = fresh * UNCOMMON_TIMES
