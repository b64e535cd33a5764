"""jobs.audit: what is compared, what is counted, what is recommended, and the page."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.audit.__main__ import main
from jobs.audit.advice import recommend
from jobs.audit.figures import Crossover, crossover, mean, share, unseen
from jobs.audit.likeness import exact_match, rouge_l, words
from jobs.audit.measure import Point, Reference, check_reference, likeness_of, same_tokens
from jobs.audit.options import Limits, options_of, parser
from jobs.audit.page import differs_where, verdict
from jobs.audit.results import ROWS, SCHEMA, read_audit
from jobs.audit.sample import choose
from pipeline.engine import Completion
from pipeline.errors import JobError
from pipeline.source import find_files, list_documents
from stem_core.estimators import ESTIMATORS
from tools.faults.corpus import write_model

ROOT = Path(__file__).parents[2]
READER = ROOT / "models" / "tiny-reader"
REPORT = (ROOT / "examples" / "documents" / "report-01.txt").read_text(encoding="utf-8")
# Small blocks, so that documents of a few hundred tokens have enough of them.
SMALL = (
    "--block-size 16 --stride 4 --dense-layers 0 --dense-below 0 --dense-tail 0 --sink-blocks 1 "
    "--local-blocks 1 --device cpu --max-new-tokens 12 --lengths"
)
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> {{ 7 * 7 }} </pre><b>'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    for i, characters in enumerate((900, 1300, 1800, 2400, 3100)):
        (folder / f"{i}.txt").write_text(REPORT[1000 * i : 1000 * i + characters], encoding="utf-8")
    return folder


def audit(documents: Path, model: Path, output: Path, flags: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Exit code, figures and rows."""
    code = main(
        ["--input", str(documents), "--model", str(model), "--output", str(output), *SMALL.split(), *shlex.split(flags)]
    )
    _, found = read_audit(output)
    return code, found, pq.read_table(output / ROWS).to_pylist()


def arm_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(arm for arm in found["arms"] if arm["arm"] == name)


# -- the whole of it


