"""The scaling benchmark: its documents, its arithmetic, its files, and real jobs on a CPU."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tools.benchmark.scaling as benchmark
from pipeline.errors import JobError
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.task import make_task
from pipeline.prompts.tokens import load_tokens
from tools.benchmark.__main__ import main
from tools.benchmark.scaling.documents import model_folder, write_documents
from tools.benchmark.scaling.figures import check_rows, compared, figures

TINY = str(Path(__file__).parents[2] / "models" / "tiny-reader")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SMALL = f"scaling --shape {TINY} --device cpu --documents 6 --lengths 90 120 --new-tokens 4 --max-live 2".split()


def row(name: str, worker: str, start: float, end: float, **values: Any) -> dict[str, Any]:
    times = {"started_at": NOON + timedelta(seconds=start), "finished_at": NOON + timedelta(seconds=end)}
    about = {"status": "ok", "error": "", "attempts": 1, "output": f"about {name}", "prompt_tokens": 100}
    about |= {"output_tokens": 5, "density": 0.25, "attention": "stem", "gpu": "card", "precision": "fp8"}
    return {"document_id": name, "worker": worker, **about, **times, **values}


ONE = [row(f"d{i}", "a", 10 + 10 * i, 20 + 10 * i) for i in range(4)]
# The second worker begins 2 s later and ends 4 s before the first.
TWO = [row("d0", "a", 5, 15), row("d1", "b", 7, 16), row("d2", "a", 15, 25), row("d3", "b", 16, 21)]


def measured(rows: list[dict[str, Any]], workers: int, engine: float) -> dict[str, Any]:
    return figures(rows, NOON, {"workers": workers, "engine_seconds": engine}, workers)


def test_rates_and_what_was_lost() -> None:
    one, two = measured(ONE, 1, 38.0), measured(TWO, 2, 30.0)
    assert (one["start_seconds"], one["seconds"], one["documents_per_hour"]) == (10.0, 40.0, 360.0)
    assert (two["start_seconds"], two["seconds"], two["prompt_tokens_per_second"]) == (5.0, 20.0, 20.0)
    assert (two["late_seconds"], two["ended_seconds"]) == (2.0, 4.0)
    first, second = compared([two, one])
    assert (first["workers"], first["efficiency"], first["same outputs"]) == ("1", 1.0, 1.0)
    assert second["efficiency"] == pytest.approx(1.0)
    assert second["late starts apart"] == pytest.approx((4 / 38) / (4 / 40)), "two workers were there for 38 s"
    assert second["idle"] == pytest.approx(1 - 30 / 40)
    assert (second["idle at start"], second["idle at end"]) == (2 / 40, 4 / 40)
    assert second["density"] == 0.25
    assert figures(TWO, NOON, {"workers": 1, "engine_seconds": 3.0}, 2)["idle"] is None, "one did not tell"
    assert measured(TWO, 3, 30.0)["late_seconds"] == 22.0, "the third never began"


def test_efficiency_is_against_the_fewest_workers() -> None:
    runs = [measured(ONE, 1, 1.0) | {"workers": n, "documents_per_hour": rate} for n, rate in ((4, 600.0), (2, 400.0))]
    two, four = compared(runs)
    assert (two["workers"], two["efficiency"]) == ("2", 1.0)
    assert four["efficiency"] == pytest.approx(0.75)


def test_outputs_that_differ_are_counted() -> None:
    other = [TWO[0] | {"output": "something else"}, *TWO[1:]]
    assert compared([measured(ONE, 1, 1.0), measured(other, 2, 1.0)])[1]["same outputs"] == 0.75


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (TWO[:3], "of 4 documents 1 have no row, 0 have two"),
        ([*TWO, TWO[0]], "of 4 documents 0 have no row, 1 have two"),
        ([*TWO[:3], TWO[3] | {"status": "oom", "error": "too much"}], "d3 ended with oom: too much"),
        ([*TWO[:3], TWO[3] | {"attempts": 2}], "d3 took 2 attempts"),
        ([*TWO[:3], TWO[3] | {"prompt_tokens": 99}], "d3 has 99 prompt tokens instead of 100"),
    ],
)
def test_no_speed_without_the_right_rows(rows: list[dict[str, Any]], message: str) -> None:
    expected = {f"d{i}": 100 for i in range(4)}
    check_rows(TWO, expected, 2)
    with pytest.raises(JobError, match=message):
        check_rows(rows, expected, 2)


def test_documents_have_the_lengths_and_the_tokenizer_fits_the_shape(tmp_path: Path) -> None:
    model = model_folder("llama-3.1-8b", tmp_path / "model")
    lengths = [200, 3001, 200]
    expected = write_documents(tmp_path / "docs.jsonl", model, lengths)
    documents = [json.loads(line) for line in (tmp_path / "docs.jsonl").read_text().splitlines()]
    assert {document["id"]: length for document, length in zip(documents, lengths, strict=True)} == expected
    tokens = load_tokens(str(model))
    builder = PromptBuilder(tokens, make_task("summarize", None, None))
    assert [len(builder.build(document["text"], 1 << 30).ids) for document in documents] == lengths
    assert documents[0]["text"] != documents[2]["text"]
    bundled = load_tokens(TINY)
    assert tokens.encode_data(documents[1]["text"]).tolist() == bundled.encode_data(documents[1]["text"]).tolist()
    assert tokens.encode_data("w3000 w128255").max() < 2048, "what was added stands for no text"
    assert len(set(tokens.decode([*range(2048, 128_256)]).split())) == 128_256 - 2048, "each has a text of its own"
    assert tokens.decode([128_255, 2048]) == " w128255 w2048"
    assert tokens.eos_ids == ()


def test_lengths_and_vocabularies_that_cannot_be(tmp_path: Path) -> None:
    model = model_folder(TINY, tmp_path / "model")
    with pytest.raises(JobError, match=r"--lengths: at least .* got 20"):
        write_documents(tmp_path / "docs.jsonl", model, [200, 20])
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300}))
    with pytest.raises(JobError, match="vocabulary of 300 is smaller than the tokenizer's 2048"):
        model_folder(str(tmp_path), tmp_path / "small")
    for flags in (["--workers", "0"], ["--documents", "0"]):
        with pytest.raises(JobError, match="at least 1"):
            main([*SMALL, *flags])


def stub(monkeypatch: pytest.MonkeyPatch, fails_at: int = 0) -> list[Any]:
    """Replace the job by rows that are done as fast as there are workers. Returns the configs it was given."""
    calls: list[Any] = []

    def run(config: Any) -> SimpleNamespace:
        calls.append(config)
        if config.workers == fails_at:
            raise JobError("no such luck")
        return SimpleNamespace(stats={"workers": config.workers, "engine_seconds": 1.0})

    def read_results(folder: str, columns: Any) -> SimpleNamespace:
        n = calls[-1].workers
        rows = [row(f"doc-{i:05}", f"w{i % n}", i // n, i // n + 1, prompt_tokens=(90, 120)[i % 2]) for i in range(6)]
        return SimpleNamespace(to_pylist=lambda: rows)

    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.setattr(benchmark, "read_results", read_results)
    return calls


def test_a_file_grows_and_files_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stub(monkeypatch)
    one, two, both = (str(tmp_path / name) for name in ("one.json", "two.json", "both.json"))
    assert main([*SMALL, "--workers", "3", "1", "--output", one, "--commit", "abc"]) == 0
    content = json.loads(Path(one).read_text())
    assert [(r["workers"], r["stamp"]["commit"]) for r in content["runs"]] == [(1, "abc"), (3, "abc")]
    assert {(c.ray_address, c.load_format, c.max_context, c.max_live) for c in calls} == {("local", "dummy", 124, 2)}
    assert len({c.output for c in calls}) == 2
    assert main([*SMALL, "--workers", "2", "--output", two]) == 0
    capsys.readouterr()
    assert main(["scaling", "--merge", one, two, "--output", both]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:]] == ["1", "2", "3"]
    assert "100.0%" in shown
    assert main([*SMALL, "--workers", "2", "--output", one]) == 0
    assert [r["workers"] for r in json.loads(Path(one).read_text())["runs"]] == [1, 2, 3]
    with pytest.raises(JobError, match="do not go into one table: new_tokens 4 and 5"):
        main([*SMALL, "--new-tokens", "5", "--output", one])
    other = json.loads(Path(two).read_text())
    other["runs"][0]["gpu"] = ["another card"]
    Path(two).write_text(json.dumps(other))
    with pytest.raises(JobError, match=r"different devices: .*another card"):
        main(["scaling", "--merge", one, two])
    for text in ("{", "[]"):
        Path(two).write_text(text)
        with pytest.raises(JobError, match=r"two\.json"):
            main(["scaling", "--merge", one, two])


def test_what_was_measured_is_kept_when_a_later_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, fails_at=2)
    with pytest.raises(JobError, match="no such luck"):
        main([*SMALL, "--workers", "1", "2", "3", "--output", str(tmp_path / "out.json")])
    assert [r["workers"] for r in json.loads((tmp_path / "out.json").read_text())["runs"]] == [1]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_real_jobs_of_one_and_two_workers(tmp_path: Path) -> None:
    assert main([*SMALL, "--workers", "1", "2", "--output", str(tmp_path / "out.json")]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    one, two = content["runs"]
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["prompt_tokens"] == 3 * (90 + 120)
    assert one["output_tokens"] == 6 * 4, "no token ends an output"
    assert one["outputs"] == two["outputs"], "on a CPU exactly"
    assert len(set(one["outputs"].values())) > 1
    assert 0 < one["idle"] < 1
    assert min(one["start_seconds"], two["seconds"]) > 0
