# ruff: noqa: RUF001
"""Evidence: each sentence of an output points to the passage of the document that says it, or to none."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.review.evidence import Passage, find_evidence
from pipeline.review.units import units_of
from pipeline.review.words import fold, split_words
from tools.evidence import Tally, demo_score, judge, make_case

FILLER = "The committee met in the hall on Monday. Nobody spoke about the weather, although it rained. " * 20
FACT = "The Verdon library annual revenue reached 72,028 dollars."
TEXT = f"{FILLER}Key finding: {FACT} {FILLER}Tea was served at the Tamar dam by 14 people. {FILLER}"


def said(text: str, output: str, **settings: object) -> list[tuple[str, str]]:
    """Pieces of the output, and the passages that support them."""
    found = find_evidence(text, output, **settings)  # type: ignore[arg-type]
    return [(output[each["output_start"] : each["output_end"]], text[each["start"] : each["end"]]) for each in found]


def test_a_sentence_points_to_its_passage() -> None:
    assert said(TEXT, FACT) == [(FACT, FACT)]
    (passage,) = find_evidence(TEXT, FACT)
    assert passage == Passage(
        output_start=0, output_end=len(FACT), start=TEXT.index(FACT), end=TEXT.index(FACT) + len(FACT), score=1.0
    )


def test_other_words_point_there_too_and_score_less() -> None:
    again = "At the Verdon library, a yearly revenue of 72028 dollars was reached."
    (passage,) = find_evidence(TEXT, again)
    assert "72,028 dollars" in TEXT[passage["start"] : passage["end"]]
    assert 0.6 <= passage["score"] < 1


@pytest.mark.parametrize(
    "output",
    [
        "The Verdon library annual revenue reached 91,500 dollars.",
        "The Ostrava refinery cargo weight came to 4,410 tonnes.",
        "Yes.",
        "The hall.",
        "",
        "  \n",
        "***",
    ],
)
def test_what_the_document_does_not_say_has_no_passage(output: str) -> None:
    assert find_evidence(TEXT, output) == []
    assert find_evidence("", output) == []


@pytest.mark.parametrize(
    ("text", "output", "piece", "passage"),
    [
        (
            "four passengers were treated for bruises.",
            "7 passengers were treated for bruises.",
            "7 passengers",
            "treated",
        ),
        ("All 27 people on site left unhurt.", "27 people were hurt.", "27 people were hurt.", "27 people"),
        ("140 kilograms of ammonia escaped.", '{"hours": 140}', "140", "140"),
        ("The bridge was not closed.", "The bridge was closed.", "The bridge", "not closed"),
    ],
)
def test_limits_that_the_documentation_names(text: str, output: str, piece: str, passage: str) -> None:
    ((claim, found),) = said(f"{FILLER}{text} {FILLER}", output)
    assert piece in claim
    assert passage in found


def test_a_field_of_one_frequent_word_is_not_looked_up() -> None:
    assert said(FILLER + "The Halden plant is old. " * 5, '{"plant": "Halden"}') == []


def test_a_sentence_of_two_facts_has_two_passages_in_the_documents_order() -> None:
    joined = (
        "Tea was served at the Tamar dam by 14 people, and the Verdon library annual revenue reached 72,028 dollars."
    )
    assert said(TEXT, joined) == [(joined, FACT), (joined, "Tea was served at the Tamar dam by 14 people.")]


def test_lists_are_looked_up_line_by_line() -> None:
    output = f"Summary:\r\n1. {FACT}\r\n2. Tea was served at the Tamar dam by 14 people.\r\n- Nothing else happened."
    pieces = [piece for piece, _ in said(TEXT.replace(". ", ".\r\n"), output)]
    assert pieces == [FACT, "Tea was served at the Tamar dam by 14 people."]


def test_no_passage_lies_in_what_was_cut_out_or_across_it() -> None:
    begin = TEXT.index(FACT)
    assert said(TEXT, FACT, unread=(begin - 20, begin + len(FACT) + 20)) == []
    assert said(TEXT, FACT, unread=(begin + len(FACT) + 1, len(TEXT) - 100)) == [(FACT, FACT)]
    assert said(TEXT, FACT, unread=(10, begin - 1)) == [(FACT, FACT)], "places behind it stay those of the whole text"
    assert said(TEXT, FACT, unread=(begin + 12, begin + 40)) == []


@pytest.mark.parametrize(
    ("fact", "filler", "output"),
    [
        (
            "北京图书馆的年度收入达到了七万二千元。",
            "委员会昨天在大厅里开会，没有人谈论天气。",
            "北京图书馆年度收入为七万二千元。",
        ),
        (
            "東京の図書館の年間収入は72028円に達した。",
            "委員会は月曜日に会議室で集まりました。",
            "図書館の年間収入は72028円だった。",
        ),
        (
            "Доход библиотеки Вердона достиг 72 028 долларов.",
            "Комитет собрался в зале в понедельник.",
            "Библиотека Вердона: 72 028.",
        ),
        (
            "L’été, la bibliothèque de Troyes a reçu 72.028 €.",
            "Le comité s'est réuni lundi. ",
            "La bibliothèque de Troyes reçut 72028 €.",
        ),
    ],
)  # fmt: skip
def test_other_scripts(fact: str, filler: str, output: str) -> None:
    text = f"{filler * 30}{fact}{filler * 30}"
    ((_, passage),) = said(text, output)
    begin = text.index(passage)
    assert text.index(fact) <= begin
    assert begin + len(passage) <= text.index(fact) + len(fact)
    assert 2 * len(passage) >= len(fact) - 4
    assert said(filler * 60, output) == []


def test_combining_marks_and_wide_digits_are_the_same_words() -> None:
    assert [fold(word) for word in split_words("CAFÉ １２,３４５").words] == ["café", "12345"]
    assert fold("Café") == "café"
    assert fold("12,410") == fold("12410") == fold("12'410") == fold("12.410") != fold("124.10")


def test_json_answers_are_looked_up_field_by_field() -> None:
    answer = {
        "library": {"name": "Verdon library", "annualRevenue": 72028},
        "served": ['"Tea" at the Tamar dam'],
        "certain": True,
        "missing": None,
        "cargo_weight": "4,410 tonnes",
    }
    for output in (json.dumps(answer), json.dumps(answer, indent=2), f"```json\n{json.dumps(answer, indent=1)}\n```"):
        assert said(TEXT, output) == [
            ("Verdon library", "Verdon library"),
            ("72028", "library annual revenue reached 72,028"),
            ('\\"Tea\\" at the Tamar dam', "Tea was served at the Tamar dam"),
        ]


@pytest.mark.parametrize(
    ("output", "units"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Smith paid 3.5, e.g. to J. Doe. He left.", ["Dr. Smith paid 3.5, e.g. to J. Doe.", "He left."]),
        ("It was 12. The next was 13.", ["It was 12.", "The next was 13."]),
        ("1. First\n2. Second. Third", ["First", "Second.", "Third"]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("今天下雨。明天晴！", ["今天下雨。", "明天晴！"]),
        ('{"a": ["One. Two.", 3, true], "b": {}}', ["One.", "Two.", "3"]),
        ('{"a": "broken', ['{"a": "broken']),
        ("[1, 2", ["[1, 2"]),
        ("---\n***\n", []),
    ],
)  # fmt: skip
def test_units_of_an_output(output: str, units: list[str]) -> None:
    assert [output[each.start : each.end] for each in units_of(output)] == units


@given(st.text(max_size=300), st.text(max_size=200), st.integers(0, 300), st.integers(0, 300))
def test_any_texts_give_places_inside_them(text: str, output: str, one: int, other: int) -> None:
    unread = (min(one, other, len(text)), min(max(one, other), len(text)))
    for cut in (None, unread):
        for each in find_evidence(text, output + text[:100], cut):
            assert 0 <= each["output_start"] < each["output_end"] <= len(output + text[:100])
            assert 0 <= each["start"] < each["end"] <= len(text)
            assert 0 < each["score"] <= 1
            assert cut is None or each["end"] <= cut[0] + 1 or each["start"] >= cut[1]


def test_the_demos_findings_point_to_their_own_passages() -> None:
    found, planted = demo_score()
    assert planted == 48
    assert found >= 0.95 * planted


def test_facts_in_a_long_document_have_their_places() -> None:
    text, claims = make_case(Random(0), "")
    tallies: dict[str, Tally] = defaultdict(Tally)
    begun = time.process_time()
    judge(text, claims, 0.6, tallies)
    assert time.process_time() - begun < 5, "600 KB and 100 sentences: half a second where nothing else runs"
    for kind, recall in (("copied", 1.0), ("reworded", 0.9), ("two in a sentence", 0.9)):
        assert tallies[kind].found >= recall * tallies[kind].places > 0
        assert tallies[kind].right >= 0.95 * tallies[kind].passages
    for kind in ("other number", "not in the document"):
        assert tallies[kind].answered <= 0.3 * tallies[kind].claims


def test_white_space_costs_no_time() -> None:
    begun = time.process_time()
    units_of(" " * 100_000 + "a." + "\n " * 50_000 + "```json\n" + " " * 50_000 + "```")
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("output", ["\n```", '\n\n```json {"a": 1}```', "```", "``` ```", "\n```\n```\n"])
def test_fences_without_a_line_of_their_own(output: str) -> None:
    assert isinstance(find_evidence("A text. It says a: 1.", output), list | tuple)
