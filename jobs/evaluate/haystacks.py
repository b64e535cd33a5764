"""The kinds of documents, after RULER (arXiv 2404.06654), and what is asked about each.

Tasks whose haystack is the same share a document: the needles of one are further distractors to the others, so a
document is never easier than RULER's, which holds one question. `questions` = 1 comes closest to it.
"""

from __future__ import annotations

from itertools import count
from random import Random

from jobs.evaluate.fillers import noise_filler, record_filler, word_list
from jobs.known.documents import Kind, Question, Recipe, depths
from jobs.known.grammar import (
    ADJECTIVES,
    NOUNS,
    PLACES,
    VERBS,
    number,
)
from jobs.known.report import REPORT, essay_filler
from jobs.known.wording import Style

DISTRACTORS = 4
MULTI_QUERY_KEYS = 4
COMMON_WORDS = 10
CODED_WORDS, ZETA = 500, 2.0
LOTS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


class Keys:
    """Keys like "quiet-harbour", none twice in a document."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def new(self, like: str = "") -> str:
        """like: share one half of this key, to be confused with it."""
        while True:
            first, second = self._rng.choice(ADJECTIVES), self._rng.choice(NOUNS)
            if like and self._rng.random() < 0.5:
                first = like.split("-")[0]
            elif like:
                second = like.split("-")[1]
            key = f"{first}-{second}"
            if len(self._used) > 3000:
                key += f"-{self._rng.choice(PLACES)}"
            if key not in self._used:
                self._used.add(key)
                return key


def magic(rng: Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def add_numbers(recipe: Recipe, rng: Random, style: Style, keys: Keys, task: str, questions: int) -> dict[str, str]:
    """Needles of one key and one number each, spread over the depth, and a question about each."""
    said = {}
    for depth in depths(rng, questions):
        key, value = keys.new(), magic(rng)
        fact = recipe.tell(style.needle.format(key=key, value=value), depth)
        ask_number(recipe, style, task, key, [value], [fact])
        said[key] = value
    return said


def ask_number(recipe: Recipe, style: Style, task: str, key: str, values: list[str], facts: list[int]) -> None:
    asked = "ask_number" if len(values) == 1 else "ask_numbers"
    question = Question(
        task,
        getattr(style, asked).format(key=key),
        tuple(values),
        (),
        style.prefix(asked, key=key),
        ", ".join(values),
    )
    recipe.asks.append((question, facts))


def noise(rng: Random, style: Style, questions: int, essay: str) -> Recipe:
    """RULER niah_single_1: the haystack is the same five sentences over and over."""
    recipe = Recipe(noise_filler())
    add_numbers(recipe, rng, style, Keys(rng), "niah_noise", questions)
    return recipe


def essays(rng: Random, style: Style, questions: int, essay: str) -> Recipe:
    """RULER niah_single_2, multikey_1, multivalue, multiquery and variable tracking in one essay-like text."""
    recipe, keys = Recipe(essay_filler(rng, essay)), Keys(rng)
    said = add_numbers(recipe, rng, style, keys, "niah_essay", max(questions, MULTI_QUERY_KEYS))
    recipe.asks = recipe.asks[:questions]
    some = max(1, questions // 2)
    for _ in range(some):
        add_multikey(recipe, rng, style, keys)
        add_multivalue(recipe, rng, style, keys)
        add_chain(recipe, rng, style)
    asked = list(said)[:MULTI_QUERY_KEYS]
    listed = f"{', '.join(asked[:-1])} and {asked[-1]}"
    ask_number(recipe, style, "multiquery", listed, [said[key] for key in asked], list(range(len(asked))))
    return recipe


def add_multikey(recipe: Recipe, rng: Random, style: Style, keys: Keys) -> None:
    """RULER multikey_1, made harder: the four other keys share a half with the one that is asked for."""
    key, value = keys.new(), magic(rng)
    fact = recipe.tell(style.needle.format(key=key, value=value), rng.random())
    for _ in range(DISTRACTORS):
        recipe.tell(style.needle.format(key=keys.new(like=key), value=magic(rng)), rng.random())
    ask_number(recipe, style, "multikey_4", key, [value], [fact])


def add_multivalue(recipe: Recipe, rng: Random, style: Style, keys: Keys) -> None:
    key, places = keys.new(), sorted(depths(rng, style.values))
    values = [magic(rng) for _ in places]
    facts = [
        recipe.tell(style.needle.format(key=key, value=value), at) for value, at in zip(values, places, strict=True)
    ]
    ask_number(recipe, style, "multivalue", key, values, facts)


def add_chain(recipe: Recipe, rng: Random, style: Style) -> None:
    """RULER variable tracking: one chain; a report asks for the value at its end, RULER for all its names."""
    report = style.name == "report"
    taken = " ".join(fact.text for fact in recipe.facts)
    names: list[str] = []
    while len(names) <= style.hops:
        name = f"{rng.choice(LOTS)}{rng.randrange(10, 100)}" if report else "".join(rng.choice(LOTS) for _ in range(5))
        if name not in names and name not in taken:
            names.append(name)
    value = number(rng) if report else str(rng.randrange(10_000, 100_000))
    facts = []
    for step, at in enumerate(sorted(depths(rng, len(names)))):
        wording = style.chain_step if step else style.chain_start
        facts.append(recipe.tell(wording.format(name=names[step], previous=names[step - 1], value=value), at))
    references, expected = ((value,), "") if report else (tuple(names), "")
    prefix = style.prefix("ask_chain", count=str(len(names)), value=value)
    text = style.ask_chain.format(name=names[-1], value=value)
    recipe.asks.append((Question("variable_tracking", text, references, (), prefix, expected), facts))


def records(rng: Random, style: Style, questions: int, essay: str) -> Recipe:
    """A needle among key-value records of another kind."""
    recipe = Recipe(record_filler(rng, set()))
    add_numbers(recipe, rng, style, Keys(rng), "niah_records", questions)
    return recipe


def distractors(rng: Random, style: Style, questions: int, essay: str) -> Recipe:
    """RULER multikey_2: the haystack is needles that are not asked for."""
    keys = Keys(rng)
    recipe = Recipe(iter(()))
    add_numbers(recipe, rng, style, keys, "multikey_all", questions)
    recipe.filler = (" " + style.needle.format(key=keys.new(), value=magic(rng)) for _ in count())
    return recipe


def words(rng: Random, style: Style, questions: int, essay: str) -> Recipe:
    """RULER common words extraction: ten words stand in the list 30 times, all others 3 times."""
    known = sorted({*NOUNS, *ADJECTIVES, *VERBS, *PLACES})
    common = rng.sample(known, COMMON_WORDS)
    rare = sorted(set(known) - set(common))
    recipe = Recipe(word_list(rng, common, rare))
    question = Question("common_words", style.ask_common, tuple(common), (), style.prefix("ask_common"))
    recipe.asks.append((question, []))
    return recipe


def coded(rng: Random, style: Style, questions: int, essay: str) -> Recipe:
    """RULER frequent words extraction: random words drawn by Zipf's law; the dots, drawn most often, do not count."""
    made = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6)) for _ in range(CODED_WORDS)]
    weights = [(rank + 1) ** -ZETA for rank in range(CODED_WORDS + 1)]
    recipe = Recipe(" " + rng.choices(["...", *made], weights)[0] for _ in count())
    question = Question("frequent_words", style.ask_frequent, tuple(made[:3]), (), style.prefix("ask_frequent"))
    recipe.asks.append((question, []))
    return recipe


KINDS = {
    kind.name: kind
    for kind in (
        Kind("noise", noise, ("niah_noise",)),
        Kind("essay", essays, ("niah_essay", "multikey_4", "multivalue", "multiquery", "variable_tracking")),
        Kind("records", records, ("niah_records",)),
        Kind("distractors", distractors, ("multikey_all",)),
        REPORT,
        Kind("words", words, ("common_words",)),
        Kind("coded", coded, ("frequent_words",)),
    )
}
TASKS = tuple(task for kind in KINDS.values() for task in kind.tasks)
