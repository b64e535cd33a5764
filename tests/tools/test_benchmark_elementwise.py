"""The elementwise benchmark's cases and its check, on the CPU with the references; nothing is timed."""

from __future__ import annotations

import argparse

import pytest
import torch

from tools.benchmark import elementwise
from tools.benchmark.elementwise import case as case_module
from tools.benchmark.elementwise import cases, experts, models
from tools.benchmark.elementwise.case import Case, measure

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    monkeypatch.setattr(experts, "DEVICE", "cpu")
    monkeypatch.setattr(models, "DEVICE", "cpu")
    monkeypatch.setattr(case_module, "time_ms", lambda call, count, idle: 1.0)


@pytest.mark.parametrize("rows", [1, 300])
@torch.inference_mode()
def test_every_case_passes_its_check(rows):
    found = [*cases.row_cases(SHAPE, rows), *cases.linear_cases(SHAPE, rows)]
    for case in found:
        row = measure(case, rows, 0.0)
        assert row["status"] == "ok", row
        limit = 0.05 if "fp8" in case.name or "quantize" in case.name else 0.005
        assert row["error"] < limit, row
    assert len(found) == 7 + 4 * 3 + 1


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize(
    "mixture",
    [
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    ],
    ids=lambda mixture: mixture["model_type"],
)
@torch.inference_mode()
def test_every_case_of_experts_passes_its_check(mixture, rows):
    found = list(experts.expert_cases(SHAPE | mixture, rows))
    for case in found:
        row = measure(case, rows, 0.0)
        assert row["status"] == "ok", row
        assert row["error"] < (0.1 if "whole" in case.name else 0.005), row
    assert len(found) == 1 + 2 * 2
    assert not list(experts.expert_cases(SHAPE, rows))


@torch.inference_mode()
def test_models_are_compared_with_float64():
    for case, count in models.model_cases(SHAPE, 1, [2, 1100]):
        row = measure(case, count, 0.0)
        assert row["status"] == "ok", row
        assert 0 < row["eager error"] < 0.02
        assert row["error"] < (0.15 if "fp8" in case.name else 0.02), row


def test_a_wrong_result_gets_no_speed():
    x = torch.randn(4, 8)
    row = measure(Case("wrong", lambda: x * 1.01, lambda: x, x.double), 4, 0.0)
    assert row["status"] == "failed"
    assert "ms" not in row
    assert "error" in row["note"]
    broken = measure(Case("broken", lambda: x / 0, lambda: x, x.double), 4, 0.0)
    assert broken["status"] == "failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    elementwise.add_arguments(parser)
    assert elementwise.main(parser.parse_args(["--output", str(tmp_path)])) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
