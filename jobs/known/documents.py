"""Documents with known answers: filler of the wanted length, facts woven into it, questions about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from jobs.known.wording import Style

Span = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """A question at the end of a document.

    references: what the answer must contain; recall is the share that it does (RULER's string match).
    needles: characters [first, last) of the document that hold the answer.
    prefix: the beginning of the answer, given to the model.
    expected: the whole answer as the bundled model was trained to write it; empty where wordings differ.
    """

    task: str
    text: str
    references: tuple[str, ...]
    needles: tuple[Span, ...]
    prefix: str = ""
    expected: str = ""


@dataclass(frozen=True)
class Lookup:
    """A value said twice: is it what the model expects at its second mention, in the middle of the document?"""

    first: Span
    second: Span
    value: str
    task: str = "lookup"


@dataclass(frozen=True)
class Document:
    """carrier: a question for a document whose own ones were all left out: a prompt ends with one."""

    name: str
    kind: str
    length: int
    text: str
    questions: tuple[Question, ...]
    lookups: tuple[Lookup, ...]
    carrier: str

    def only(self, tasks: Sequence[str]) -> Document:
        """The same text with the questions of these tasks."""
        return replace(
            self,
            questions=tuple(question for question in self.questions if question.task in tasks),
            lookups=self.lookups if "lookup" in tasks else (),
        )


@dataclass(frozen=True)
class Fact:
    """A sentence to be woven in. depth: where, 0 to 1. mark: the part of it that counts as the needle; "" for all."""

    text: str
    depth: float
    mark: str = ""


# Filler sentences, each with the white space before it. Never ends.
Filler = Iterator[str]
CountTokens = Callable[[Sequence[str]], list[int]]


def weave(filler: Sequence[str], facts: Sequence[Fact]) -> tuple[str, list[Span]]:
    """Filler with each fact behind the sentence at its depth; facts of one place keep their order.

    Returns the text and the characters of each fact's mark. A fact never comes first: the bundled model reads one only
    behind another sentence.
    """
    places = [max(1, min(len(filler), round(fact.depth * len(filler)))) for fact in facts]
    order = sorted(range(len(facts)), key=lambda index: (places[index], facts[index].depth))
    pieces: list[str] = []
    spans: list[Span] = [(0, 0)] * len(facts)
    length = done = 0
    for index in order:
        fact = facts[index]
        part = "".join(filler[done : places[index]])
        begin = length + len(part) + 1 + (fact.text.index(fact.mark) if fact.mark else 0)
        spans[index] = (begin, begin + len(fact.mark or fact.text))
        pieces += [part, " ", fact.text]
        length += len(part) + 1 + len(fact.text)
        done = max(done, places[index])
    return "".join(pieces) + "".join(filler[done:]), spans


def take(filler: Filler, room: int, count_tokens: CountTokens) -> list[str]:
    """As many pieces of filler as `room` tokens hold."""
    pieces: list[str] = []
    while True:
        more = [next(filler) for _ in range(256)]
        for piece, tokens in zip(more, count_tokens(more), strict=True):
            if tokens > room:
                return pieces
            room -= tokens
            pieces.append(piece)


def depths(rng: Random, count: int) -> list[float]:
    """One depth in each of `count` equal parts of [0, 1), in random order."""
    parts = [(part + rng.random()) / count for part in range(count)]
    rng.shuffle(parts)
    return parts


@dataclass
class Recipe:
    """A document before it has a text. asks: each question and the facts that hold its answer."""

    filler: Filler
    facts: list[Fact] = field(default_factory=list)
    asks: list[tuple[Question, list[int]]] = field(default_factory=list)
    repeats: list[tuple[int, int, str]] = field(default_factory=list)
    title: str = ""

    def tell(self, text: str, depth: float, mark: str = "") -> int:
        """Add a fact; returns its index."""
        self.facts.append(Fact(text, depth, mark))
        return len(self.facts) - 1


@dataclass(frozen=True)
class Kind:
    """A kind of document, and the tasks that its questions belong to.

    recipe: gets the wording, how many questions, and the text that fills the document (empty: synthetic sentences).
    """

    name: str
    recipe: Callable[[Random, Style, int, str], Recipe]
    tasks: tuple[str, ...]


def finish(recipe: Recipe, spans: list[tuple[int, int]], shift: int) -> tuple[tuple[Question, ...], tuple[Lookup, ...]]:
    """Questions and lookups with their places, `shift` characters further on than the woven text has them."""
    moved = [(first + shift, last + shift) for first, last in spans]
    asks = tuple(replace(question, needles=tuple(moved[fact] for fact in facts)) for question, facts in recipe.asks)
    return asks, tuple(Lookup(moved[first], moved[second], value) for first, second, value in recipe.repeats)
