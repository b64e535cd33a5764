"""The passages of a document whose wording a sentence of the output repeats.

A passage is evidence that the document says something alike, not that the sentence is true (docs/evidence.md).

For each sentence every stretch of the document is scored by the share of the sentence's words that stand in it, rare
words, names and numbers counting more; the best stretches are cut to the words that matter, and compared in order of
words, too (Indel similarity). A sentence that joins several facts may have several passages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypedDict

import numpy as np

from pipeline.review.units import Unit, units_of
from pipeline.review.words import Words, fold, split_words

# A sentence is supported if its passages hold this share of its weight; chosen by measurement (docs/evidence.md).
THRESHOLD = 0.6
# How much more a number and a name count than another word that is as rare, and the name of a JSON field less.
NUMBER, NAME, CONTEXT = 4.0, 1.5, 0.2
# The weight of a word that the document does not have, if it is no number or name: it is often a mere synonym.
UNKNOWN = 0.4
# Sentences with less weight than this say too little to have a place: "Yes.", "Positive."
LEAST = 0.8
# A further passage must add this share of the sentence's weight, in so many words: a number alone may stand anywhere.
MORE, MORE_WORDS, MOST_PASSAGES = 0.25, 3, 3
# Places in the document that are looked at closely.
CANDIDATES = 6
# In mean weights of the sentence's words: what a word inside a passage costs that the sentence does not have, and the
# end of a sentence inside it. In weights of the sentence: what the same order of words is worth.
GAP, STOP, ORDER = 0.04, 0.4, 0.15
# What a word that a sentence has twice counts at its second place, of its weight.
AGAIN = 0.1
# Words between two stretches of a document whose middle was cut out: no passage reaches across.
APART = 10_000
_STOPS = re.compile("[.!?\u3002\uff01\uff1f][\\s\"')\u201d]|[\u3002\uff01\uff1f\\n]")


class Passage(TypedDict):
    """Characters [output_start, output_end) of the output, and [start, end) of the document's text that say the like.

    score: share of the words' weight, 0 to 1.
    """

    output_start: int
    output_end: int
    start: int
    end: int
    score: float


def find_evidence(
    text: str, output: str, unread: tuple[int, int] | None = None, threshold: float = THRESHOLD
) -> list[Passage]:
    """The passages of a document that support an output's sentences, or its JSON fields, in the output's order.

    unread: characters [start, end) of the text that were cut out before the model read it; no passage is there.
    threshold: share of a sentence's weight that its passages must hold, 0 to 1.
    """
    units = units_of(output)
    if not units or not text:
        return []
    index = _Index(text, units, unread)
    return [passage for unit in units for passage in index.passages(unit, threshold)]


@dataclass(frozen=True)
class _Stretch:
    """Words [first, last] of a document, and which of a sentence's terms they hold."""

    first: int
    last: int
    terms: frozenset[int]
    value: float


