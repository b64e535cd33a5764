"""Workers, drivers and both halves of Ray killed in turn: every document has its one row, every death one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.faults.blows import Blow, blows

PROGRESS = "16:16:44 108/3,000 documents · 9,052 tokens · 3,453 tokens/s · about 1:04 left"
ERROR = "error: Ray failed: its node manager (raylet) is gone; what is finished is written, run the same command again"


@pytest.mark.ray
def test_ray_and_workers_are_killed_in_turn(tmp_path: Path) -> None:
    struck, count = blows(tmp_path / "run", ["worker", "gcs"], documents=400, workers=1, seed=309)  # soon
    assert [blow.problem for blow in struck] == ["", ""]
    assert count.exact
    assert count.statuses == {"ok": 400}


@pytest.mark.parametrize(
    ("code", "lines", "problem"),
    [
        (1, (PROGRESS, ERROR), ""),
        (0, (PROGRESS, ERROR), "exit code 0"),
        (1, (PROGRESS,), "exit code 1"),
        (1, (ERROR, "Traceback (most recent call last):"), "exit code 1"),
        (1, ("    [state-dump] NodeManager", ERROR), "it printed more"),
    ],
)
def test_what_is_not_one_line_is_told(code: int, lines: tuple[str, ...], problem: str) -> None:
    found = Blow("raylet", code, 1.0, lines).problem
    assert found.startswith(problem)
    assert bool(found) == bool(problem)
