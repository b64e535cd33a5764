"""How the demo counts the findings."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.demo.outcome import judge, print_comparison, save_comparison
from jobs.demo.scoring import Score, score
from jobs.summarize import main as summarize


def test_the_demo_of_real_models_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far as any model goes: its settings, questions and PDF files are read."""
    monkeypatch.chdir(Path(__file__).parents[2])
    words = ["--config", "examples/demo-real.yaml", "--model", "models/tiny-reader", "--output", str(tmp_path / "out")]
    assert summarize([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "3 documents" in told
    assert told.count("question ") == 5


def test_score_counts_whole_sentences_and_wrong_lines() -> None:
    findings = ["The Calder bridge repair budget was 12 dollars.", "The Ripon pier staff total was 7 people."]
    output = "1. The Calder bridge repair budget was 12 dollars.\n2. The Ripon pier staff total was 70 people.\n"
    assert score(output, findings) == Score(planted=2, found=1, listed=2)
    assert score("", []) == Score()
    assert Score().recall == 0.0
    assert (Score(2, 1, 2) + Score(2, 2, 3)).recall == 0.75


def test_judge_counts_the_documents_with_known_findings_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [
        {"document_id": "a.txt", "output": "1. It was 12.\n2. It was 14.", "density": 0.3},
        {"document_id": "b.txt", "output": "No key findings.", "density": 1.0},
    ]
    outcome = judge("stem", rows, {"a.txt": ["It was 12.", "It was 13."]})
    assert outcome.in_words() == "stem: 1 of 2 findings (50.0%), 1 wrong line, density 0.30"
    with pytest.raises(KeyError):
        judge("stem", rows, {"c.txt": []})

    saved = tmp_path / "comparison.json"
    save_comparison(saved, [outcome], "a command")
    print_comparison(saved, without={"dense"})
    assert outcome.in_words() in capsys.readouterr().out
    print_comparison(saved, without={"stem"})
    assert capsys.readouterr().out == ""
