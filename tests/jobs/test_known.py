"""jobs.known: facts in texts, what models answer about them, and how sure the figures are."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from jobs.known.documents import Fact, weave
from jobs.known.estimates import estimate, mean, paired, wilson
from jobs.known.prompts import Tokenizer
from jobs.known.reader import comparison, likelihood
from jobs.known.results import ordered_recall, recall_of
from jobs.known.wording import REPORT, RULER, pick_style

MODEL = str(Path(__file__).parents[2] / "models/tiny-reader")


def test_weave_puts_facts_behind_sentences() -> None:
    filler = [f" Sentence {index}." for index in range(10)]
    text, spans = weave(filler, [Fact("Last fact.", 1.0), Fact("A fact of 12.", 0.0, "12"), Fact("Half.", 0.5)])
    assert text.startswith(" Sentence 0. A fact of 12. Sentence 1.")
    assert [text[first:last] for first, last in spans] == ["Last fact.", "12", "Half."]
    assert len(text) == sum(map(len, filler)) + len(" Last fact. A fact of 12. Half.")


def test_styles() -> None:
    assert pick_style("auto", 2048) is REPORT
    assert pick_style("auto", 128_256) is RULER
    assert pick_style("ruler", 2048) is RULER


def test_comparison_by_its_formula() -> None:
    torch.manual_seed(0)
    mine, theirs = torch.randn(600, 50), torch.randn(600, 50)
    p, q = theirs.double().softmax(-1), mine.double().softmax(-1)
    kl, same = comparison(mine, theirs)
    assert kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert same == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    targets = torch.randint(50, (600,))
    nll, first = likelihood(mine, targets)
    assert nll == pytest.approx(float(-q.log().gather(1, targets[:, None]).mean()), rel=1e-4)
    assert first == pytest.approx(float((q.argmax(-1) == targets).double().mean()))


def test_estimates() -> None:
    rng = Random(0)
    documents = [f"d{index // 5}" for index in range(100)]
    values = [float(rng.random() < 0.7) for _ in documents]
    found = estimate(values, documents)
    assert found.mean == pytest.approx(sum(values) / 100)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.mean < found.high
    assert (found.n, found.documents) == (100, 20)
    assert found == estimate(values, documents)
    # Questions of one document are one draw: the same answers in fewer documents tell less.
    few = estimate([value for value in (0.0, 1.0) for _ in range(50)], [f"d{index // 50}" for index in range(100)])
    assert (few.low, few.high) == (0.0, 1.0)


@pytest.mark.parametrize("n", [1, 4, 40, 200])
def test_intervals_have_a_width_where_all_answers_are_the_same(n: int) -> None:
    """A bootstrap has none there, and would call 4 right answers of 4 certain."""
    documents = [f"d{index // 2}" for index in range(n)]
    right, wrong = estimate([1.0] * n, documents), estimate([0.0] * n, documents)
    z2 = 1.959964**2
    assert (right.low, right.high) == (pytest.approx(n / (n + z2)), 1.0)
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(z2 / (n + z2)))
    for value in (0.0, 1.0):
        same = paired([value] * n, [value] * n, documents)
        assert (same.mean, same.low, same.high) == (0.0, pytest.approx(-z2 / (n + z2)), pytest.approx(z2 / (n + z2)))
    lost = paired([0.0] * n, [1.0] * n, documents)
    assert (lost.mean, lost.low, lost.high) == (-1.0, -1.0, pytest.approx(-n / (n + z2)))


def test_intervals_of_one_document_and_of_differences() -> None:
    assert estimate([1.0, 0.0, 1.0, 1.0], ["a"] * 4).low == pytest.approx(wilson(3, 4)[0])
    assert wilson(3, 4) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert mean([0.5, 0.7], ["a", "a"]).low is None
    two = mean([0.5, 0.7], ["a", "b"])
    assert (two.low, two.high) == (0.5, 0.7)
    # Paired: what both miss does not widen the interval of the difference.
    documents = [f"d{index}" for index in range(40)]
    others = [float(index % 2) for index in range(40)]
    values = [0.0 if index == 1 else other for index, other in enumerate(others)]
    gap = paired(values, others, documents)
    assert gap.mean == pytest.approx(-1 / 40)
    assert gap.low is not None
    assert gap.low == pytest.approx(-0.1)


def test_recall() -> None:
    assert recall_of("It is 123 and Ab.", ["123", "AB", "77"]) == pytest.approx(2 / 3)
    assert ordered_recall("1. 123\n2. 45\n3. 77", ["123", "45", "77"]) == 1.0
    assert ordered_recall("1. 45\n2. 123\n3. 77", ["123", "45", "77"]) == pytest.approx(2 / 3)
    assert ordered_recall("77, 45 and 123", ["123", "45", "77"]) == pytest.approx(1 / 3)
    assert ordered_recall("none", ["123"]) == 0.0


def test_prompts_ask_for_an_answer_without_thinking() -> None:
    """As those of a job: a template in the manner of Qwen 3 then closes the thinking itself."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}\n{% if enable_thinking is defined and enable_thinking is false %}"
        "<think></think>{% endif %}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: tokenizer)
        made = Tokenizer(MODEL)
    ids, _, begins = made.prompt("What is it?", "")
    assert (tokenizer.decode(ids), begins) == ("What is it?\n<think></think>", 0)