class _Index:
    """A document's words, as far as an output's units have them."""

    def __init__(self, text: str, units: Sequence[Unit], unread: tuple[int, int] | None) -> None:
        self._text = text
        wanted = {
            fold(word) for unit in units for part in (unit.text, unit.context) for word in split_words(part).words
        }
        self._ids = {term: number for number, term in enumerate(sorted(wanted))}
        words = _words_read(text, unread)
        self._starts, self._ends = words.starts, words.ends
        ids = {word: self._ids.get(fold(word), -1) for word in set(words.words)}
        self._terms = np.fromiter(map(ids.__getitem__, words.words), np.int32, len(words.words))
        counts = np.bincount(self._terms + 1, minlength=len(self._ids) + 1)[1:]
        size = np.log(len(words.words) + 1.0)
        self._known = counts > 0
        self._rarity = (np.log((len(words.words) + 1.0) / (counts + 1.0)) / max(size, 1.0)) ** 2

    def passages(self, unit: Unit, threshold: float) -> Iterator[Passage]:
        """The passages that support a unit, in the document's order; none if it is not supported."""
        terms, weights = self._weigh(unit)
        total = sum(weights.values())
        if total < LEAST:
            return
        left = dict(weights)
        found: list[_Stretch] = []
        for _ in range(MOST_PASSAGES):
            best = self._best(terms, left, weights)
            if best is None:
                break
            added = [left[term] for term in best.terms if term in left]
            if found and (len(added) < MORE_WORDS or sum(added) < MORE * total):
                break
            found.append(best)
            left = {term: weight for term, weight in left.items() if term not in best.terms}
        if total - sum(left.values()) < threshold * total:
            return
        for stretch in _merged(found):
            start, end = int(self._starts[stretch.first]), int(self._ends[stretch.last])
            yield Passage(
                output_start=unit.start, output_end=unit.end, start=start, end=self._with_stop(end),
                score=round(min(1.0, sum(weights[term] for term in stretch.terms) / total), 4),
            )  # fmt: skip

    def _with_stop(self, end: int) -> int:
        return end + (self._text[end : end + 1] in tuple(".!?\u3002\uff01\uff1f"))

    def _weigh(self, unit: Unit) -> tuple[list[int], dict[int, float]]:
        """The terms of a unit in their order, and the weight of each."""
        weights: dict[int, float] = {}
        terms = []
        for place, word in enumerate(split_words(unit.text).words):
            term = self._ids[fold(word)]
            terms.append(term)
            if word[0].isdigit():
                factor = NUMBER if len(word) > 1 else 1.0
                weight = factor * (self._rarity[term] if self._known[term] else 1.0)
            elif word[0].isupper() and place:
                weight = NAME * (self._rarity[term] if self._known[term] else 1.0)
            else:
                weight = self._rarity[term] if self._known[term] else UNKNOWN
            weights[term] = max(weights.get(term, 0.0), float(weight))
        for word in split_words(unit.context).words:
            term = self._ids[fold(word)]
            if self._known[term]:
                weights.setdefault(term, CONTEXT * float(self._rarity[term]))
        return terms, weights

    def _best(self, terms: list[int], left: dict[int, float], weights: dict[int, float]) -> _Stretch | None:
        """The stretch that holds most of the weight that is left."""
        width = 2 * len(weights) + 10
        table = np.zeros(len(self._ids) + 1)  # -1, no term of the output's, is the last one
        table[list(left)] = list(left.values())
        gains = table[self._terms]
        hits = np.flatnonzero(gains)
        if not len(hits):
            return None
        coverage = self._coverage(hits, gains[hits], width)
        best: _Stretch | None = None
        for _ in range(CANDIDATES):
            start = int(coverage.argmax())
            if coverage[start] <= 0 or (best and coverage[start] < best.value - ORDER * sum(weights.values())):
                break
            stretch = self._cut(terms, left, weights, start, min(start + width, len(self._terms)))
            if best is None or stretch.value > best.value:
                best = stretch
            coverage[max(0, start - width // 2) : start + width // 2] = 0.0
        return best

    def _coverage(self, hits: np.ndarray, gains: np.ndarray, width: int) -> np.ndarray:
        """float64 [words]: the weight of the different terms among the `width` words from each word on."""
        order = np.lexsort((hits, self._terms[hits]))
        places, terms = hits[order], self._terms[hits][order]
        same = np.concatenate([[False], terms[1:] == terms[:-1]])
        before = np.concatenate([[-1], places[:-1]])
        # The stretches that hold a term begin at most `width` words before it, and behind its last mention.
        begins = np.maximum(places - width + 1, np.where(same, before + 1, 0)).clip(0)
        size, weights = len(self._terms) + 1, gains[order]
        steps = np.bincount(begins, weights, size) - np.bincount(places + 1, weights, size)
        coverage = np.cumsum(steps)[:-1]
        coverage[coverage < 1e-9] = 0.0
        return coverage

    def _cut(
        self, terms: list[int], left: dict[int, float], weights: dict[int, float], start: int, stop: int
    ) -> _Stretch:
        """The part of words [start, stop) that holds the most weight in the fewest words."""
        here = self._terms[start:stop].tolist()
        places = [place for place, term in enumerate(here) if term in weights]
        times = Counter(dict.fromkeys(weights, 1)) | Counter(terms)
        mean = sum(weights.values()) / len(weights)
        stops = self._stops(start, stop)
        best, first, last, held = -1.0, 0, 0, frozenset[int]()
        for number, begin in enumerate(places):
            seen: Counter[int] = Counter()
            value, matched = 0.0, 0
            for end in places[number:]:
                term = here[end]
                seen[term] += 1
                if seen[term] <= times[term]:
                    matched += 1
                    value += left.get(term, 0.0) * (1.0 if seen[term] == 1 else AGAIN)
                gaps = end - begin + 1 - matched
                net = value - mean * (GAP * gaps + STOP * (stops[end] - stops[begin]))
                if net > best:
                    best, first, last, held = net, begin, end, frozenset(seen)
        from rapidfuzz.distance import Indel  # here: a row's columns are asked for without it

        alike = Indel.normalized_similarity(terms, here[first : last + 1])
        return _Stretch(start + first, start + last, held, best + ORDER * sum(weights.values()) * alike)

    def _stops(self, start: int, stop: int) -> list[int]:
        """For each of the words [start, stop), how many sentences ended before it."""
        between = zip(self._ends[start : stop - 1].tolist(), self._starts[start + 1 : stop].tolist(), strict=True)
        return [0, *accumulate(bool(_STOPS.search(self._text, begin, end)) for begin, end in between)]


def _merged(found: Sequence[_Stretch]) -> list[_Stretch]:
    """Stretches in the document's order, those that overlap as one."""
    merged: list[_Stretch] = []
    for each in sorted(found, key=lambda each: each.first):
        if merged and each.first <= merged[-1].last:
            last = merged.pop()
            each = _Stretch(last.first, max(last.last, each.last), last.terms | each.terms, last.value + each.value)
        merged.append(each)
    return merged


def _words_read(text: str, unread: tuple[int, int] | None) -> Words:
    """The words of a text without those in the middle that were cut out."""
    if unread is None:
        return split_words(text)
    first, last = split_words(text[: unread[0]]), split_words(text[unread[1] :])
    border = np.full(APART, unread[0])
    return Words(
        [*first.words, *[""] * APART, *last.words],
        np.concatenate([first.starts, border, last.starts + unread[1]]),
        np.concatenate([first.ends, border, last.ends + unread[1]]),
    )
