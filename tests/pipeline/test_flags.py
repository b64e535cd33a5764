"""Flags: each is raised by texts that deserve it, and not by texts that look like them."""
# ruff: noqa: RUF001

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.demo.scoring import read_findings
from pipeline.imports import ROOT
from pipeline.review.flags import FLAGS, find_flags, is_repetitive
from pipeline.review.refusals import is_refusal

ENGLISH = (ROOT / "examples/documents/newton-opticks.txt").read_text(encoding="utf-8")
GERMAN = (
    "Der Ausschuss hat gestern im Rathaus getagt und über die Kosten der neuen Brücke gesprochen. Niemand wusste, wie "
    "lange der Bau dauern wird, weil die Pläne noch nicht fertig sind. "
)
FRENCH = "Le comité s'est réuni hier à la mairie et a parlé longuement du coût du nouveau pont sur la rivière."
JAPANESE = "委員会は昨日市役所で会議を開き、新しい橋の費用について話し合いました。"
CHINESE = "委员会昨天在市政厅开会，讨论了新桥的费用。没有人知道工程需要多长时间，因为计划还没有完成。"
PASSAGE = ENGLISH[4000:4600]


def flags(output: str, text: str = ENGLISH, finish_reason: str = "stop") -> list[str]:
    return find_flags(text, output, finish_reason)


def test_how_an_output_ended() -> None:
    assert flags("The light is refracted", finish_reason="length") == ["cut"]
    assert flags("The light is refracted.") == []
    assert flags(" \n\t") == ["empty"]
    assert flags("", finish_reason="length") == ["cut", "empty"]
    assert flags("0") == []
    assert set(FLAGS) == {"cut", "empty", "refused", "repetitive", "other_language", "copied"}


@pytest.mark.parametrize(
    "output",
    [
        "I cannot help with that.",
        "I can’t assist with this request.",
        "I'm sorry, but I can't summarize this document.",
        "I am unable to access the document.",
        "Sorry, I don't have access to the file.",
        "**Unfortunately**, I cannot provide a summary.",
        "As an AI language model, I have no opinions.",
        "It seems that you haven't provided the document.",
        "Please provide the document you want summarised.",
        "Es tut mir leid, aber ich kann diese Frage nicht beantworten.",
        "Je suis désolé, mais je ne peux pas répondre à cette question.",
        "Lo siento, pero no puedo ayudar con eso.",
        "很抱歉，我无法提供摘要。",
        "申し訳ありませんが、その質問にはお答えできません。",
    ],
)
def test_refusals(output: str) -> None:
    assert is_refusal(output)
    assert "refused" in flags(output)


@pytest.mark.parametrize(
    "output",
    [
        "I cannot stress enough how important the bridge is to the author.",
        "The manager said: I cannot help with that.",
        "The committee cannot provide the figures before May.",
        "Unfortunately, the bridge collapsed in 1907, and 75 people died.",
        "Sorry is the word that the report uses three times.",
        "You have not given way, the sign says.",
        "As an architect, Wren rebuilt fifty churches.",
        "Leider wurde die Brücke 1907 zerstört.",
        "Je ne sais quoi is the title.",
        "I do not have a dog, says the narrator.",
        "Please note that all figures are in dollars.",
        "抱歉这个词在报告中出现了三次。",
    ],
)
def test_no_refusals(output: str) -> None:
    assert not is_refusal(output)


@pytest.mark.parametrize(
    "output",
    [
        "The bridge was built in 1907. " * 8,
        "It began well. " + "and the cost of the bridge, " * 6,
        "no " * 40,
        "!" * 200,
        "\n".join(f"{number}. The bridge needs another inspection by the city." for number in range(1, 9)),
        "委员会昨天开会。" * 6,
        ENGLISH[3000:3400] * 3,
    ],
)
def test_loops(output: str) -> None:
    assert is_repetitive(output)
    assert "repetitive" in flags(output)


@pytest.mark.parametrize(
    "output",
    [
        ENGLISH[:6000],
        "very very very good",
        "The bridge was built in 1907. The bridge was built in 1907.",
        "\n".join(f"The bridge of lot {number} costs {number * 7} dollars." for number in range(30)),
        "| a | b |\n|---|---|\n" + "-" * 200,
        "\n".join(f"{number}." for number in range(40)),
        ("word " * 23).strip(),
        CHINESE,
        "",
    ],
)
def test_no_loops(output: str) -> None:
    assert not is_repetitive(output)


@pytest.mark.parametrize("output", [GERMAN, FRENCH, JAPANESE, CHINESE])
def test_another_language_than_the_documents(output: str) -> None:
    assert flags(output) == ["other_language"]
    own = {GERMAN: GERMAN * 20, FRENCH: FRENCH * 20, JAPANESE: JAPANESE * 40, CHINESE: CHINESE * 40}[output]
    assert "other_language" not in flags(output, text=own)
    assert "other_language" in flags(ENGLISH[5000:5300], text=own)


@pytest.mark.parametrize(
    "output",
    [
        "Nein, danke.",  # too short to tell
        "72,028; 14; 3.5; 1,000,000; 17; 18; 19; 20; 21; 22; 23; 24; 25; 26; 27; 28; 29",
        '{"revenue": 72028, "name": "Verdon", "place": "Tamar", "cargo": 4410, "unit": "tonnes"}',
        "def read(path):\n    return open(path).read()\n\nfor name in names:\n    print(read(name))",
        ENGLISH[9000:9400],
    ],
)
def test_no_other_language(output: str) -> None:
    assert "other_language" not in flags(output)


def test_a_document_in_several_languages_has_none_of_its_own() -> None:
    mixed = ENGLISH[:3000] + GERMAN * 40
    assert "other_language" not in flags(GERMAN, text=mixed)
    assert "other_language" not in flags(ENGLISH[5000:5400], text=mixed)


def test_copied_is_one_passage() -> None:
    assert flags(PASSAGE) == ["copied"]
    assert flags(" ".join(PASSAGE.split())) == ["copied"], "white space does not count"
    assert flags(f"It says: {PASSAGE}") == ["copied"]
    assert flags(PASSAGE[:150]) == [], "too short"
    assert flags(PASSAGE[:300] + ENGLISH[9000:9300]) == [], "two passages are a choice"
    assert flags(PASSAGE[:300] + " and that is why the author thinks otherwise " + PASSAGE[300:]) == []
    repeated = (ENGLISH[4200:4400] + " x ") * 60 + ENGLISH
    assert flags(PASSAGE, text=repeated) == [], "not found among so many beginnings"


def test_the_demos_outputs_have_none() -> None:
    for name, findings in read_findings(ROOT / "examples/findings.jsonl").items():
        text = (ROOT / "examples/documents" / name).read_text(encoding="utf-8")
        assert find_flags(text, "\n".join(findings), "stop") == []
    for path in sorted(Path(ROOT, "examples/documents").glob("*.txt")):
        assert find_flags(path.read_text(encoding="utf-8"), "None.", "stop") == []
