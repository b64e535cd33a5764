"""The engine's benchmark on a CPU: it measures what it says, checks first, and writes as it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import jobs.benchmark.engine as benchmark
from jobs.benchmark.__main__ import main
from jobs.benchmark.engine.agreement import check_agreement
from jobs.benchmark.engine.baseline import BaselinePoint, job_baseline
from jobs.benchmark.engine.phases import union_length
from jobs.benchmark.engine.report import rows
from pipeline.errors import JobError

TINY = str(Path(__file__).parents[2] / "models" / "tiny-reader")
FLAGS = (
    f"engine --shape {TINY} --device cpu --lengths 200 100 --latency-lengths 150 --documents 3 --new-tokens 4 "
    "--block-size 16 --dense-layers 1 --chunk-tokens 64 --batches 1 2 --baseline-steps 2"
).split()


def test_phases_end_in_a_file_and_a_table(tmp_path: Path) -> None:
    phases = ["--phases", "baseline", "latency", "decode", "job", "busy"]
    assert main([*FLAGS, *phases, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "engine.json").read_text())
    stem, dense = results["engine"]["stem"], results["engine"]["dense"]
    assert stem["job"]["prompt_tokens"] == [200, 200, 100]
    assert stem["job"]["documents_per_hour"] == pytest.approx(3 * 3600 / stem["job"]["seconds"])
    assert dense["job"]["density"] == 1.0
    assert stem["latency"][0]["attention"] == "stem"
    assert 0.25 < stem["latency"][0]["density"] < 1.0
    assert [(point["prompt_tokens"], point["documents"]) for point in stem["decode"]] == [
        (100, 1), (100, 2), (200, 1), (200, 2),
    ]  # fmt: skip
    assert [point["prompt_tokens"] for point in results["baseline"]["points"]] == [100, 150, 200]
    assert results["baseline"]["points"][0]["measured_steps"] == 2
    table = {row[0]: row[1:] for row in rows(results)}
    assert all(table["job: documents an hour"])
    assert "density" in table["150 tokens: first token"][2]


def test_nothing_is_timed_where_tokens_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differ(*_: Any) -> dict[str, Any]:
        partings = [{"document": 0, "token": 3, "gap": 4.0, "tie": False}]
        return {
            "ok": False, "precision": "fp32", "identical_share": 0.5, "tokens": 8, "documents": 1, "partings": partings,
        }  # fmt: skip

    monkeypatch.setattr(benchmark, "check_agreement", differ)
    assert main([*FLAGS, "--output", str(tmp_path)]) == 2
    assert "baseline" not in json.loads((tmp_path / "engine.json").read_text())


def test_time_limit_skips_and_says_so(tmp_path: Path) -> None:
    assert main([*FLAGS, "--limit-seconds", "-1", "--output", str(tmp_path), "--arms", "dense"]) == 0
    skipped = json.loads((tmp_path / "engine.json").read_text())["skipped"]
    assert [line.split(" ")[0] for line in skipped] == [
        "agreement:",
        "baseline:",
        "latency:",
        "decode:",
        "busy:",
        "job:",
    ]


def test_agreement_on_the_trained_model() -> None:
    check = check_agreement("cpu", "fp32", [1000], 16)
    assert check["ok"]
    assert check["identical_share"] == 1.0
    assert check["tokens"] > 4


def test_baseline_job_is_computed_from_its_points() -> None:
    points = {100: BaselinePoint(100, 2.0, 10.0, 16, 0), 200: BaselinePoint(200, 5.0, 20.0, 16, 0)}
    figures = job_baseline(points, [200, 100, 100], new_tokens=101)
    assert figures["seconds"] == pytest.approx((5 + 2) + 2 * (2 + 1))
    assert "computed" in figures["how"]


def test_union_length() -> None:
    assert union_length([(0, 10), (5, 12), (20, 30), (22, 25)]) == 22
    assert union_length([]) == 0


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="did you mean 'engine'"):
        main(["engin"])
    with pytest.raises(JobError, match=r"llama-3\.1-8b"):
        main(["engine", "--shape", "no-such-shape", "--output", str(tmp_path)])
    with pytest.raises(JobError, match="density"):
        main([*FLAGS, "--density", "2", "--phases", "job", "--output", str(tmp_path)])
