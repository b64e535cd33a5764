"""tools.evidence: documents with known places, and the table of what is found in them."""

from __future__ import annotations

from random import Random

import pytest

from tools import evidence


def test_the_command_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evidence, "LENGTH", 40_000)
    monkeypatch.setattr(evidence, "FACTS", 4)
    monkeypatch.setattr(evidence, "THRESHOLDS", (0.6,))
    assert evidence.main(["--documents", "1"]) == 0
    shown = capsys.readouterr().out
    assert "demo: 48 of 48 findings point to their own passage, threshold 0.6" in shown
    assert "| 0.6 | 1.000, 1.000 |" in shown


def test_places_are_where_the_facts_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "LENGTH", 40_000)
    essay = "\n".join(f"Sentence {number} of this essay is about the number {number * 7}." * 3 for number in range(300))
    for text, claims in (evidence.make_case(Random(1), ""), evidence.make_case(Random(1), essay)):
        assert {claim.kind for claim in claims} >= {*evidence.KINDS[:3], *evidence.UNSUPPORTED}
        for claim in claims:
            assert bool(claim.places) == (claim.kind not in evidence.UNSUPPORTED)
            if claim.kind == "copied":
                assert [text[begin:end] for begin, end in claim.places] == [claim.text]
            if claim.kind in evidence.UNSUPPORTED:
                assert claim.text not in text


def test_a_place_is_met_by_what_shares_half_of_it() -> None:
    assert evidence.same_place((10, 20), (10, 20))
    assert evidence.same_place((10, 30), (10, 20))
    assert not evidence.same_place((10, 31), (10, 20))
    assert not evidence.same_place((0, 5), (10, 20))
