"""Training documents as token ids: filler of an exact length, facts in it, and turns of questions and answers.

Every piece begins where the tokenizer's pre-tokens do, so the pieces' ids side by side are those of the whole text.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from jobs.known.grammar import PLACES
from tools.train_demo_model.facts import Ask, Counts, Needle, make_facts
from tools.train_demo_model.language import filler, name

PAD, BOS, USER, ASSISTANT, END = range(5)
# What a document's filler is made of; several names are mixed.
MIXTURES = [
    *[("report",)] * 6,
    ("salad",),
    ("random",),
    ("noise",),
    ("invented",),
    ("report", "salad"),
    ("report", "invented"),
    ("invented", "noise"),
]
TITLES = ["Report on the {} {}\n\n"] * 3 + ["{} {}: annual review\n\n", ""]
# Sentences of each kind of filler that slices are taken from.
POOL = {"report": 60_000, "salad": 8_000, "invented": 12_000, "noise": 8_000}
RANDOM_TOKENS = 200_000
SHORTEST = 256
# Marks in Document.mask.
OTHER, TARGET = 1, 2


@dataclass(frozen=True)
class Span:
    """A target: tokens [first, last) of a document. depth: of the needle, 0 to 1; -1 for none."""

    kind: str
    first: int
    last: int
    depth: float


@dataclass(frozen=True)
class Document:
    """ids int16, mask uint8 (TARGET or OTHER), positions int32, all [length]; and what its targets are."""

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    spans: list[Span]


class DocumentMaker:
    """Makes documents for one tokenizer. paragraphs: share of facts that open a paragraph of their own.

    pool: size of the filler pools, 1.0 for training. Built once; forked processes share it.
    """

    def __init__(self, tokenizer: Path, paragraphs: float = 0.3, seed: int = 0, pool: float = 1.0) -> None:
        from tokenizers import Tokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the workers' fork
        self.tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self.paragraphs = paragraphs
        vocabulary = self.tokenizer.get_vocab()
        self._stops = np.array(sorted(i for token, i in vocabulary.items() if token.endswith(".")))
        self._digits = np.array([vocabulary[digit] for digit in "0123456789"])
        rng = Random(seed)
        self._pools: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for kind, count in POOL.items():
            count = max(400, int(count * pool))
            texts = [filler(kind, rng, 400) for _ in range(count // 400)]
            ids = np.concatenate(self._encode(texts))
            self._pools[kind] = (ids, self._ends(ids))
        ids = np.random.default_rng(seed).integers(5, len(vocabulary), max(4096, int(RANDOM_TOKENS * pool)))
        ids[15::16] = self._stops[0]
        self._pools["random"] = (ids.astype(np.int16), np.arange(16, len(ids), 16))

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array(item.ids, np.int16) for item in encoded]

    def _ends(self, ids: np.ndarray) -> np.ndarray:
        """Where sentences end: behind a full stop that no digit follows."""
        return np.flatnonzero(np.isin(ids[:-1], self._stops) & ~np.isin(ids[1:], self._digits)) + 1

    def _slice(self, kind: str, tokens: int, draw: np.random.Generator) -> np.ndarray:
        """About `tokens` tokens of filler, from sentence end to sentence end."""
        ids, ends = self._pools[kind]
        if tokens <= 0:
            return ids[:0]
        tokens = min(tokens, len(ids) // 2)
        first = int(draw.integers(0, max(1, int(np.searchsorted(ends, len(ids) - tokens - 64)))))
        last = max(first, int(np.searchsorted(ends, ends[first] + tokens, "right")) - 1)
        return ids[ends[first] : ends[last]]

    def _opening(self, kind: str, tokens: int, draw: np.random.Generator) -> np.ndarray:
        """Exactly `tokens` tokens that end with a sentence; it may begin inside of one."""
        ids, ends = self._pools[kind]
        fitting = ends[ends >= tokens]
        if not len(fitting):
            return np.resize(ids, tokens)
        last = int(fitting[draw.integers(0, len(fitting))])
        return ids[last - tokens : last]

    def document(self, length: int, seed: int, skip_to: int = 0) -> Document:
        """A document of exactly `length` tokens. skip_to: positions may jump ahead, up to this one (PoSE).

        Raises ValueError below SHORTEST tokens, where facts do not fit.
        """
        if length < SHORTEST:
            raise ValueError(f"a document has at least {SHORTEST} tokens, got {length}")
        rng, draw = Random(seed), np.random.default_rng(seed)
        facts = make_facts(rng, _counts(rng, length))
        needles = facts.placed(rng)
        asks = [(ask, place) for place, needle in enumerate(needles) for ask in needle.asks]
        rng.shuffle(asks)
        if rng.random() < 0.5:  # a summary tells the findings; asking for them too would be answered by it
            asks = [(ask, place) for ask, place in asks if ask.kind != "finding"]
            summary: list[tuple[Ask, int]] = [(facts.summary(rng), -1)]
        else:
            summary = []
        asks = asks[: 12 if length < 4096 else 28]
        asks = summary + asks if rng.random() < 0.5 else asks + summary

        told = self._encode([self._tell(needle, rng) for needle in needles])
        title = self._encode([rng.choice(TITLES).format(name(rng), rng.choice(PLACES))])[0]
        turns = self._turns(asks)
        fixed = sum(map(len, told)) + len(title) + 2
        while len(turns) > 1 and fixed + sum(map(len, (part for turn in turns for part in turn))) + 40 > length:
            turns.pop()
            asks.pop()
        room = length - fixed - sum(len(part) for turn in turns for part in turn)
        if room < 0:
            return self.document(length, seed + 7919, skip_to)
        parts = self._filler(rng, draw, room, len(needles))

        pieces, starts, at = [np.array([BOS, USER], np.int16), title, parts[0]], [], 2 + len(title) + len(parts[0])
        for tokens, part in zip(told, parts[1:], strict=True):
            starts.append(at)
            pieces += [tokens, part]
            at += len(tokens) + len(part)
        end = at
        mask, spans = np.full(length, OTHER, np.uint8), []
        for place, needle in enumerate(needles):
            if needle.target is not None:
                before, figure = self._encode(
                    [" " + needle.text[: needle.target[0]], needle.text[slice(*needle.target)]]
                )
                first = starts[place] + len(before)
                spans.append(Span("again", first, first + len(figure), first / end))
        for (ask, place), (question, answer) in zip(asks, turns, strict=True):
            first = at + len(question)
            spans.append(Span(ask.kind, first, first + len(answer), starts[place] / end if place >= 0 else -1.0))
            pieces += [question, answer]
            at += len(question) + len(answer)
        for span in spans:
            mask[span.first : span.last] = TARGET
        positions = _positions(rng, draw, length, skip_to, [*starts, end])
        return Document(np.concatenate(pieces), mask, positions, spans)

    def _tell(self, needle: Needle, rng: Random) -> str:
        opens = rng.random() < self.paragraphs and needle.target is None
        return ("\n\n" if opens else " ") + needle.text

    def _turns(self, asks: list[tuple[Ask, int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(what stands before the answer, the answer with its end) of each turn."""
        questions = self._encode([("\n\n" if place == 0 else "") + ask.text for place, (ask, _) in enumerate(asks)])
        answers = self._encode([ask.answer for ask, _ in asks])
        turns = []
        for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            before = [question] if place == 0 else [np.array([USER], np.int16), question]
            turns.append((np.concatenate([*before, [END, ASSISTANT]]), np.concatenate([answer, [END]])))
        return [(question.astype(np.int16), answer.astype(np.int16)) for question, answer in turns]

    def _filler(self, rng: Random, draw: np.random.Generator, room: int, needles: int) -> list[np.ndarray]:
        """`room` tokens in needles + 1 parts of random sizes."""
        mixture = rng.choice(MIXTURES)
        cuts = np.sort(draw.integers(0, room + 1, needles))
        sizes = np.diff(np.concatenate([[0], cuts, [room]]))
        parts = [self._slice(rng.choice(mixture), int(size), draw) for size in sizes]
        missing = room - sum(map(len, parts[1:]))
        parts[0] = self._opening(rng.choice(mixture), missing, draw)
        return parts

    def batch(self, length: int, count: int, seed: int, skip_to: int = 0) -> list[Document]:
        """`count` documents; the same seed gives the same ones."""
        return [self.document(length, seed * 100_003 + index, skip_to) for index in range(count)]


def _counts(rng: Random, length: int) -> Counts:
    """How many facts; the more, the longer the document."""
    share = max(0.0, min(1.0, (length - 300) / 4000))

    def draw(low: int, short: int, long: int) -> int:
        return rng.randint(low, int(short + (long - short) * share))

    return Counts(
        findings=0 if rng.random() < 0.03 else draw(1, 3, 8),
        notes=draw(1, 4, 12),
        magic=draw(1, 2, 8),
        codes=draw(0, 2, 4),
        chains=draw(1, 2, 6),
        repeats=draw(0, 2, 8),
    )


def _positions(rng: Random, draw: np.random.Generator, length: int, skip_to: int, places: list[int]) -> np.ndarray:
    """0, 1, 2 ..., in most documents with jumps in front of a few of `places`: far apart without the length."""
    positions = np.arange(length, dtype=np.int32)
    if skip_to > length and rng.random() < 0.7:
        gap, jumps = rng.randint(0, skip_to - length), rng.randint(1, 4)
        for place, share in zip(rng.choices(places, k=jumps), draw.dirichlet(np.ones(jumps)), strict=True):
            positions[place:] += int(gap * share)
    return positions
