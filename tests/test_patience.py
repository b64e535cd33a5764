"""Tests wait longer where the machine is slow or busy, and no file of theirs has a time-out of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from patience import MOST, USUAL_SECONDS, factor, patient

TESTS = Path(__file__).parent
# A number of seconds, two digits or more, where one waits; shorter ones are what the test is about.
FIXED = re.compile(r"(?:\btimeout ?= ?|monotonic\(\) \+ |\bwait\()(\d{2,}[\d_.]*)")


def test_a_machine_is_slow_by_its_load_or_its_speed() -> None:
    assert factor(0.2, USUAL_SECONDS / 2) == 1, "a fast idle machine waits as long as is written"
    assert factor(3.0, USUAL_SECONDS) == 3
    assert factor(0.5, 4 * USUAL_SECONDS) == pytest.approx(4)
    assert factor(500.0, USUAL_SECONDS) == MOST, "what hangs ends"


def test_a_time_out_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEMLINE_TEST_PATIENCE", raising=False)
    assert 30 <= patient(30) <= 300
    monkeypatch.setenv("STEMLINE_TEST_PATIENCE", "2.5")
    assert patient(30) == 75


def fixed_waits(folder: Path) -> list[str]:
    return [
        f"{path.relative_to(folder)}:{number} waits for {found[1]}"
        for path in sorted(folder.rglob("*.py"))
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (found := FIXED.search(line))
    ]


def test_no_time_out_is_fixed() -> None:
    assert not fixed_waits(TESTS)


@pytest.mark.parametrize(
    "line",
    [
        "run(command, timeout=300)",
        "until = time.monotonic() + 60",
        "driver.wait(30)",
    ],
)
def test_a_fixed_one_would_be_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(line, encoding="utf-8")
    assert fixed_waits(tmp_path)
