"""The dry run's time and cost: from rows, from the benchmarks of the same GPU, or said not to be known."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from result_rows import make_row

from pipeline.errors import JobError
from pipeline.job.dry_run import describe_plan
from pipeline.job.estimate import (
    BENCHMARKS,
    JOB_LENGTHS,
    JOB_OUTPUTS,
    PAGE,
    Machine,
    Workload,
    dense_line,
    estimate_lines,
)
from pipeline.results.rows import result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from stem_core.config import StemConfig

ROOT = Path(__file__).parents[2]
BEGUN = datetime(2026, 1, 1, tzinfo=UTC)
H200 = Machine("NVIDIA H200", 1, 1, "m", 15 << 30, "bf16", "stem", True)
JOB = Workload(np.array(JOB_LENGTHS * 4), 16, JOB_OUTPUTS)


def write(folder: Path, *rows: dict[str, Any]) -> Store:
    """Rows of workers that began at BEGUN; `end` is the second at which a row ended."""
    store = Store(str(folder))
    store.create()
    sink = Sink(store, result_schema(), flush_documents=100, flush_seconds=100)
    for number, row in enumerate(rows):
        known = {"worker": "w0", "gpu": "NVIDIA H200", "model": "m", "precision": "bf16", "config_hash": "c"}
        known |= {"prompt_hash": "p", "started_at": BEGUN, "queue_seconds": 0.0, "load_seconds": 0.0}
        known |= {"tokenize_seconds": 0.0, "total_seconds": 1.0, "truncated_tokens": 0, "parts": 1}
        ended = BEGUN + timedelta(seconds=row["end"])
        sink.add(
            make_row(
                f"d{number}",
                "x",
                output="o",
                finished_at=ended,
                **{n: v for n, v in (known | row).items() if n != "end"},
            )
        )
    sink.flush()
    return store


SHORT = {"prompt_tokens": 1000, "output_tokens": 50, "prefill_seconds": 1.0}
LONG = {"prompt_tokens": 100_000, "output_tokens": 150, "prefill_seconds": 500.0}


def test_time_follows_from_rows_by_the_lengths_of_prompts(tmp_path: Path) -> None:
    store = write(tmp_path, SHORT | {"end": 5.0}, LONG | {"end": 521.0})  # 20 s of 521 are not prefill, for 200 tokens
    work = Workload(np.array([1000] * 10 + [100_000] * 2), 12, 12 * 256)
    lines = list(estimate_lines(work, H200, store, 3.0))
    # 10 x 1 s, 2 x 500 s, and 12 outputs of 100 tokens at 0.1 s: 1,130 s
    assert lines[0] == "time: about 18:50 with 1 worker, 0.31 GPU hours in all; loading the model comes on top"
    assert lines[1] == f"  from 2 rows in {store.name} (NVIDIA H200, bf16); prompts of 1,000 to 100,000 tokens"
    assert lines[2] == "  outputs: 12, of 100 tokens as in those rows"
    assert lines[3] == "cost: about 0.94 at 3 a GPU hour"
    (halved, *_) = estimate_lines(work, replace(H200, workers=2), store, None)
    assert halved.startswith("time: about 9:25 with 2 workers, 0.31 GPU hours in all")
    (many, *_) = estimate_lines(work, replace(H200, workers=12), store, None)
    assert many.startswith("time: about 8:20 with 12 workers"), "no sooner than the longest document"


def test_rows_behind_a_shared_reading_tell_no_speed_of_reading(tmp_path: Path) -> None:
    shared = SHORT | {"prefix_tokens": 990, "prefill_seconds": 0.0, "end": 6.0}
    store = write(tmp_path, SHORT | {"end": 6.0}, shared, shared)
    (line, *_) = estimate_lines(Workload(np.array([1000]), 3, 768), H200, store, None)
    assert line.startswith("time: about 0:06 "), "1 s to read and 5 s for three outputs"


def test_rows_of_other_models_and_gpus_do_not_count(tmp_path: Path) -> None:
    store = write(tmp_path, LONG | {"end": 9.0, "model": "other"})
    lines = list(estimate_lines(JOB, replace(H200, gpu="NVIDIA A10"), store, 2.0))
    assert lines[0] == f"time: not known for this model on NVIDIA A10; those in {store.name} are of other"
    assert "--shard 0/2, another --output), then give --estimate-from" in lines[1], "a share has some documents"
    assert lines[2] == "cost: not known, since the time is not"
    store = write(tmp_path / "more", LONG | {"end": 9.0})
    (line, *_) = estimate_lines(JOB, replace(H200, gpu="NVIDIA A10"), store, None)
    assert line.endswith(f"the rows in {store.name} are of NVIDIA H200")
    (line, *_) = estimate_lines(JOB, replace(H200, gpus_per_worker=2), store, None)
    assert "not known" in line, "one GPU's rows say nothing of a model that is spread over two"
    (line, *_) = estimate_lines(JOB, replace(H200, gpu=""), store, None)
    assert line.startswith("time: about"), "a driver without a GPU takes the rows' word for it"


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda each: f"{each.gpu} {each.precision} {each.attention}")
def test_benchmarks_give_their_own_job(benchmark: Any, tmp_path: Path) -> None:
    weights = int(benchmark.weights * (1 << 30))
    machine = Machine(benchmark.gpu, 1, 1, "m", weights, benchmark.precision, benchmark.attention, True)
    lines = list(estimate_lines(JOB, machine, Store(str(tmp_path)), None))
    minutes, seconds = re.findall(r"about (\d+):(\d+) ", lines[0])[0]
    assert abs(int(minutes) * 60 + int(seconds) - benchmark.job_seconds) <= 1
    assert PAGE in lines[1]
    for changed in (
        {"weights": weights * 2}, {"weights": weights // 2}, {"plain": False}, {"gpu": "NVIDIA A10"}, {"gpu": "cpu"},
        {"precision": "fp16"}, {"gpus_per_worker": 2},
    ):  # fmt: skip
        lines = list(estimate_lines(JOB, replace(machine, **changed), Store(str(tmp_path)), None))
        assert lines[0].startswith("time: not known"), changed
    lines = list(estimate_lines(JOB, machine, Store(str(tmp_path)), None, only=True))
    assert lines[0].startswith("time: not known"), "where rows were named, nothing else is asked"


def test_figures_are_those_of_the_page() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    for each in BENCHMARKS:
        assert f"{each.job_seconds} s" in page, each
        for length, seconds in each.first_token:
            rows = [line for line in page.splitlines() if f"first token, {length:,} tokens" in line]
            assert any(re.search(rf"\| {seconds:g}0? s", row) for row in rows), (each, length)


def test_documents_that_attend_densely_are_counted() -> None:
    stem = StemConfig.preset("sampled")
    both = "all 2 documents are too short for sparse attention: they attend densely"
    assert dense_line(np.array([100, 8576]), stem) == both, "the budget keeps all of 67 blocks"
    told = "2 of 3 documents are too short for sparse attention: they attend densely"
    assert dense_line(np.array([100, 8577, 8576]), stem) == told
    assert dense_line(np.array([5]), stem) == "the only document is too short for sparse attention: it attends densely"
    assert dense_line(np.array([8577]), stem) == ""
    assert dense_line(np.array([8990, 9000]), stem.replace(dense_below=9000)).startswith("1 of 2 documents"), "9,088"
    assert dense_line(np.array([5]), None) == ""


def test_a_dry_run_says_time_and_cost(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("The draft survey was mapped last winter. " * 400)
    settings: dict[str, Any] = {
        "input": (str(tmp_path / "a.txt"),),
        "output": str(tmp_path / "out"),
        "model": str(model),
    }
    settings |= {"device": "cpu", "workers": 1, "gpu_hour_price": 2.0}
    lines = list(describe_plan(JobConfig(**settings)))
    assert "dense: the only document is too short for sparse attention: it attends densely" in lines
    assert "time: not known for this model on these CPUs" in lines
    assert not any("--shard" in line for line in lines), "one document has no shares"
    row = {"prompt_tokens": 3000, "output_tokens": 20, "prefill_seconds": 3.0, "end": 5.0, "model": str(model)}
    write(tmp_path / "earlier", row | {"gpu": "cpu"})
    lines = list(describe_plan(JobConfig(**settings, estimate_from=str(tmp_path / "earlier"))))
    assert any(line.startswith("time: about 0:0") and line.endswith("comes on top") for line in lines)
    assert "cost: none of GPUs, the job runs on CPUs" in lines
    with pytest.raises(JobError, match=r"--estimate-from .*/nothing: it holds no results"):
        list(describe_plan(JobConfig(**settings, estimate_from=str(tmp_path / "nothing"))))


def test_a_dry_run_says_what_it_cannot_read(tmp_path: Path, model: Path) -> None:
    """The column named holds objects, say, as that of a batch of OpenAI's does."""
    (tmp_path / "batch.jsonl").write_text('{"custom_id": "r0", "body": {"messages": []}}\n')
    here = {"input": (str(tmp_path / "batch.jsonl"),), "output": str(tmp_path / "out"), "model": str(model)}
    lines = list(describe_plan(JobConfig(**here, text_column="body", id_column="custom_id", device="cpu")))
    told = "unreadable: 1 of a sample of 1 documents, e.g. r0: its text is dict, expected a string"
    assert told in lines