def test_rows_figures_and_page_of_an_audit(
    documents: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, rows = audit(
        documents,
        model,
        tmp_path,
        "--budget 0.3 --sample 3 --lengths 100 200 100000 --kl-tokens 5",
    )
    assert code == 0
    assert [arm["arm"] for arm in found["arms"]] == ["dense-fp32", "sampled@0.3-fp32", "release@0.3-fp32"]
    assert pq.read_schema(tmp_path / "rows.parquet").equals(SCHEMA)
    assert len(rows) == 3 * 3
    assert len({(row["arm"], row["document_id"]) for row in rows}) == 9
    for row in rows:
        assert row["status"] == "ok"
        assert row["first_token_seconds"] == row["prefill_seconds"] > 0
        assert row["decode_step_ms"] == pytest.approx(1000 * row["decode_seconds"] / (row["output_tokens"] - 1))
        if row["preset"] == "dense":
            # Its second run against its first.
            assert (row["density"], row["attention"]) == (1.0, "dense")
            assert (row["exact_match"], row["rouge_l"], row["same_tokens"]) == (True, 1.0, row["output_tokens"])
            assert row["first_token_kl"] is None
        else:
            assert (row["density"], row["attention"]) == (pytest.approx(0.3, abs=0.05), "stem")
            assert row["compared_tokens"] == 5
            assert row["answer_kl"] > 0
    # The same prompts for every arm.
    assert len({(row["document_id"], row["prompt_tokens"]) for row in rows}) == 3
    dense = found["arms"][0]
    lengths = [point["prompt_tokens"] for point in dense["curve"]]
    assert lengths == sorted({100, 200} | set(found["sample"]["prompt_tokens"]))
    assert dense["documents_per_hour"] == pytest.approx(3600 * 3 / dense["seconds"])
    assert dense["decode_step_alone"]["prompt_tokens"] == max(found["sample"]["prompt_tokens"])
    assert found["sample"]["of"] == 5
    assert "python -m jobs.audit" in found["command"]
    out = capsys.readouterr().out
    for name in ("dense-fp32", "sampled@0.3-fp32", "release@0.3-fp32", found["advice"]["headline"][:30]):
        assert name in out
    page = " ".join((tmp_path / "audit.html").read_text(encoding="utf-8").split())
    assert f"Asked of each document: &#34;{found['question']}&#34;" in page
    assert "1 document as long as the longest prompt" in page
    assert "1 documents" not in page
    assert "95% interval" in out
    figures_file = tmp_path / "audit.json"
    for pair, steady in (([1.0, 9.0], False), ([1.0, 1.0], True)):
        found["arms"][0]["repeat_seconds"] = pair
        for arm in found["arms"][1:]:
            arm["repeat_seconds"] = [1.0, 1.0]
        figures_file.write_text(json.dumps(found), encoding="utf-8")
        assert main(["--report", str(tmp_path)]) == 0
        page = (tmp_path / "audit.html").read_text(encoding="utf-8")
        assert ("Crossover on this device" in page) == steady
        assert ("cannot be told" in page) == (not steady)
    (tmp_path / "audit.html").unlink()
    assert main(["--report", str(tmp_path)]) == 0
    assert (tmp_path / "audit.html").read_text(encoding="utf-8") == page


def test_an_arm_that_drops_nothing_is_dense(documents: Path, model: Path, tmp_path: Path) -> None:
    _, found, rows = audit(documents, model, tmp_path, "--preset release --budget 1.0 --sample 2 --block-size 128")
    same = [row for row in rows if row["arm"] == "release@1-fp32"]
    for row in same:
        assert (row["first_token_kl"], row["answer_kl"], row["token_agreement"]) == (0.0, 0.0, 1.0)
        assert (row["rouge_l"], row["exact_match"], row["first_token_agrees"]) == (1.0, True, True)
        assert "budget covers all" in row["attention_reason"]
    assert found["advice"]["verdict"] in ("stay", "none")  # none where the machine is too busy for steady times
    assert "not tried at all" in found["advice"]["reasons"][0][1]


def test_a_selection_that_is_bad_on_purpose_agrees_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "documents").mkdir()
    for i in range(2):
        before, after = REPORT[3000 * i : 3000 * i + 1500], REPORT[3000 * i + 1500 : 3000 * i + 3000]
        text = f"{before} Key finding: the {i + 3} towers of Norwich lean by {i + 2} metres. {after}"
        (tmp_path / "documents" / f"{i}.txt").write_text(text, encoding="utf-8")
    flags = "--preset sampled --budget 0.35 --question 'List the key findings in order.'"

    def agreement(name: str) -> tuple[float, float]:
        _, found, _ = audit(tmp_path / "documents", READER, tmp_path / name, flags)
        arm = arm_of(found, "sampled@0.35-fp32")
        return arm["token_agreement"]["mean"], arm["answer_kl"]["mean"]

    good = agreement("good")
    right = ESTIMATORS["sample"].scores

    def upside_down(*args: Any, **kwargs: Any) -> torch.Tensor:
        scores = right(*args, **kwargs)
        return torch.where(scores.isfinite(), -scores, scores)

    monkeypatch.setattr(ESTIMATORS["sample"], "scores", upside_down)
    bad = agreement("bad")
    assert good[0] > 0.9
    assert bad[0] < good[0] - 0.1
    assert bad[1] > 10 * good[1]


