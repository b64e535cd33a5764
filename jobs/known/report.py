"""Reports with key findings, side notes and values that are said twice, in synthetic sentences or a given text."""

from __future__ import annotations

from itertools import count, cycle
from pathlib import Path
from random import Random

from jobs.known.documents import Filler, Kind, Question, Recipe, depths
from jobs.known.grammar import (
    NAMES,
    NOTES,
    PLACES,
    SAYS,
    UNIT_OF_MEASURE,
    Measure,
    new_measure,
    number,
    sentence,
)
from jobs.known.wording import Style
from pipeline.errors import JobError

REPEATED = ("As noted above, the {}", "To repeat, the {}", "It was said earlier that the {}")


def read_essay(path: Path) -> str:
    """The text of --essay. Raises JobError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"--essay {path}: it cannot be read: {error.strerror}; give a text file") from None
    except UnicodeDecodeError as error:
        raise JobError(f"--essay {path}: it cannot be read as UTF-8: {error}") from None
    if not text.strip():
        raise JobError(f"--essay {path}: it is empty")
    return text


def essay_filler(rng: Random, essay: str = "") -> Filler:
    """Sentences in paragraphs: of the synthetic grammar, or of a text from a random place on, again and again."""
    if essay:
        pieces = [part for part in essay.replace("\n\n", "\n").splitlines(keepends=True) if part.strip()]
        words = [" " + said for line in pieces for said in _sentences(line)]
        yield from cycle(words[(start := rng.randrange(len(words))) :] + words[:start])
    for _ in count():
        yield ("\n\n" if rng.random() < 0.12 else " ") + sentence(rng)


def _sentences(line: str) -> list[str]:
    parts = line.strip().split(". ")
    return [part + "." for part in parts[:-1]] + parts[-1:]


def _recipe(rng: Random, style: Style, questions: int, essay: str) -> Recipe:
    """A report with key findings to list, side notes to ask for, and values that are said twice."""
    recipe = Recipe(essay_filler(rng, essay), title=f"Report on the {rng.choice(NAMES)} {rng.choice(PLACES)}\n\n")
    used: list[Measure] = []
    findings, facts = [], []
    for at in sorted(depths(rng, rng.randint(3, 8))):
        said, measure, value = _measured(rng, used)
        if style.sentences and rng.random() < 0.25:
            said = value = sentence(rng)
        findings.append((said, said if style.sentences else value))
        facts.append(recipe.tell(f"Key finding: {said}", at, said))
    expected = "\n".join(f"{number}. {said}" for number, (said, _) in enumerate(findings, start=1))
    asked = Question("summary", style.ask_findings, tuple(value for _, value in findings), (), "", expected)
    recipe.asks.append((asked, facts))
    for at in depths(rng, questions):
        said, measure, value = _measured(rng, used)
        fact = recipe.tell(rng.choice(NOTES).format(said), at, said)
        prefix = style.prefix("ask_fact", measure=measure)
        unit = said[:-1].rsplit(" ", 1)[1]
        text = style.ask_fact.format(measure=measure)
        recipe.asks.append((Question("report_facts", text, (value,), (), prefix, f"{value} {unit}"), [fact]))
    for _ in range(max(4, 2 * questions)):
        said, _, value = _measured(rng, used)
        at = rng.uniform(0.0, 0.8)
        first = recipe.tell(rng.choice(NOTES).format(said), at, said)
        again = rng.choice(REPEATED).format(said.removeprefix("The "))
        second = recipe.tell(again, rng.uniform(at + 0.08, 0.93), value)
        recipe.repeats.append((first, second, value))
    return recipe


def _measured(rng: Random, used: list[Measure]) -> tuple[str, str, str]:
    """A sentence about a measure that is not in `used` yet, what it is about, and its figure."""
    measure = new_measure(rng, used)
    used.append(measure)
    about, value = f"{measure.name} {measure.place} {measure.quantity}", number(rng)
    says = rng.choice(SAYS)
    return f"The {about} {says} {value} {UNIT_OF_MEASURE[measure.quantity]}.", about, value


REPORT = Kind("report", _recipe, ("summary", "report_facts", "lookup"))
