"""jobs.evaluate: its documents, its arms against the product, its reader against the engine, its figures."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from jobs.evaluate.__main__ import main
from jobs.evaluate.answers import Answer, entries_of
from jobs.evaluate.arms import (
    EQUAL_DENSITY,
    Arm,
    Place,
    attention_mass,
    block_size_for,
    make_arms,
    random_scores,
    window_scores,
)
from jobs.evaluate.attention import prepare_model
from jobs.evaluate.documents import Fact, weave
from jobs.evaluate.engine_reader import engine_arms
from jobs.evaluate.haystacks import KINDS, TASKS
from jobs.evaluate.probe import Probe, merge_probes
from jobs.evaluate.prompts import Reading, Tokenizer, make_document, read_prompts
from jobs.evaluate.reader import Reader
from jobs.evaluate.results import SCHEMA, Row, estimate, question_key, read_rows, recall_of
from jobs.evaluate.summary import summarise
from jobs.evaluate.wording import REPORT, RULER, pick_style
from kernels.block_selection import BlockSelection
from pipeline.engine import Engine, EngineConfig, Request
from pipeline.engine.loading import load_model, stop_token_ids
from pipeline.errors import JobError
from stem_core.config import StemConfig

MODEL = str(Path(__file__).parents[2] / "models/tiny-reader")


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


@cache
def reader() -> Reader:
    model = load_model(EngineConfig(MODEL, device="cpu"))
    return Reader(prepare_model(model), stop_token_ids(model), chunk_tokens=256, cached_tokens=20_000)


@cache
def reading(kind: str = "report", length: int = 700, questions: int = 2) -> Reading:
    document = make_document(kind, length, 0, REPORT, tokenizer(), questions, seed=1)
    return read_prompts(document, REPORT, tokenizer())


def arm(spec: str, density: float = 0.5, tail: int = 0) -> Arm:
    return make_arms([spec], [16], [density], [tail], dense_layers=1)[0]


@pytest.mark.parametrize("style", [REPORT, RULER], ids=lambda style: style.name)
@pytest.mark.parametrize("kind", KINDS)
def test_documents(kind: str, style: object) -> None:
    """Prompts fill their length and no more, repeat by seed, and hold each needle where they say."""
    length = 3000 if style is RULER else 1500
    document = make_document(kind, length, 3, style, tokenizer(), 2, seed=5)  # type: ignore[arg-type]
    assert document == make_document(kind, length, 3, style, tokenizer(), 2, seed=5)  # type: ignore[arg-type]
    assert document.text != make_document(kind, length, 3, style, tokenizer(), 2, seed=6).text  # type: ignore[arg-type]
    made = read_prompts(document, style, tokenizer())  # type: ignore[arg-type]
    assert document.name == f"{kind}-{length}-3-seed5"  # reports of several seeds may be put together
    assert {question.task for question in document.questions} | {item.task for item in document.lookups} <= set(TASKS)
    assert 0.9 * length < max(len(prompt.ids) for prompt in made.prompts) <= length
    for prompt in made.prompts:
        assert np.array_equal(prompt.ids[: made.shared], made.prompts[0].ids[: made.shared])
        text = " ".join(tokenizer().decode(prompt.ids[first:last]) for first, last in prompt.needles)
        if prompt.needles and prompt.question.task != "variable_tracking":
            assert recall_of(text, prompt.question.references) == 1.0
    for lookup in made.lookups:
        second = tokenizer().decode(made.prompts[0].ids[slice(*lookup.second)])
        assert second.strip() == lookup.lookup.value
        assert lookup.lookup.value in tokenizer().decode(made.prompts[0].ids[slice(*lookup.first)])
        assert lookup.first[1] <= lookup.second[0]


def test_weave_puts_facts_behind_sentences() -> None:
    filler = [f" Sentence {index}." for index in range(10)]
    text, spans = weave(filler, [Fact("Last fact.", 1.0), Fact("A fact of 12.", 0.0, "12"), Fact("Half.", 0.5)])
    assert text.startswith(" Sentence 0. A fact of 12. Sentence 1.")
    assert [text[first:last] for first, last in spans] == ["Last fact.", "12", "Half."]
    assert len(text) == sum(map(len, filler)) + len(" Last fact. A fact of 12. Half.")


def test_too_short_a_document_is_refused() -> None:
    with pytest.raises(JobError, match="too few for a document of kind 'essay'"):
        make_document("essay", 300, 0, REPORT, tokenizer(), 4, seed=0)


def test_styles() -> None:
    assert pick_style("auto", 2048) is REPORT
    assert pick_style("auto", 128_256) is RULER
    assert pick_style("ruler", 2048) is RULER


def qkv(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(1, heads, tokens, 16) for heads in (4, 2, 2)]


def kept(selection: BlockSelection | None, blocks: int) -> torch.Tensor:
    assert selection is not None
    return selection.to_mask(blocks)


@pytest.mark.parametrize("spec", [*EQUAL_DENSITY])
def test_arms_of_one_density_keep_as_much(spec: str) -> None:
    q, k, v = qkv(1000)
    chosen = arm(spec, density=0.4, tail=2)
    selection = chosen.select(q, k, v, Place(5, 0, 1000, None))
    density = chosen.density(1000, layers=8)
    assert selection is not None
    assert selection.density() == pytest.approx(density[0])
    assert density[0] == pytest.approx(0.4, abs=0.01)
    assert density[1] == pytest.approx((1 + 7 * density[0]) / 8)
    assert chosen.select(q, k, v, Place(0, 0, 1000, None)) is None  # the leading layer
    mask = kept(selection, 63)
    assert mask[0, :, :, :4].tril().sum() == mask.shape[1] * (63 * 4 - 6)  # sink
    assert mask[0, 0, -2:].sum() == 63 + 62  # dense tail
    assert not mask.triu(1).any()


@pytest.mark.parametrize("spec", [*EQUAL_DENSITY])
def test_selection_does_not_depend_on_chunks(spec: str) -> None:
    q, k, v = qkv(500)
    chosen = arm(spec, density=0.5)
    whole = kept(chosen.select(q, k, v, Place(3, 0, 500, None)), 32)
    for start, end in ((0, 160), (160, 320), (320, 500)):
        part = chosen.select(q[:, :, start:end], k[:, :, :end], v[:, :, :end], Place(3, start, 500, None))
        rows = slice(start // 16, -(-end // 16))
        assert torch.equal(kept(part, 32), whole[:, :, rows])


def test_scores_of_arms_that_are_no_product() -> None:
    q, k, _ = qkv(40)
    place, config = Place(0, 0, 40, None), StemConfig(block_size=16)
    weights = (
        (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~torch.ones(40, 40).tril().bool(), -torch.inf).softmax(-1)
    )
    expected = torch.zeros(1, 4, 3, 3)
    for row in range(3):
        for column in range(3):
            part = weights[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            expected[..., row, column] = part.sum((-1, -2))
    torch.testing.assert_close(attention_mass(q, k, k, place, config), expected)
    window = window_scores(q, k, k, place, config)
    assert (window.diff(dim=-1) > 0).all()
    drawn = random_scores(q, k, k, place, config)
    assert len(drawn.unique()) == drawn.numel()
    assert 0 <= drawn.min() < drawn.max() < 1
    assert not torch.equal(drawn, random_scores(q, k, k, Place(1, 0, 40, None), config))


def test_arm_specs() -> None:
    arms = make_arms(
        ["sample:sample_rows=8,dense_tail=1", "dense", "sampled", "paper"], [16, 32], [0.25, 0.5], [0, 4], 0
    )
    assert [item.name for item in arms[:2]] == ["dense", "sample:sample_rows=8,dense_tail=1"]
    assert len(arms) == 1 + 2 * (2 + 2 + 2)
    config = arms[1].config
    assert config is not None
    assert (config.sample_rows, config.dense_tail, config.density, config.block_size) == (8, 1, 0.25, 16)
    with pytest.raises(JobError, match="did you mean 'oracle'"):
        make_arms(["orakel"], [16], [0.5], [0], 0)
    with pytest.raises(JobError, match=r"^--arms sampled:max_output_error=0.1: max_output_error makes some"):
        make_arms(["sampled:max_output_error=0.1"], [32], [0.25], [4], 0)
    with pytest.raises(JobError, match="did you mean 'sample_rows'"):
        make_arms(["sample:samplerows=2"], [16], [0.5], [0], 0)
    with pytest.raises(JobError, match="sample_rows must divide"):
        make_arms(["sample:sample_rows=7"], [16], [0.5], [0], 0)
    assert [block_size_for(length) for length in (1000, 4096, 16_384, 32_768, 131_072)] == [16, 16, 64, 128, 128]


@pytest.mark.parametrize("spec", ["dense", "stem", "sampled"])
def test_reader_answers_as_the_engine(spec: str) -> None:
    """Shared prefill, chunks and batched answers change no token."""
    chosen = arm(spec)
    answers = reader().read([reading()], [chosen], None, frozenset())
    engine = Engine(EngineConfig(MODEL, device="cpu", attention=chosen.config, arena_tokens=4000, max_live=2))
    asked = {}
    for answer in answers:
        if answer.lookup is None:
            asked[answer.key[1]] = answer
            engine.add(Request(answer.key[1], answer.prompt.ids, answer.prompt.max_new_tokens))
    done = []
    while engine.has_work:
        done += engine.step()
    assert len(done) == len(asked) == 3
    for completion in done:
        assert completion.status == "ok"
        assert completion.token_ids == asked[completion.request_id].token_ids
        density = chosen.density(completion.prompt_tokens, reader().layers)[1]
        assert completion.density == pytest.approx(density)


def test_answers_do_not_depend_on_their_neighbours() -> None:
    """One reading alone gives what it gives beside another reading and under several arms at once."""
    arms = [arm("stem"), arm("window")]
    together = reader().read([reading(), reading("noise")], arms, None, frozenset())
    alone = reader().read([reading("noise")], [arms[1]], None, frozenset())

    def found(answers: list[Answer]) -> dict[str, list[int]]:
        return {
            answer.key[1]: answer.token_ids
            for answer in answers
            if answer.arm.name == "window" and answer.reading.document.kind == "noise"
        }

    assert found(together) == found(alone) != {}


def test_answers_do_not_depend_on_the_cache() -> None:
    """Keys that are widened to float32 once answer as those that each step converts."""
    model = prepare_model(load_model(EngineConfig(MODEL, device="cpu", precision="bf16")))
    readings = [reading("noise", 400, 1)]
    roomy, tight = (Reader(model, stop_token_ids(model), 256, cached_tokens) for cached_tokens in (20_000, 1))
    found = [
        [answer.token_ids for answer in each.read(readings, [arm("stem")], None, frozenset())]
        for each in (roomy, tight)
    ]
    assert found[0] == found[1] != []


def test_dense_and_full_selection_agree() -> None:
    """A selection of nearly everything has the mass and the predictions of dense attention, a narrow window not."""
    name = frozenset([reading().document.name])
    dense = reader().read([reading()], [Arm("dense", None)], None, name)
    known = {answer.key: answer for answer in dense}
    full = make_arms(["oracle"], [16], [0.999999], [0], dense_layers=0)[0]
    for answer in reader().read([reading()], [full], known, name):
        assert answer.mass == pytest.approx([1.0] * 8, abs=0.02)
        assert answer.needles is not None
        if answer.lookup is not None:
            assert answer.correct == known[answer.key].correct
            continue
        assert answer.first_kl == pytest.approx(0.0, abs=0.02)
        assert answer.answer_kl == pytest.approx(0.0, abs=0.02)
    cut = reader().read([reading()], [arm("window", density=0.4)], known, name)
    assert max(answer.answer_kl or 0.0 for answer in cut) > 0.1
    assert min(min(answer.mass or [1.0]) for answer in cut) < 0.9


def test_the_mass_of_a_document_is_a_mean_over_its_rows() -> None:
    needle = ((0, 4), 10)
    chunks = [
        Probe([needle], rows=300, mass={0: 0.9, 1: 1.0}, kept={0: [0.5], 1: [1.0]}),
        Probe([], rows=100, mass={0: 0.5, 1: 0.2}, kept={0: [], 1: []}),
        Probe([needle, needle], rows=100, mass={0: 0.4}, kept={0: [0.25, 0.75]}),  # layer 1 has a sliding window
    ]
    whole = merge_probes(chunks, layers=2)
    assert whole.rows == 500
    assert whole.mass == {0: pytest.approx(0.72), 1: pytest.approx(0.84)}
    assert whole.kept == {0: [0.5, 0.25, 0.75], 1: [1.0, 1.0, 1.0]}
    assert len(whole.needles) == 3


def test_entries_share_a_prefill_by_blocks_only() -> None:
    entries = entries_of([reading()], arm("stem"))
    assert sum(len(entry.prompts) for entry in entries) == 3
    for entry in entries:
        assert len({-(-len(prompt.ids) // 16) for prompt in entry.prompts}) == 1
        assert entry.shared % 16 == 0
        assert entry.shared <= reading().shared
    assert len(entries_of([reading()], Arm("dense", None))) == 1


def test_estimates() -> None:
    rng = Random(0)
    documents = [f"d{index // 5}" for index in range(100)]
    values = [float(rng.random() < 0.7) for _ in documents]
    found = estimate(values, documents)
    assert found.mean == pytest.approx(sum(values) / 100)
    assert found.low < found.mean < found.high
    assert (found.n, found.documents) == (100, 20)
    assert found == estimate(values, documents)
    # Questions of one document are one draw: the same answers in fewer documents tell less.
    few = estimate([value for value in (0.0, 1.0) for _ in range(50)], [f"d{index // 50}" for index in range(100)])
    assert (few.low, few.high) == (0.0, 1.0)


def test_recall() -> None:
    assert recall_of("It is 123 and Ab.", ["123", "AB", "77"]) == pytest.approx(2 / 3)


def test_job_writes_rows_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    common = ["--model", MODEL, "--lengths", "600", "--questions", "1", "--no-plots", "--output", str(out)]
    assert main([*common, "--tasks", "niah_noise", "summary", "--arms", "dense", "sample", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "B = 16 (38 blocks), the smallest B" in said
    rows = read_rows([out])
    assert {(row["task"], row["arm"]) for row in rows} == {
        (task, name) for task in ("niah_noise", "summary") for name in ("dense", "sample")
    }
    assert all(row["recall"] == recall_of(row["answer"], row["references"]) for row in rows)
    assert all(row["density"] == 1.0 for row in rows if row["arm"] == "dense")
    assert all(len(row["retained_mass"]) == len(row["needle_kept"]) == 8 for row in rows)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["run"]["command"].startswith("python -m jobs.evaluate --model")
    assert {setting["arm"] for setting in summary["settings"]} == {"dense", "sample"}
    for record in summary["dense_recall"]:
        mine = [row["recall"] for row in rows if (row["arm"], row["task"]) == ("dense", record["task"])]
        assert record["recall"] == pytest.approx(np.mean(mine))
        assert record["low"] <= record["recall"] <= record["high"]
        assert record["n"] == len(mine)
    assert "retrieval" in (out / "summary.txt").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--report", str(out), str(out), "--output", str(tmp_path / "again")]) == 0
    assert "0 plots are in" in (told := capsys.readouterr().err)
    assert "for plots: pip install -e '.[bench]'" in told
    again = json.loads((tmp_path / "again/summary.json").read_text())
    assert again["settings"] == summary["settings"]  # rows that come twice count once


def test_engine_precisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine answers as the reader in fp32, beside it in fp8; a lookup is what the reader expects inside."""
    common = ["--model", MODEL, "--device", "cpu", "--lengths", "500", "--questions", "1", "--no-plots"]
    common += ["--tasks", "lookup", "report_facts", "--block-sizes", "32", "--dense-layers", "0"]
    own, engine = tmp_path / "own", tmp_path / "engine"
    assert main([*common, "--arms", "dense", "--output", str(own)]) == 0
    assert main([*common, "--arms", "dense", "--engine", "fp8", "fp32", "--output", str(engine)]) == 0
    assert "fp8 - fp32: dense, density 1.000, 500 tokens: " in " ".join(capsys.readouterr().out.split())
    rows = read_rows([engine])
    assert {row["arm"] for row in rows} == {"dense fp32", "dense fp8"}
    assert all(row["retained_mass"] is row["needle_kept"] is row["first_token_kl"] is None for row in rows)
    dense = {question_key(row): row for row in rows if row["arm"] == "dense fp32"}
    expected = {question_key(row): row for row in read_rows([own])}
    assert len(dense) == len(rows) / 2 == 5
    assert all(row["precision"] is None for row in expected.values())
    assert len(expected) > 2  # the reader looks up nothing behind the last whole block
    for key, row in expected.items():
        assert (dense[key]["answer"], dense[key]["recall"]) == (row["answer"], row["recall"])
    assert any(row["recall"] for row in dense.values())
    summary = json.loads((engine / "summary.json").read_text())
    assert {"to_dense" in part for setting in summary["settings"] for part in setting["recall"].values()} == {
        True,
        False,
    }
    (record,) = summary["precisions"]
    assert (record["arm"], record["precision"], record["base"]) == ("dense", "fp8", "fp32")
    gaps = [row["recall"] - dense[question_key(row)]["recall"] for row in rows if row["precision"] == "fp8"]
    assert record["recall"]["all"]["mean"] == pytest.approx(np.mean(gaps))


