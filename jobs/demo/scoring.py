"""How many of the known findings the summaries hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Score:
    """found: of the `planted` findings, those that stand in the output word for word.

    listed: lines of the output; above `found` they are mistakes.
    """

    planted: int = 0
    found: int = 0
    listed: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.planted + other.planted, self.found + other.found, self.listed + other.listed)

    @property
    def recall(self) -> float:
        """Share of the planted findings that were found; 0 where none are planted."""
        return self.found / self.planted if self.planted else 0.0


def read_findings(path: Path) -> dict[str, list[str]]:
    """The findings by document id, from the JSONL file that tools.demo_documents writes."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["document_id"]: row["findings"] for row in rows}


def score(output: str, findings: Sequence[str]) -> Score:
    """The score of one summary."""
    listed = sum(bool(line.strip()) for line in output.splitlines())
    return Score(planted=len(findings), found=sum(finding in output for finding in findings), listed=listed)
