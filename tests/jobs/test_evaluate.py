"""jobs.evaluate: its documents, its arms, its reader against the engine, its figures."""

from __future__ import annotations

import io
import json
import shutil
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.evaluate import run as evaluate_run
from jobs.evaluate.__main__ import main
from jobs.evaluate.arms import CONTROLS, attention_mass, make_arms, random_scores, window_scores
from jobs.evaluate.haystacks import KINDS, TASKS
from jobs.evaluate.options import options_of, parser
from jobs.evaluate.plots import by_time
from jobs.evaluate.rows import SCHEMA, read_rows
from jobs.evaluate.run import load_readers
from jobs.evaluate.summary import ARMS_NOTE, DENSE_NOTE, PREDICTION_NOTE, RECALL_NOTE, print_summary, summarise
from jobs.evaluate.texts import Text, make_texts, read_text
from jobs.known.prompts import Reading, Tokenizer, make_document, read_prompts
from jobs.known.reader import Answer, Arm, Reader, Reference
from jobs.known.results import Row, recall_of
from jobs.known.wording import REPORT, RULER
from pipeline.engine import Engine, EngineConfig, Request, SharedPrompt
from pipeline.engine.model.loading import context_limit, load_config, load_model
from pipeline.errors import JobError

MODEL = str(Path(__file__).parents[2] / "models/tiny-reader")


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


@cache
def reader(precision: str = "fp32", chunk_tokens: int = 256) -> Reader:
    made = Reader(EngineConfig(MODEL, device="cpu", precision=precision, chunk_tokens=chunk_tokens), 1600)
    made.allocate(1.0)
    return made


@cache
def reading(kind: str = "report", length: int = 700, questions: int = 2) -> Reading:
    document = make_document(KINDS[kind], length, 0, REPORT, tokenizer(), questions, seed=1)
    return read_prompts(document, REPORT, tokenizer())


def arm(spec: str, block_size: int = 16) -> Arm:
    return make_arms([spec], block_size)[-1]


def read(chosen: Arm, precision: str = "fp32", reference: Reference | None = None) -> list[Answer]:
    reader(precision).use(chosen)
    return reader(precision).read(reading(), {} if reference is None else reference)


@pytest.mark.parametrize("style", [REPORT, RULER], ids=lambda style: style.name)
@pytest.mark.parametrize("kind", KINDS)
def test_documents(kind: str, style: object) -> None:
    """Prompts fill their length and no more, repeat by seed, and hold each needle where they say."""
    length = 3000 if style is RULER else 1500
    document = make_document(KINDS[kind], length, 3, style, tokenizer(), 2, seed=5)  # type: ignore[arg-type]
    assert document == make_document(KINDS[kind], length, 3, style, tokenizer(), 2, seed=5)  # type: ignore[arg-type]
    assert document.text != make_document(KINDS[kind], length, 3, style, tokenizer(), 2, seed=6).text  # type: ignore[arg-type]
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


def test_too_short_a_document_is_refused() -> None:
    with pytest.raises(JobError, match="too few for a document of kind 'essay'"):
        make_document(KINDS["essay"], 300, 0, REPORT, tokenizer(), 4, seed=0)


def test_texts() -> None:
    """Whole blocks of an essay, spread over it; other ones with another seed; synthetic sentences without one."""
    essay = " ".join(f"The bridge of {index} was built." for index in range(900))
    texts = make_texts(1100, 3, tokenizer(), 0, essay)
    assert {text.prompt_tokens for text in texts} == {1024}
    assert {len(text.ids) for text in texts} == {1024 + 512}
    assert all(tokenizer().decode(text.ids[:900]).strip() in essay for text in texts)
    assert len({text.ids[:50].tobytes() for text in texts + make_texts(1100, 3, tokenizer(), 1, essay)}) == 6
    assert texts[0].places[0] == 256
    assert texts[0].places[-1] < 1023
    with pytest.raises(JobError, match=r"^--essay has [\d,]+ tokens, task text takes 66,048 at 65,536 tokens"):
        make_texts(65_536, 1, tokenizer(), 0, essay)
    with pytest.raises(JobError, match="of 256 tokens or more, got 255"):
        make_texts(255, 1, tokenizer(), 0, essay)
    (synthetic,) = make_texts(1100, 1, tokenizer(), 0, "")
    assert len(synthetic.ids) == 1536


