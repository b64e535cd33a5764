"""The demo's documents, their findings, and how these are counted."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from jobs.demo.make_documents import REAL_TEXTS, SYNTHETIC, make_reports
from jobs.demo.outcome import judge, print_comparison, save_comparison
from jobs.demo.reports import SENTENCE_END, plant
from jobs.demo.scoring import Score, read_findings, score

ROOT = Path(__file__).parents[2]
DOCUMENTS = ROOT / "examples/documents"
FINDINGS = ROOT / "examples/findings.jsonl"
MODEL = str(ROOT / "models/tiny-reader")


def test_committed_documents_are_what_the_generator_writes() -> None:
    reports = make_reports(MODEL, DOCUMENTS, seed=1)
    assert read_findings(FINDINGS) == {f"{name}.txt": list(report.findings) for name, report in reports.items()}
    for name, report in reports.items():
        assert (DOCUMENTS / f"{name}.txt").read_text(encoding="utf-8") == report.text, name


def test_documents_hold_their_findings_once_in_order_inside_paragraphs() -> None:
    findings = read_findings(FINDINGS)
    assert len(findings) == len(SYNTHETIC) + len(REAL_TEXTS)
    for name, sentences in findings.items():
        text = (DOCUMENTS / name).read_text(encoding="utf-8")
        places = [text.index(f". Key finding: {sentence} ") for sentence in sentences]
        assert places == sorted(places)
        assert text.count("Key finding") == len(sentences)
        assert all(text.count(sentence) == 1 for sentence in sentences)


def test_another_seed_gives_other_documents() -> None:
    first, second = (make_reports(MODEL, DOCUMENTS, seed) for seed in (2, 3))
    assert first["report-01"].text != second["report-01"].text


def test_planting_changes_nothing_else() -> None:
    text = (DOCUMENTS / "newton-opticks.txt").read_text(encoding="utf-8")
    findings = ["The Calder bridge repair budget was 12 dollars.", "The Ripon pier staff total was 7 people."]
    planted = plant(Random(0), text, findings, notes=[])
    without = planted.text
    for finding in findings:
        without = without.replace(f" Key finding: {finding}", "")
    assert without == text


def test_planting_needs_enough_sentences() -> None:
    text = "One sentence here. Another one here."
    assert len(SENTENCE_END.findall(text)) == 1
    with pytest.raises(ValueError, match="1 sentence ends are too few for 1 facts"):
        plant(Random(0), text, ["A finding."], notes=[])


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
