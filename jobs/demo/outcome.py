"""What an arm of the demo found, as a table and as a saved comparison."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from operator import add
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.demo.scoring import Score, score

RIGHT = ("tokens", "density", "first token s", "decode s")


@dataclass(frozen=True)
class Outcome:
    """The result rows of one arm by document id, and their scores; only documents with known findings have one."""

    arm: str
    rows: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, Score]

    @property
    def total(self) -> Score:
        """The scores of all documents together."""
        return reduce(add, self.scores.values(), Score())

    @property
    def density(self) -> float:
        """Mean density over the documents with known findings."""
        return sum(self.rows[name]["density"] for name in self.scores) / len(self.scores)

    def in_words(self) -> str:
        """One line on what was found."""
        total = self.total
        wrong = total.listed - total.found
        return (
            f"{self.arm}: {total.found} of {total.planted} findings ({total.recall:.1%}), "
            f"{wrong} wrong line{'s' * (wrong != 1)}, density {self.density:.2f}"
        )


def judge(arm: str, rows: Sequence[Mapping[str, Any]], findings: Mapping[str, Sequence[str]]) -> Outcome:
    """Score the rows of an arm. Raises KeyError if a document with known findings has no row."""
    by_document = {row["document_id"]: row for row in rows}
    scores = {name: score(by_document[name]["output"], known) for name, known in findings.items()}
    return Outcome(arm, by_document, scores)


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """A line for each document, a line for each arm, and one summary in full."""
    first = outcomes[0]
    table = Table(title=f"Each document; times of the {first.arm} run", title_justify="left")
    for heading in ("document", "attention", *RIGHT, *(f"found: {outcome.arm}" for outcome in outcomes)):
        table.add_column(heading, justify="right" if heading in RIGHT else "left", no_wrap=True)
    for name, row in sorted(first.rows.items()):
        seconds = (f"{row[column]:.1f}" for column in ("time_to_first_token", "decode_seconds"))
        found = (outcome.scores.get(name) for outcome in outcomes)
        table.add_row(
            name,
            row["attention"],
            f"{row['prompt_tokens']:,}",
            f"{row['density']:.2f}",
            *seconds,
            *(f"{s.found} of {s.planted}" if s else "none planted" for s in found),
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for outcome in outcomes:
        print(outcome.in_words())
    example = next(iter(first.scores))
    print(f"\nThe summary of {example}:\n{first.rows[example]['output']}")


def save_comparison(path: Path, outcomes: Sequence[Outcome], command: str) -> None:
    """Write each arm's totals, and what they were measured with, as JSON."""
    document = {
        "command": command,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "arms": {outcome.arm: outcome.in_words() for outcome in outcomes},
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def print_comparison(path: Path, without: set[str]) -> None:
    """Print the saved totals of the arms that were not run now."""
    if not path.exists():
        return
    document = json.loads(path.read_text(encoding="utf-8"))
    lines = [words for arm, words in document["arms"].items() if arm not in without]
    if lines:
        print(f"\nFor comparison, measured on {document['measured']} by `{document['command']}`:")
        print("\n".join(lines))