@pytest.mark.parametrize("spec", CONTROLS)
def test_controls_keep_as_much_and_do_not_depend_on_chunks(spec: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 500, 16) for heads in (4, 2, 2))
    chosen = arm(f"{spec}:density=0.6")
    assert chosen.config is not None
    reader().use(chosen)
    budget = next(policy.budget(500, None) for policy, _ in reader()._runner.layers if not policy.leading)

    def select(start: int, end: int) -> torch.Tensor:
        assert chosen.select
        part = chosen.select(
            3, q[:, :, start:end], k[:, :, :end], v[:, :, :end], chosen.config, budget, start=start, scale=None
        )  # type: ignore[arg-type]
        return part.to_mask(32)

    whole = select(0, 500)
    assert whole.sum() / (4 * 32 * 33 / 2) == pytest.approx(budget.density)
    assert budget.density == pytest.approx(0.6, abs=0.02)
    assert not whole.triu(1).any()
    for start, end in pairwise((0, 160, 320, 500)):
        assert torch.equal(select(start, end), whole[:, :, start // 16 : -(-end // 16)])


def test_scores_of_controls() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    hidden = ~torch.ones(40, 40).tril().bool()
    weights = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(hidden, -torch.inf).softmax(-1)
    expected = torch.zeros(1, 4, 3, 3)
    for row in range(3):
        for column in range(3):
            part = weights[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            expected[..., row, column] = part.sum((-1, -2))
    torch.testing.assert_close(attention_mass(0, q, k, 0, 16, None), expected)
    assert (window_scores(0, q, k, 0, 16, None).diff(dim=-1) > 0).all()
    drawn = random_scores(0, q, k, 0, 16, None)
    assert len(drawn.unique()) == drawn.numel()
    assert 0 <= drawn.min() < drawn.max() < 1
    assert not torch.equal(drawn, random_scores(1, q, k, 0, 16, None))


def test_arm_specs() -> None:
    arms = make_arms(["release:density=0.2,dense_tail=1", "window", "sampled", "dense-again"], None)
    assert [item.name for item in arms] == [
        "dense",
        "release:density=0.2,dense_tail=1",
        "window",
        "sampled",
        "dense-again",
    ]
    config = arms[1].config
    assert config is not None
    assert (config.schedule, config.dense_tail, config.density, config.block_size) == ("density", 1, 0.2, 128)
    assert config.dense_below == 6144  # a preset stays as a job runs it
    small = arm("release").config
    assert small is not None
    assert (small.block_size, small.dense_below) == (16, 0)
    for spec, told in {
        "orakel": "did you mean 'oracle'",
        "release:densty=0.2": "did you mean 'density'",
        "release:density=x": "density must be float, got 'x'",
        "release:stride=7": "stride must be a divisor of block_size",
        "dense:density=0.5": "dense attention has no settings",
    }.items():
        with pytest.raises(JobError, match=told):
            make_arms([spec], None)
    with pytest.raises(JobError, match=r"--precision fp8: its kernels take blocks of 32, .* got block_size=16"):
        make_arms(["sampled"], 16, ["bf16", "fp8"])
    with pytest.raises(JobError, match="oracle: it cannot run with --precision fp8"):
        make_arms(["oracle"], 32, ["fp8"])


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("spec", ["dense", "release:density=0.5", "sampled:base_blocks=8"])
def test_reader_answers_as_the_engine(spec: str, precision: str) -> None:
    """It reads a document, and what is asked behind it, as a job's SharedPrompt is read."""
    chosen = arm(spec, block_size=32)
    answers = read(chosen, precision)
    config = EngineConfig(MODEL, device="cpu", precision=precision, attention=chosen.config, arena_tokens=4000)
    engine = Engine(config)
    asked, expected = {}, {}
    whole, shared = reading().prompts[0].ids, reading().shared
    requests = []
    for index, answer in enumerate(answers):
        if answer.prompt is not None:
            asked[str(index)] = answer
            requests.append(Request(str(index), answer.prompt.ids[shared:], answer.prompt.max_new_tokens))
        elif spec == "dense" and answer.lookup is not None:  # a prompt that ends before the value is said again
            first, last = answer.lookup.second
            expected[str(index)] = answer, whole[first:last].tolist()
            engine.add(Request(str(index), whole[:first], last - first))
    engine.add_shared(SharedPrompt(whole[:shared], tuple(requests)))
    done = []
    while engine.has_work:
        done += engine.step()
    assert len(asked) == 3
    assert len(done) == len(asked) + len(expected)
    for completion in done:
        assert completion.status == "ok"
        if completion.request_id in expected:
            answer, value = expected[completion.request_id]
            assert answer.correct == (completion.token_ids == value)
            continue
        answer = asked[completion.request_id]
        assert completion.token_ids == answer.token_ids
        assert completion.density == pytest.approx(answer.density[1])


def test_answers_do_not_depend_on_their_neighbours() -> None:
    """Questions that are asked alone are answered as all together."""
    chosen = arm("release:density=0.5")
    reader().use(chosen)
    together = reader().read(reading("essay"), {})
    alone = []
    for prompt in reading("essay").prompts:
        only = Reading(reading("essay").document, (prompt,), (), reading("essay").shared)
        alone += reader().read(only, {})
    found = [
        {answer.prompt.question.text: answer.token_ids for answer in each if answer.prompt}
        for each in (together, alone)
    ]
    assert len(found[0]) == 6
    assert found[0] == found[1]


def test_predictions_against_dense() -> None:
    """Nothing of a KL in chunks of another length or where everything is kept; much behind a narrow window."""
    reference: Reference = {}
    dense = read(arm("dense"), reference=reference)
    assert all(answer.kl == 0.0 for answer in dense)
    for spec in ("dense-again", "window:density=0.999999"):
        for answer, other in zip(read(arm(spec), reference=reference), dense, strict=True):
            assert answer.kl == pytest.approx(0.0, abs=0.02)
            assert (answer.correct, answer.token_ids) == (other.correct, other.token_ids)
    cut = read(arm("window"), reference=reference)
    assert max(answer.kl or 0.0 for answer in cut) > 1.0
    inside = [answer for answer in cut if answer.lookup is not None]
    assert len(inside) > 2
    assert all(answer.correct == (answer.top1 == 1.0) for answer in inside)
    assert not all(answer.correct for answer in inside)


def test_predictions_along_text() -> None:
    """As transformers' own attention predicts; an arm's differ inside and, less, behind the prompt."""
    (text,) = make_texts(768, 1, tokenizer(), 0, "")
    reference: Reference = {}
    reader().use(arm("dense"))
    inside, behind = read_text(reader(), text, reference)
    model = load_model(EngineConfig(MODEL, device="cpu"))
    ids = torch.from_numpy(text.ids)
    with torch.inference_mode():
        logits = model(input_ids=ids[None]).logits[0]
    places = torch.tensor(text.places)
    torch.testing.assert_close(reference["inside"], logits[places], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(reference["behind"], logits[768:-1], atol=1e-3, rtol=1e-3)
    assert inside.nll == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits[places], ids[places + 1])), abs=1e-3
    )
    assert (inside.kl, behind.kl, inside.top1, behind.top1) == (0.0, 0.0, 1.0, 1.0)
    reader().use(arm("window:density=0.2"))
    cut = read_text(reader(), text, reference)
    assert all((answer.kl or 0.0) > 1e-5 for answer in cut)
    assert cut[0].top1 is not None
    assert cut[0].top1 < 1.0


def test_stretched_context(tmp_path: Path) -> None:
    """By the mechanism of jobs (tests/pipeline/test_engine_checkpoints.py)."""
    flags = ["--model", MODEL, "--rope-scaling", "2", "--lengths", "1024", "--output", str(tmp_path)]
    (reader,) = load_readers(options_of(parser("").parse_args(flags), torch.device("cpu")))
    assert reader.limit == 2 * context_limit(load_config(EngineConfig(MODEL, device="cpu")))
    with pytest.raises(JobError, match="--rope-scaling must be above 1"):
        options_of(parser("").parse_args(["--model", MODEL, "--rope-scaling", "1"]), torch.device("cpu"))


def test_job_writes_rows_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, essay = tmp_path / "out", tmp_path / "essay.txt"
    essay.write_text(" ".join(f"The bridge of {index} was built. It is old." for index in range(400)))
    common = ["--model", MODEL, "--lengths", "600", "--questions", "1", "--no-plots", "--output", str(out)]
    common += ["--block-size", "32", "--essay", str(essay), "--precision", "fp8,fp32", "--device", "cpu"]
    assert main([*common, "--tasks", "niah_essay", "lookup", "summary", "text", "--arms", "dense", "sampled"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "sampled B=32 density" in said
    rows = read_rows([out])
    tasks = {"niah_essay", "lookup", "summary", "text inside", "text behind"}
    assert {(row["task"], row["arm"], row["precision"]) for row in rows} == {
        (task, name, precision) for task in tasks for name in ("dense", "sampled") for precision in ("fp32", "fp8")
    }
    for row in rows:
        text = row["task"].startswith("text")
        assert (row["recall"] is None) == text
        assert row["kl"] is not None
        if not text and row["task"] == "niah_essay":
            assert row["recall"] == recall_of(row["answer"], row["references"])
    assert {row["kl"] for row in rows if (row["arm"], row["precision"]) == ("dense", "fp32")} == {0.0}
    assert max(row["kl"] for row in rows if (row["arm"], row["precision"]) == ("dense", "fp8")) > 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["run"]["command"].startswith("python -m jobs.evaluate --model")
    assert [(setting["arm"], setting["precision"]) for setting in summary["settings"]] == [
        ("dense", "fp32"), ("sampled", "fp32"), ("dense", "fp8"), ("sampled", "fp8"),
    ]  # fmt: skip
    for record in summary["dense_recall"]:
        mine = [
            row["recall"]
            for row in rows
            if (row["arm"], row["precision"], row["task"]) == ("dense", "fp32", record["task"])
        ]
        assert record["recall"] == pytest.approx(np.mean(mine))
        assert record["low"] < record["high"]
        assert record["n"] == len(mine)
    assert summary["settings"][1]["predictions"]["text inside"]["kl"]["mean"] >= 0
    assert {(record["arm"], record["precision"], record["base"]) for record in summary["precisions"]} == {
        ("dense", "fp8", "fp32"), ("sampled", "fp8", "fp32"),
    }  # fmt: skip
    assert "fp8 - fp32: dense, 600 tokens, points of recall: all" in said
    text = (out / "summary.txt").read_text()
    assert max(map(len, text.splitlines())) <= 120, "no wider than a terminal"
    for note in (DENSE_NOTE, ARMS_NOTE, RECALL_NOTE, PREDICTION_NOTE):
        assert note in " ".join(text.split()), "what the columns mean"
    assert text.count("read 600 tokens densely") == 2, "in both precisions: the budget covers all of it"
    sparse = json.loads((out / "summary.json").read_text())
    sparse["settings"][1]["mean_density"] = 0.9
    print_summary(sparse, printed := io.StringIO())
    assert printed.getvalue().count("read 600 tokens densely") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--report", str(out), str(out), "--output", str(tmp_path / "again")]) == 0
    assert "rows: summary.txt, summary.json are in" in (told := capsys.readouterr().err)
    assert "for plots: pip install -e '.[bench]'" in told
    again = json.loads((tmp_path / "again/summary.json").read_text())
    assert again["settings"] == summary["settings"]  # rows that come twice count once


def test_weights_stored_in_fp8_are_compared_with_the_model_itself(tmp_path: Path) -> None:
    """A stored model alone would be compared with itself, its own weights exact."""
    shutil.copytree(MODEL, stored := tmp_path / "stored")
    tensors = load_file(stored / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    save_file(tensors | {name: tensors[name] * 1.5}, stored / "model.safetensors", {"format": "pt"})
    flags = [
        "--model",
        MODEL,
        "--device",
        "cpu",
        "--lengths",
        "300",
        "--tasks",
        "text",
        "--arms",
        "dense",
        "--no-plots",
    ]
    kl = {}
    for folder in (MODEL, str(stored)):
        out = tmp_path / f"out{len(kl)}"
        assert main([*flags, "--precision", "fp32", "fp8", "--fp8-model", folder, "--output", str(out)]) == 0
        kl[folder] = {row["precision"]: row["kl"] for row in read_rows([out]) if row["task"] == "text inside"}
    assert kl[str(stored)]["fp32"] == kl[MODEL]["fp32"] == 0
    assert kl[str(stored)]["fp8"] > 2 * kl[MODEL]["fp8"]


def test_summary_compares_question_by_question() -> None:
    def row(arm: str, precision: str, question: str, recall: float, task: str = "niah_noise") -> Row:
        known = dict.fromkeys(SCHEMA.names) | {"length": 900, "document": question[0], "task": task, "config": arm}
        known |= {"arm": arm, "precision": precision, "question": question, "recall": recall}
        return known | {"block_size": 32, "density": 0.5, "mean_density": 0.5, "prefill_seconds": 1.0, "kl": 0.1}

    rows = [row("dense", precision, name, 1.0) for name in ("a1", "a2", "b1") for precision in ("fp8", "bf16")]
    rows += [row("dense", "bf16", "a1", 0.4, "multiquery"), row("release", "bf16", "a1", 1.0, "multiquery")]
    rows += [row("release", "bf16", name, recall) for name, recall in (("a1", 1.0), ("a2", 0.0), ("b1", 1.0))]
    rows += [row("release", "fp8", name, recall) for name, recall in (("a1", 0.0), ("a2", 0.0), ("b1", 0.5))]
    summary = summarise(rows)
    dense, release = summary["precisions"]
    assert (dense["arm"], dense["changed"]) == ("dense", 0)
    assert dense["recall"]["all"]["low"] < 0.0 < dense["recall"]["all"]["high"]
    assert (release["arm"], release["base"], release["changed"]) == ("release", "bf16", 2)
    assert release["recall"]["all"]["mean"] == pytest.approx(-0.5)
    settings = {(record["arm"], record["precision"]): record["recall"]["retrieval"] for record in summary["settings"]}
    assert "to_dense" not in settings["dense", "bf16"]
    assert settings["dense", "fp8"]["to_dense"]["mean"] == 0.0
    assert settings["release", "fp8"]["to_dense"]["mean"] == pytest.approx(0.5 / 3 - 1.0)
    assert summary["left_out"] == [[900, "multiquery"]]  # dense fails it, so it says nothing about a selection
    assert settings["release", "bf16"]["n"] == 3


def test_the_frontier_takes_each_arm_at_its_median_time() -> None:
    rows = [
        {"arm": arm, "precision": "bf16", "kl": kl, "prefill_seconds": seconds}
        for arm, kl, seconds in (
            ("dense", 0.0, 2.0),
            ("sampled", 0.1, 1.0),
            ("sampled", 0.3, 1.2),
            ("sampled", 0.2, 9.0),
        )
    ]
    rows.append({"arm": "paper", "precision": "bf16", "kl": None, "prefill_seconds": 1.0})
    assert by_time(rows, "kl") == {("dense", "bf16"): (2.0, 0.0), ("sampled", "bf16"): (1.2, pytest.approx(0.2))}


@pytest.mark.parametrize(("device", "more"), [("cpu", 0), ("cuda", 1)])
def test_a_gpu_reads_the_first_document_of_a_length_twice(
    device: str, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two texts of each of two lengths; what compiling takes is in no row's seconds."""
    texts = [Text(f"{length}-{i}", length, np.arange(length), length - 64) for length in (300, 500) for i in range(2)]
    read: list[str] = []
    monkeypatch.setattr(evaluate_run, "load_readers", lambda options: [])
    monkeypatch.setattr(evaluate_run, "describe", lambda *_: [])
    monkeypatch.setattr(evaluate_run, "documents", lambda *_: iter(texts))
    monkeypatch.setattr(evaluate_run, "read_document", lambda document, *_: read.append(document.name) or [])
    monkeypatch.setattr(evaluate_run, "write_rows", lambda rows, folder, part: None)
    flags = ["--model", str(MODEL), "--load-format", "dummy", "--tasks", "text", "--output", str(tmp_path)]
    options = options_of(parser("").parse_args(flags), torch.device(device))
    evaluate_run.run(options)
    assert [read.count(text.name) for text in texts] == [1 + more, 1, 1 + more, 1]


def test_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*flags: str) -> str:
        with pytest.raises(JobError) as error:
            main(["--model", MODEL, "--device", "cpu", "--output", str(tmp_path), "--no-plots", *flags])
        return str(error.value)

    assert "did you mean 'summary'" in refused("--tasks", "sumary")
    assert "too few for a document" in (told := refused("--tasks", "summary", "--lengths", "300"))
    assert told.endswith("give larger --lengths or fewer --questions")
    assert "takes up to 40960 tokens; --rope-scaling stretches that" in refused("--lengths", "50000")
    assert "is not one of 16, 32" in refused("--block-size", "48")
    assert "'fp9' is not one of auto, fp32" in refused("--precision", "bf16,fp9")
    assert "must be above 1" in refused("--rope-scaling", "1")
    assert "give --precision bf16 fp8" in refused("--fp8-model", MODEL)
    both = ("--precision", "fp32", "fp8", "--fp8-model", str(tmp_path / "other"))
    shutil.copytree(MODEL, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    save_file(
        {
            name: tensor[:64] if "embed_tokens" in name or "lm_head" in name else tensor
            for name, tensor in load_file(Path(MODEL, "model.safetensors")).items()
        },
        tmp_path / "other/model.safetensors",
        {"format": "pt"},
    )
    assert "has 64 tokens, --model" in refused(*both, "--lengths", "300")
    (tmp_path / "other/rows").mkdir()
    (tmp_path / "other/rows/mine.csv").write_text("1")
    assert "its folder rows holds files already" in refused("--output", str(tmp_path / "other"))
    assert (tmp_path / "other/rows/mine.csv").exists()
    assert "/proc cannot be written to" in refused("--output", "/proc/x")
    assert "holds no rows" in refused("--report", str(tmp_path))
    assert "cannot be read: No such file" in refused("--essay", str(tmp_path / "none.txt"))
    assert f"{__file__} is a file; give a folder" in refused("--output", __file__)
    assert "model folder '/nowhere' does not exist" in refused("--model", "/nowhere")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8" in refused("--essay", str(tmp_path / "binary.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    assert "it is empty" in refused("--essay", str(tmp_path / "empty.txt"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(JobError, match=r"plots need matplotlib: pip install -e '.\[bench\]', or leave out --plots"):
        main(["--model", MODEL, "--plots"])


def test_it_runs_without_ray() -> None:
    """A machine with a GPU needs torch, triton and transformers for an evaluation, and no cluster."""
    import subprocess

    code = "import sys; sys.modules['ray'] = None; import jobs.evaluate.__main__, jobs.evaluate.run"
    subprocess.run([sys.executable, "-c", code], check=True)
