"""The demo's documents and the findings in them are what the generator writes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from jobs.demo.scoring import read_findings
from tools.demo_documents.__main__ import REAL_TEXTS, SYNTHETIC, make_reports
from tools.demo_documents.reports import SENTENCE_END, plant

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