def test_known_answers_are_woven_into_the_documents_and_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What dense attention finds of them, a selection that is bad on purpose loses."""
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/a.txt").write_text(REPORT[:7000], encoding="utf-8")
    right = ESTIMATORS["oam"].scores

    def upside_down(*args: Any, **kwargs: Any) -> torch.Tensor:
        scores = right(*args, **kwargs)
        return torch.where(scores.isfinite(), -scores, scores)

    monkeypatch.setattr(ESTIMATORS["oam"], "scores", upside_down)
    _, found, _ = audit(tmp_path / "documents", READER, tmp_path / "out", "--preset release --budget 0.3 --known 1")
    assert (found["known"], found["why_none"]) == (1, "")
    dense, arm = (each["known"] for each in found["arms"])
    assert dense["lookups"]["dense"] > 0.7
    assert (dense["lookups"]["mean"], dense["lookups"]["n"]) == (0.0, arm["lookups"]["n"])
    assert arm["lookups"]["mean"] < -0.3
    assert found["advice"]["verdict"] != "use"
    assert "lookups" in (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")


def test_the_most_exact_dense_is_the_measure_of_every_precision(documents: Path, model: Path, tmp_path: Path) -> None:
    flags = "--preset release --budget 0.3 --precision fp8 fp32 --sample 2 --block-size 32"
    code, found, rows = audit(documents, model, tmp_path, flags)
    names = ["dense-fp32", "release@0.3-fp32", "dense-fp8", "release@0.3-fp8"]
    assert [arm["arm"] for arm in found["arms"]] == names
    assert (code, found["refused"]) == (0, [])
    fp8 = arm_of(found, "dense-fp8")
    assert fp8["answer_kl"]["mean"] > 0
    assert fp8["first_token_vs_dense"] == 1.0
    assert arm_of(found, "release@0.3-fp8")["plan"]["bytes_per_token"] < found["arms"][0]["plan"]["bytes_per_token"]
    assert {row["precision"] for row in rows} == {"fp32", "fp8"}


def test_an_arm_that_cannot_run_is_named_and_the_others_are_not_lost_with_it(
    documents: Path, model: Path, tmp_path: Path
) -> None:
    """The scores of sampled queries take no heads of 16 in fp8."""
    flags = "--preset sampled --budget 0.3 --precision fp8 fp32 --sample 1 --block-size 32"
    code, found, _ = audit(documents, model, tmp_path, flags)
    assert code == 2
    assert [arm["arm"] for arm in found["arms"]] == ["dense-fp32", "sampled@0.3-fp32", "dense-fp8"]
    assert [name for name, _ in found["refused"]] == ["sampled@0.3-fp8"]
    assert "heads of at least 32" in (tmp_path / "audit.html").read_text(encoding="utf-8")


def test_random_weights_are_timed_and_not_judged(documents: Path, model: Path, tmp_path: Path) -> None:
    flags = f"--load-format dummy --tokenizer {READER} --preset release --budget 0.3 --sample 2"
    _, found, rows = audit(documents, model, tmp_path, flags)
    assert found["advice"]["verdict"] == "none"
    # Nothing ends such an output early, and it is shown as ids.
    assert {row["output_tokens"] for row in rows} == {12}
    assert all(word.isdigit() for row in rows for word in row["output"].split())
    assert "random" in (tmp_path / "audit.html").read_text(encoding="utf-8")


def test_documents_that_cannot_be_compared_are_named(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "blank.txt").write_text("   ", encoding="utf-8")
    (folder / "long.txt").write_text(REPORT, encoding="utf-8")
    (folder / "fits.txt").write_text(REPORT[:900], encoding="utf-8")
    _, found, rows = audit(folder, model, tmp_path / "out", "--preset release --max-context 800")
    assert {row["document_id"] for row in rows} == {"fits.txt"}
    left_out = dict(found["sample"]["left_out"])
    assert left_out.keys() == {"blank.txt", "long.txt"}
    assert "blank" in left_out["blank.txt"]
    assert "the limit is 788" in left_out["long.txt"]
    (folder / "fits.txt").unlink()
    with pytest.raises(JobError, match="none of the documents drawn can be compared"):
        audit(folder, model, tmp_path / "out", "--max-context 800")


def test_a_job_file_is_audited_as_it_is(documents: Path, model: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"input: {documents}\nmodel: {model}\npreset: sampled\nbudget: 0.4\nblock_size: 32\nmax_new_tokens: 7\n"
        "temperature: 0.7\nworkers: 3\noutput: elsewhere\nquestion: Why?\n"
    )
    flags = parser("").parse_args(["--config", str(job), "--output", str(tmp_path / "out"), "--device", "cpu"])
    options = options_of(flags)
    assert [arm.name for arm in options.arms] == ["dense-fp32", "sampled@0.4-fp32"]
    attention = options.arms[1].config.attention
    assert attention is not None
    assert (attention.estimator, attention.block_size, attention.density) == ("sample", 32, 0.4)
    assert (options.job.question, options.job.max_new_tokens, options.job.temperature) == (("Why?",), 7, 0.0)
    assert options.output == tmp_path / "out"
    flags.preset, flags.budget = ["release", "paper"], [0.2, 0.3]
    names = [arm.name for arm in options_of(flags).arms]
    assert names == ["dense-fp32", *(f"{p}@{b}-fp32" for p in ("release", "paper") for b in (0.2, 0.3))]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sample 0", "--sample must be at least 1"),
        ("--known -3", "--known must be at least 0, got -3"),
        ("--show -1", "--show must be at least 0, got -1"),
        (f"--output {__file__}", "test_audit.py is a file; give a folder"),
        (f"--output {__file__}/audit", "test_audit.py is a file; give a folder"),
        ("--essay nowhere.txt", "--essay nowhere.txt: it cannot be read: No such file or directory; give a text file"),
        ("--least-rouge 2", "--least-rouge must lie in 0..1"),
        ("--preset relaese", "invalid choice"),
        ("--load-format dummy --model llama-3.1-8b", "needs a folder with a config.json: .*No such file"),
        ("--workers 3", "--workers is a flag of jobs.summarize, and none of this command"),
        ("--report nowhere", "it holds no audit"),
        ("--block-size 17", "--block-size must be one of 16, 32"),
        ("--model nowhere/here/at-all", "does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(flags: str, message: str, documents: Path, model: Path, tmp_path: Path) -> None:
    given = ["--input", str(documents), "--model", str(model), "--output", str(tmp_path), "--device", "cpu"]
    with pytest.raises(JobError, match=message):
        main([*given, *flags.split()])


def test_the_page_says_which_of_several_questions_was_asked(documents: Path, model: Path, tmp_path: Path) -> None:
    flags = ("--sample", "1", "--preset", "sampled", "--known", "0", "--lengths", "--max-new-tokens", "4")
    given = ["--input", str(documents), "--model", str(model), "--output", str(tmp_path), "--device", "cpu", *flags]
    assert main([*given, "--question", "Why?", "--question", "Who?"]) == 0
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "Asked of each document, the first of 2 questions: &#34;Why?&#34;" in page


# -- the page


def test_hostile_documents_are_text_on_the_page(model: Path, tmp_path: Path, open_page: Callable[..., Any]) -> None:
    source = tmp_path / "in.jsonl"
    lines = [{"id": f"{HOSTILE} {i}", "text": HOSTILE + REPORT[: 900 + 300 * i]} for i in range(2)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    output = tmp_path / "out"
    _, found, rows = audit(source, model, output, "--preset release --budget 0.3 --lengths 100 200")
    # A model may well repeat what it read.
    for row in rows:
        row["output"] += HOSTILE if row["preset"] == "dense" else HOSTILE[::-1]
        row["exact_match"] = row["preset"] == "dense"
    pq.write_table(pq.read_table(output / "rows.parquet").from_pylist(rows, SCHEMA), output / "rows.parquet")
    assert main(["--report", str(output)]) == 0
    html = (output / "audit.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    for width in (390, 1280):
        seen = open_page(output / "audit.html", width=width)
        assert HOSTILE in seen.text
        assert HOSTILE[::-1] in seen.text
        assert "49" not in seen.text.split("Documents that differ most")[1].split("\nTime\n")[0].replace(HOSTILE, "")
        assert len(seen.charts) == 3


def test_the_verdict_in_plain_words() -> None:
    dense = {"arm": "dense-bf16", "preset": "dense", "documents_per_hour": 100.0}
    same, alike = {"mean": 0.75, "documents": 20}, {"mean": 0.953, "documents": 20}
    stem = dense | {"arm": "a", "preset": "sampled", "density": 0.3, "exact_match": same, "rouge_l": alike}
    found = {"arms": [dense, stem | {"documents_per_hour": 210.0}], "advice": {"verdict": "use", "arm": "a"}}
    told = verdict(found)
    for part in ("Yes, switch", "skips 70%", "2.10 times the work", "15 of 20 outputs", "95.3% of the words"):
        assert part in told, told
    hardly = {"documents_per_hour": 104.0, "rouge_l": {"mean": 0.996, "documents": 20}}
    told = verdict(found | {"arms": [dense, stem | hardly]})
    for part in ("1.04 times the work", "15 of 20 outputs", "99.6% of the words"):  # not 1.0 times, nor 100%
        assert part in told, told
    assert "in full" in verdict(found | {"advice": {"verdict": "stay"}})
    assert "still open" in verdict(found | {"advice": {"verdict": "none"}})


# -- what is counted


def test_likeness_is_exact_for_the_same_and_right_for_others() -> None:
    same = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert likeness_of(same, same.clone()) == likeness_of(same, same)
    found = likeness_of(same, same)
    assert (found.first_token_kl, found.answer_kl, found.token_agreement, found.first_token_agrees) == (0, 0, 1, True)
    p, q = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.7, 0.1, 0.1, 0.1]]), torch.tensor([[0.25, 0.5, 0.25, 0.0]] * 2)
    found = likeness_of(q.log(), p.log())
    assert found.first_token_kl == pytest.approx(0.25 * math.log(2))
    # The arm excludes a token that the reference allows.
    assert math.isinf(found.answer_kl)
    assert (found.first_token_agrees, found.token_agreement, found.compared_tokens) == (False, 0.0, 2)


@pytest.mark.parametrize(
    ("text", "reference", "wanted"),
    [
        # As rouge_score 0.1.2 has them, rougeL's fmeasure without stemming.
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("The cat sat, on the mat.", "the cat lay on a mat", 2 / 3),
        ("a b c", "a b c", 1.0),
        ("a b c", "x y", 0.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        # Words of scripts that rouge_score's own tokeniser drops.
        ("Собака спит", "Собака не спит", 0.8),
        ("会议定于周五", "会议定于周六", 10 / 12),
    ],
)
def test_rouge_l(text: str, reference: str, wanted: float) -> None:
    assert rouge_l(text, reference) == pytest.approx(wanted)


def test_words_and_exact_match() -> None:
    assert words("It's 3,5 °C — in_Köln.") == ["it", "s", "3", "5", "c", "in", "köln"]
    assert exact_match("a b\n", " a b")
    assert not exact_match("a b", "A b")
    assert [same_tokens([1, 2, 3], other) for other in ([1, 2, 3], [1, 2], [1, 9, 3], [])] == [3, 2, 1, 0]


def test_the_sample_is_seeded_and_spread_over_lengths(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).permutation(40) * 10 + 10
    for i, size in enumerate(sizes):
        (tmp_path / f"{i:02}.txt").write_text("x" * int(size))
    catalogue = list_documents(find_files((str(tmp_path),))[0])
    chosen = choose(catalogue, 8, seed=1)
    assert chosen == choose(catalogue, 8, seed=1) != choose(catalogue, 8, seed=2)
    assert [(int(size) - 10) // 50 for size in sizes[chosen]] == list(range(8))
    catalogue.errors[chosen[0]] = "broken"
    assert chosen[0] not in choose(catalogue, 40, seed=1)
    assert len(choose(catalogue, 100, seed=1)) == 39


def test_intervals() -> None:
    # Wilson (1927) for 8 of 8 and 3 of 8.
    assert (share([True] * 8).low, share([True] * 8).high) == (pytest.approx(0.6756, abs=1e-4), 1.0)
    some = share([True] * 3 + [False] * 5)
    assert (some.low, some.high) == (pytest.approx(0.1368, abs=1e-4), pytest.approx(0.6943, abs=1e-4))
    assert mean([1.0, 0.0, 1.0]) == replace(mean([1.0, 0.0, 1.0]), low=None, high=None)
    wide = mean([0.9, 0.5, 1.0, 0.7, 0.8, 0.6])
    assert wide.low is not None
    assert wide.high is not None
    assert 0.5 < wide.low < wide.mean < wide.high < 1.0
    assert (share([False] * 5).low, share([False] * 5).high) == (0.0, pytest.approx(0.4345, abs=1e-4))
    assert unseen(8, 10**6) == pytest.approx(0.3123, abs=1e-4)
    assert unseen(60, 10**6) == pytest.approx(0.0487, abs=1e-4)
    assert unseen(5, 6) == pytest.approx(1 / 6)


def test_where_an_output_differs_reads_right() -> None:
    assert [differs_where(equal) for equal in (0, 1, 1200)] == [
        "differs from the first token on", "differs after 1 equal token", "differs after 1,200 equal tokens",
    ]  # fmt: skip


def points(seconds: dict[int, float], sparse: bool = True) -> list[Point]:
    return [Point(length, value, 0.3, sparse) for length, value in seconds.items()]


@pytest.mark.parametrize(
    ("sparse", "wanted"),
    [
        ({4: 2.0, 8: 3.0, 16: 3.9, 32: 7.0}, Crossover(16, 8, 4)),
        ({4: 0.9, 8: 1.9, 16: 3.9, 32: 7.0}, Crossover(4, None, 4)),
        # Slower again further on: the crossover lies behind that.
        ({4: 0.9, 8: 2.5, 16: 3.9, 32: 7.0}, Crossover(16, 8, 4)),
        ({4: 2.0, 8: 3.0, 16: 5.0, 32: 9.0}, Crossover(None, 32, 4)),
        # Within the noise of a measurement is not slower; a length that dense did not run does not count.
        ({8: 2.03, 16: 4.0, 64: 99.0}, Crossover(8, None, 8)),
        ({}, Crossover(None, None, None)),
    ],
)
def test_crossover(sparse: dict[int, float], wanted: Crossover) -> None:
    dense = points({4: 1.0, 8: 2.0, 16: 4.0, 32: 8.0}, sparse=False)
    assert crossover(points(sparse), dense) == wanted
    # Prompts that an arm read densely are not its.
    assert crossover([*points(sparse), *points({2: 50.0}, sparse=False)], [*dense, *points({2: 1.0})]) == wanted


def completion(tokens: list[int]) -> Completion:
    return Completion("a", "ok", token_ids=tokens)


def test_dense_that_contradicts_itself_is_refused() -> None:
    log_probs = torch.full((4, 9), -9.0)
    for row, token in enumerate([5, 6, 7, 8]):
        log_probs[row, token] = -0.1
    reference = Reference({"a": [5, 6, 7, 8]}, log_probs={"a": log_probs})
    check_reference(reference, {"a": completion([5, 6, 7, 8])}, "fp32")
    with pytest.raises(JobError, match="twice"):
        check_reference(reference, {"a": completion([5, 6, 1, 8])}, "bf16")
    log_probs[2, 1] = -0.3  # a tie in bf16, none in fp32
    check_reference(reference, {"a": completion([5, 6, 1, 8])}, "bf16")
    with pytest.raises(JobError, match="twice"):
        check_reference(reference, {"a": completion([5, 6, 1, 8])}, "fp32")
    with pytest.raises(JobError, match="oom"):
        check_reference(reference, {"a": replace(completion([]), status="oom")}, "fp32")
    log_probs[1, 3] = 0.0 + 1.0  # what it wrote is not what it puts first when it reads it
    with pytest.raises(JobError, match="twice"):
        check_reference(reference, {"a": completion([5, 6, 7, 8])}, "bf16")


# -- what is recommended


def figures(name: str, hours: float, agreement: float, rouge: float, **changes: Any) -> dict[str, Any]:
    preset, _, precision = name.partition("-")

    def over(value: float) -> dict[str, Any]:
        return {"mean": value, "low": value - 0.04, "high": min(1.0, value + 0.04), "documents": 24}

    return {
        "arm": name,
        "preset": preset,
        "budget": None,
        "precision": precision,
        "documents": 24,
        "failed": 0,
        "sparse_documents": 0 if preset == "dense" else 24,
        "density": 1.0 if preset == "dense" else 0.3,
        "documents_per_hour": hours,
        "first_token_vs_reference": hours / 100,
        "repeat_seconds": (1.0, 1.01),
        "token_agreement": over(agreement),
        "rouge_l": over(rouge),
        "known": known(0.0),
    } | changes


def known(lost: float, half: float = 0.05, dense: float = 0.9, name: str = "lookups") -> dict[str, Any]:
    gap = {"dense": dense, "mean": -lost, "low": -lost - half, "high": half - lost, "n": 64, "documents": 8}
    return {name: gap}


DENSE = figures("dense-bf16", 100, 1.0, 1.0)


@pytest.mark.parametrize(
    ("others", "verdict", "arm"),
    [
        ([figures("release-bf16", 180, 0.99, 0.97), figures("sampled-bf16", 150, 1.0, 1.0)], "use", "release-bf16"),
        # The faster one differs too much, by either measure.
        ([figures("release-bf16", 180, 0.90, 0.97), figures("sampled-bf16", 150, 1.0, 1.0)], "use", "sampled-bf16"),
        ([figures("release-bf16", 180, 0.99, 0.70), figures("sampled-bf16", 150, 1.0, 1.0)], "use", "sampled-bf16"),
        # Equally fast: the closer one.
        ([figures("release-bf16", 151, 0.97, 0.95), figures("sampled-bf16", 150, 1.0, 1.0)], "use", "sampled-bf16"),
        # Precision alone is an answer too.
        ([figures("release-bf16", 180, 0.5, 0.2), figures("dense-fp8", 160, 0.98, 0.95)], "use", "dense-fp8"),
        # None is like dense; none is faster; noise is not speed.
        ([figures("release-bf16", 180, 0.5, 0.2)], "stay", "dense-bf16"),
        ([figures("release-bf16", 60, 1.0, 1.0)], "stay", "dense-bf16"),
        ([figures("release-bf16", 102, 1.0, 1.0)], "stay", "dense-bf16"),
        # What failed or was never sparse is not recommended, however fast.
        ([figures("release-bf16", 180, 1.0, 1.0, failed=1)], "stay", "dense-bf16"),
        # The same work took 1.2 times as long before: 1.15 times is not faster, 1.3 times is.
        ([figures("release-bf16", 115, 1.0, 1.0, repeat_seconds=(1.2, 1.0))], "stay", "dense-bf16"),
        ([figures("release-bf16", 130, 1.0, 1.0, repeat_seconds=(1.2, 1.0))], "use", "release-bf16"),
        ([figures("release-bf16", 180, 1.0, 1.0, sparse_documents=0)], "stay", "dense-bf16"),
        ([figures("release-bf16", 180, 1.0, 1.0, token_agreement=None, rouge_l=None)], "stay", "dense-bf16"),
        ([], "stay", "dense-bf16"),
    ],
)
def test_recommendation(others: list[dict[str, Any]], verdict: str, arm: str) -> None:
    found = recommend([DENSE, *others], Limits(), 500)
    assert (found.verdict, found.arm) == (verdict, arm)
    assert arm.partition("-")[0] in found.headline
    assert f"--precision {arm.partition('-')[2]}" in found.flags
    assert len(found.reasons) == len(others)
    # It says how few documents there were, and what they cannot show.
    assert any("24 of 500 documents were compared" in text and "12%" in text for text in found.caveats)


def test_the_headline_is_true_of_what_was_not_tried_and_of_two_runs_of_dense() -> None:
    """An arm that read every document densely did not write other outputs, and dense is not unlike itself."""
    untried = figures("release-bf16", 180, 1.0, 1.0, sparse_documents=0)
    found = recommend([DENSE, untried], Limits(), 500)
    assert "so Stem was not tried at all" in found.headline
    assert "other outputs" not in found.headline
    both = recommend([DENSE, untried, figures("sampled-bf16", 180, 0.5, 0.2)], Limits(), 500)
    assert "writes other outputs" in both.headline
    few = {"mean": 1.0, "low": 0.3, "high": 1.0, "documents": 2}
    caveats = recommend([DENSE | {"rouge_l": few}, untried], Limits(), 500).caveats
    assert not any("95% interval" in text for text in caveats)


def test_what_loses_known_answers_is_never_recommended() -> None:
    """However fast and like dense its outputs are; a loss where dense finds nothing itself is none."""
    lossy = figures("release-bf16", 300, 1.0, 1.0, known=known(0.2))
    alone = recommend([DENSE, lossy], Limits(), 500)
    assert (alone.verdict, alone.arm) == ("stay", "dense-bf16")
    assert "not recommended: it loses 20 points of lookups, of which dense finds 90% (64 asked;" in alone.reasons[0][1]
    assert "loses known answers" in alone.headline
    beside = recommend([DENSE, lossy, figures("sampled-bf16", 150, 0.97, 0.95)], Limits(), 500)
    assert (beside.verdict, beside.arm) == ("use", "sampled-bf16")
    asked = figures("release-bf16", 300, 1.0, 1.0, known=known(0.2, name="questions"))
    assert recommend([DENSE, asked], Limits(), 500).verdict == "stay"
    hopeless = figures("release-bf16", 300, 1.0, 1.0, known=known(0.2, dense=0.3))
    found = recommend([figures("dense-bf16", 100, 1.0, 1.0, known=known(0.0, dense=0.3)), hopeless], Limits(), 500)
    assert found.verdict == "use"
    assert any("Nothing is known of lookups" in text and "does not find them" in text for text in found.caveats)
    no_text = recommend([DENSE | {"known": {}}, hopeless | {"known": {}}], Limits(), 500, why_none="too short")
    assert any("sparse attention loses first: too short" in text for text in no_text.caveats)


def test_too_few_documents_recommend_nothing() -> None:
    few = {"mean": 1.0, "low": 0.8, "high": 1.0, "documents": 8}
    arm = figures("sampled-bf16", 150, 1.0, 1.0, rouge_l=few)
    found = recommend([DENSE, arm], Limits(), 500)
    assert (found.verdict, found.arm, found.flags) == ("none", "sampled-bf16", "")
    assert found.headline.startswith("Not enough documents to recommend preset sampled")
    assert "8 were compared, 20 are needed (--sample 20)" in found.headline
    assert "not enough documents" in found.reasons[0][1]
    assert recommend([DENSE, arm], Limits(), 8).verdict == "use"  # all there are
    unseen_loss = figures("sampled-bf16", 150, 1.0, 1.0, known=known(0.0, half=0.3))
    found = recommend([DENSE, unseen_loss], Limits(), 500)
    assert (found.verdict, found.flags) == ("none", "")
    assert "up to 30 points of lookups may be lost unseen in 8 documents" in found.headline


def test_what_a_recommendation_says_of_its_doubts() -> None:
    limits = Limits(agreement=0.95, rouge=0.9)
    sure = recommend([DENSE, figures("sampled-bf16", 150, 1.0, 1.0)], limits, 24)
    assert not any("interval" in text for text in sure.caveats)
    assert sure.caveats[1].startswith("All 24 documents")
    assert "by up to 1.01x" in sure.caveats[0]
    busy = recommend([DENSE, figures("sampled-bf16", 300, 1.0, 1.0, repeat_seconds=(2.0, 5.0))], limits, 8)
    assert (busy.verdict, busy.flags) == ("none", "")
    assert "by 2.50x" in busy.headline
    open_one = recommend([DENSE, figures("sampled-bf16", 150, 0.96, 1.0, sparse_documents=5)], limits, 500)
    assert any("0.920 to 1.000" in text and "reaches below 0.95" in text for text in open_one.caveats)
    assert any("read 19 of 24 documents densely" in text for text in open_one.caveats)
    strict = recommend([DENSE, figures("sampled-bf16", 150, 0.96, 1.0)], Limits(agreement=0.99), 500)
    assert strict.verdict == "stay"
    assert "96.0%" in strict.reasons[0][1]
    budget = recommend([DENSE, figures("sampled-bf16", 150, 1.0, 1.0, budget=0.25)], limits, 500)
    assert budget.flags == "--preset sampled --budget 0.25 --precision bf16"
    dummy = recommend([DENSE, figures("sampled-bf16", 150, 0.0, 0.0)], limits, 500, random_weights=True)
    assert (dummy.verdict, dummy.arm, dummy.flags) == ("none", "", "")
    assert dummy.reasons[0][0] == "sampled-bf16"
    assert "1.50 times" in dummy.reasons[0][1]