def test_precisions_are_compared_with_the_most_exact_of_the_same_setting() -> None:
    def row(arm: str, precision: str, question: str, recall: float) -> Row:
        known = dict.fromkeys(SCHEMA.names) | {"length": 900, "document": question[0], "task": "niah_noise"}
        known |= {"arm": f"{arm} {precision}", "precision": precision, "question": question, "recall": recall}
        return (
            known
            | {"block_size": 0 if arm == "dense" else 32, "dense_tail": 0, "density": 0.5, "blocks": 9}
            | {
                "prefill_seconds": 1.0,
                "config": arm,
            }
        )

    rows = [row("dense", precision, name, 1.0) for name in ("a1", "a2", "b1") for precision in ("fp8", "bf16")]
    rows += [row("stem", "bf16", name, recall) for name, recall in (("a1", 1.0), ("a2", 0.0), ("b1", 1.0))]
    rows += [row("stem", "fp8", name, recall) for name, recall in (("a1", 0.0), ("a2", 0.0), ("b1", 0.5))]
    summary = summarise(rows)
    dense, stem = summary["precisions"]
    assert (dense["arm"], dense["changed"], dense["recall"]["all"]["low"]) == ("dense", 0, 0.0)
    assert (stem["arm"], stem["base"], stem["changed"]) == ("stem", "bf16", 2)
    assert stem["recall"]["all"]["mean"] == pytest.approx(-0.5)
    settings = {setting["arm"]: setting["recall"]["retrieval"] for setting in summary["settings"]}
    assert "to_dense" not in settings["dense bf16"]
    assert settings["dense fp8"]["to_dense"]["mean"] == 0.0
    assert settings["stem fp8"]["to_dense"]["mean"] == pytest.approx(0.5 / 3 - 1.0)


