"""The engine's benchmark on a CPU: it measures what it says, checks first, and writes as it goes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tools.benchmark.engine as benchmark
from pipeline.errors import JobError
from tools.benchmark.__main__ import main
from tools.benchmark.engine.agreement import check_agreement, report_prompts
from tools.benchmark.engine.baseline import BaselinePoint, job_baseline
from tools.benchmark.engine.breakdown import breakdown, group_of, own_kernels
from tools.benchmark.engine.phases import union_length
from tools.benchmark.engine.report import plot, rows

TINY = str(Path(__file__).parents[2] / "models" / "tiny-reader")
FLAGS = (
    f"engine --shape {TINY} --device cpu --lengths 200 100 --latency-lengths 150 --documents 3 --new-tokens 4 "
    "--block-size 16 --dense-layers 1 --chunk-tokens 64 --batches 1 2 --baseline-steps 2 "
    "--agreement-tokens 1000"
).split()


def test_a_plot_has_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job alone ended in matplotlib's error, "Data cannot be log-scaled", after everything was measured."""
    drawn: list[tuple[str, Any]] = []
    pyplot = FakePyplot(drawn)
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(use=lambda _: None, pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    job = {"documents_per_hour": 90.0}
    point = {"prompt_tokens": 4096, "first_token_seconds": 0.1, "decode_step_ms": 3.0}
    about = {"shape": "a shape", "stamp": {"device": "cpu"}}
    for arm, panels in (({"job": job}, 1), ({"latency": [point]}, 2), ({"job": job, "latency": [point]}, 3)):
        drawn.clear()
        assert plot({**about, "engine": {"stem-fp8": arm}}, tmp_path / "engine.png") == ""
        assert ("subplots", panels) in drawn
        assert (("set_yscale", "log") in drawn) == ("latency" in arm)
    assert plot({**about, "engine": {"stem-fp8": {"questions": {}}}}, tmp_path / "none.png") == (
        "neither latency nor job was measured"
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install" in plot({**about, "engine": {}}, tmp_path / "none.png")


class FakePyplot:
    """What of matplotlib.pyplot a plot calls, noted: the tests' environment is without it."""

    def __init__(self, drawn: list[tuple[str, Any]]) -> None:
        self._drawn = drawn

    def subplots(self, rows: int, columns: int, **_: Any) -> tuple[Any, list[list[Any]]]:
        self._drawn.append(("subplots", columns))
        return self, [[self] * columns]

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **_: self._drawn.append((name, values[0] if values else None))


def test_phases_end_in_a_file_and_a_table(tmp_path: Path) -> None:
    phases = ["--phases", "baseline", "latency", "decode", "job", "busy"]
    assert main([*FLAGS, *phases, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "engine.json").read_text())
    stem, dense = results["engine"]["stem-fp32"], results["engine"]["dense-fp32"]
    assert stem["job"]["prompt_tokens"] == [200, 200, 100]
    assert stem["job"]["documents_per_hour"] == pytest.approx(3 * 3600 / stem["job"]["seconds"])
    assert dense["job"]["density"] == 1.0
    assert stem["latency"][0]["attention"] == "stem"
    assert 0.25 < stem["latency"][0]["density"] < 1.0
    assert [(point["prompt_tokens"], point["documents"]) for point in stem["decode"]] == [
        (200, 1), (200, 2), (100, 1), (100, 2),
    ]  # fmt: skip
    assert [point["prompt_tokens"] for point in results["baseline"]["points"]] == [100, 150, 200]
    assert results["baseline"]["points"][0]["measured_steps"] == 2
    table = {row[0]: row[1:] for row in rows(results)}
    assert all(table["job: documents an hour"])
    assert table["150 tokens: density"] == ("", f"{stem['latency'][0]['density']:.3f}", "1.000")
    faster = dense["latency"][0]["first_token_seconds"] / stem["latency"][0]["first_token_seconds"]
    assert results["ratios"]["stem-fp32"]["first_token_vs_own_dense"]["150"] == pytest.approx(faster)
    assert results["ratios"]["dense-fp32"]["job_vs_own_dense"] == 1.0


def test_prompt_lookup_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cost by length and documents, and what it gives a model that quotes; other phases run without."""
    module = importlib.import_module("tools.benchmark.engine.lookup")
    monkeypatch.setattr(module, "report_prompts", lambda lengths: report_prompts([1200, 600]))
    flags = ["--phases", "decode", "lookup", "--arms", "dense", "--max-live", "2", "--output", str(tmp_path)]
    assert main([*FLAGS, *flags]) == 0
    results = json.loads((tmp_path / "engine.json").read_text())
    arm = results["engine"]["dense-fp32"]
    assert arm["about"]["prompt_lookup"] == "off"
    found = arm["lookup"]
    places = [(point["prompt_tokens"], point["documents"]) for point in found["steps"]]
    assert places == [(200, 1), (200, 2), (100, 1), (100, 2)]
    for point in found["steps"]:
        assert point["cost"] == pytest.approx(point["drafts_ms"] / point["plain_ms"])
    assert set(found["random"]) == {"off", "auto"}
    trained = results["lookup_of_trained"]["fp32"]
    assert trained["off"]["tokens_per_step"] == 1.0 < trained["auto"]["tokens_per_step"]
    assert trained["outputs_that_part_per_1000_tokens"] == 0
    assert {row[0] for row in rows(results)} >= {
        "lookup, 1 x 200: step with drafts over plain", "lookup, trained: tokens of a step",
    }  # fmt: skip


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
        "questions:",
        "lookup:",
        "baseline:",
        "latency:",
        "job:",
        "error:",
        "error:",
    ]


def test_the_output_error_is_measured(tmp_path: Path) -> None:
    """What is off by more than next to nothing, as every sparse prefill is, is read densely."""
    flags = ["--phases", "latency", "--arms", "stem", "--max-output-error", "1e-9", "--output", str(tmp_path)]
    assert main([*FLAGS, *flags]) == 0
    (point,) = json.loads((tmp_path / "engine.json").read_text())["engine"]["stem-fp32"]["latency"]
    assert (point["attention"], point["density"]) == ("dense", 1.0)


def test_what_runs_on_one_gpu_is_refused_on_several(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="baseline, profile, busy, vllm run on one GPU; leave them out"):
        main([*FLAGS, "--gpus-per-worker", "2", "--output", str(tmp_path)])


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


def test_every_precision_has_its_arms_and_its_errors(tmp_path: Path) -> None:
    flags = (
        f"{' '.join(FLAGS)} --phases latency profile job error --precision fp32 fp8 --main-arms stem-fp8 "
        f"--block-size 32 --error-tokens 300 --error-document 400 --dense-layers 0 --documents 1 --output {tmp_path}"
    )
    assert main(flags.split()) == 0
    results = json.loads((tmp_path / "engine.json").read_text())
    arms = results["engine"]
    assert list(arms) == ["stem-fp32", "stem-fp8", "dense-fp32", "dense-fp8"]
    assert [name for name, arm in arms.items() if "job" in arm] == ["stem-fp8"]
    assert arms["stem-fp8"]["about"]["precision"] == "fp8"
    assert arms["stem-fp8"]["plan_of_one"]["bytes_per_token"] * 4 == arms["stem-fp32"]["plan_of_one"]["bytes_per_token"]
    assert len(results["error"]) == 2
    for model in results["error"].values():
        found = {variant["variant"]: variant for variant in model["variants"]}
        assert len(found) == 5
        assert all(0 < variant["layer_errors"][0] < 0.5 for name, variant in found.items() if "dense" in name)
        assert all(0 <= variant["kl_mean"] <= variant["kl_max"] < 5 for variant in found.values())
        assert found["dense fp8"]["density"] == 1.0 > found["stem fp8"]["density"]


def test_a_phase_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(benchmark, "job", fails)
    assert main([*FLAGS, "--phases", "latency", "job", "decode", "--arms", "dense", "--output", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "engine.json").read_text())
    assert results["failed"] == ["job: dense-fp32: RuntimeError: no such luck"]
    assert results["engine"]["dense-fp32"]["latency"]


def test_kernels_are_grouped_by_name() -> None:
    kernels = own_kernels()
    assert kernels["block_sparse_attention_fp8_hopper"] == "attention"
    assert {kernels["score_kernel"], kernels["select_kernel"], kernels["sample_kernel"]} == {"selection"}
    assert kernels["grouped_linear_kernel"] == "linears"
    assert {kernels["rms_norm_kernel"], kernels["write_kernel"], kernels["silu_mul_fp8_kernel"]} == {"elementwise"}
    library = {
        "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n": "linears",
        "nvjet_qqtst_128x256_128x4_2x1_v_bz_coopA_NNT": "linears",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>": "linears",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>": "elementwise",
        "Memcpy HtoD (Pinned -> Device)": "elementwise",
        "something_new": "other",
    }
    assert {name: group_of(name) for name in library} == library


def test_breakdown_adds_up() -> None:
    events = [
        ("rms_norm_kernel", 0, 2_000_000),
        ("nvjet_x", 3_000_000, 7_000_000),
        ("score_kernel", 6_000_000, 8_000_000),
    ]
    found = breakdown(events)
    assert (found["wall_ms"], found["busy_ms"], found["gaps_ms"], found["launches"]) == (8.0, 7.0, 1.0, 3)
    assert found["groups_ms"] == {"linears": 4.0, "attention": 0, "selection": 2.0, "elementwise": 2.0, "other": 0}


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


QUESTIONS = "--phases questions --questions 4 --questions-each 2 --question-tokens 20 --max-live 4"


def test_questions(tmp_path: Path) -> None:
    assert main([*FLAGS, *QUESTIONS.split(), "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "engine.json").read_text())
    assert results["questions_agreement"]["identical_share"] == 1.0
    for arm in results["engine"].values():
        found = arm["questions"]
        assert (found["questions"], found["job_documents"], found["job_questions_each"]) == (4, 3, 2)
        assert found["all_vs_one"] == pytest.approx(found["all_seconds"] / found["one_seconds"])
        assert found["jobs_vs_questions"] == pytest.approx(
            2 * found["job_of_one_question_seconds"] / found["job_seconds"]
        )
        assert found["step_vs_one"] > 0
    assert any(row[0] == "questions: all_vs_one" and row[2].endswith("x") for row in rows(results))


def test_questions_are_not_timed_where_tokens_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "check_agreement", lambda *_, **__: {"ok": False})
    assert main([*FLAGS, *QUESTIONS.split(), "--arms", "dense", "--output", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "engine.json").read_text())
    assert len(results["failed"]) == 2
    assert "questions" not in results["engine"]["dense-fp32"]