def test_engine_refuses_arms_that_it_cannot_run() -> None:
    arms = make_arms(["dense", "stem", "paper"], [32], [0.5], [0], 0)
    assert [arm.name for arm in engine_arms(arms, ["fp8"])] == ["dense fp8", "stem fp8", "paper fp8"]
    with pytest.raises(JobError, match=r"^--engine: it cannot run arm 'oracle'; it runs dense, sampled, .*, oam$"):
        engine_arms(make_arms(["oracle"], [32], [0.5], [0], 0), ["fp32"])
    small = make_arms(["stem"], [16], [0.5], [0], 0)
    assert len(engine_arms(small, ["fp32"])) == 1
    with pytest.raises(JobError, match=r"kernels take blocks of 32, .* got block_size=16; choose with --block-sizes"):
        engine_arms(small, ["fp8"])


def test_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*flags: str) -> str:
        with pytest.raises(JobError) as error:
            main(["--model", MODEL, "--device", "cpu", "--output", str(tmp_path), "--no-plots", *flags])
        return str(error.value)

    assert "did you mean 'summary'" in refused("--tasks", "sumary")
    assert "takes up to 40960 tokens" in refused("--lengths", "50000")
    assert "is not one of 16, 32" in refused("--block-sizes", "48")
    assert "(0, 1]" in refused("--densities", "25")
    assert "cannot run arm 'window'" in refused("--engine", "fp8", "--arms", "dense", "window")
    assert "does not go with --engine" in refused("--engine", "fp8", "--precision", "fp32")
    assert "invalid choice: 'fp9'" in refused("--engine", "fp9")
    assert "holds no rows" in refused("--report", str(tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(JobError, match=r"plots need matplotlib: pip install -e '.\[bench\]', or leave out --plots"):
        main(["--model", MODEL, "--plots"])
