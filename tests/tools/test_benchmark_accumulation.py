"""The benchmark of fp8 sums on a CPU: it finds a bias where there is one, and none in the references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tools.benchmark.accumulation as benchmark
from tools.benchmark.__main__ import main

ROOT = Path(__file__).parents[2]
SIZES = "--inputs 256 --rows 16 --outputs 32 --lengths 256 --heads 4 --kv-heads 2 --head-dim 32"
FLAGS = ["accumulation", *SIZES.split()]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")


def run(folder: Path, *flags: str) -> dict[str, Any]:
    assert main([*FLAGS, *flags, "--output", str(folder)]) == 0
    return json.loads((folder / "accumulation.json").read_text())


def test_sums_and_logits_are_measured(tmp_path: Path) -> None:
    model = str(ROOT / "models/tiny-reader")
    found = run(tmp_path, "--model", model, "--tokens", "300", "--positions", "40")
    assert len(found["rows"]) == 3 * 2 + 2 * 4
    # A reference rounds its output to bfloat16, keys and values to e4m3; neither leans to one side.
    assert all(abs(row["bias"]) < 2e-3 for row in found["rows"]), found["rows"]
    assert all(row["error"] < (0.04 if "stored" in row["what"] else 0.01) for row in found["rows"])
    assert [row["variant"] for row in found["logits"]] == ["dense fp8, precise", "dense fp8, fast accumulation"]
    precise, fast = found["logits"]
    assert 0 < precise["kl_mean"] < 0.1
    assert precise["positions"] == 40
    assert {key: fast[key] for key in fast if key != "variant"} == {
        key: precise[key] for key in precise if key != "variant"
    }, "on a CPU both are the same sums"


def test_a_lossy_sum_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = benchmark.scaled_linear

    def lossy(*given: Any, fast_accumulation: bool) -> Tensor:
        out = exact(*given)
        return out * 0.98 if fast_accumulation else out

    monkeypatch.setattr(benchmark, "scaled_linear", lossy)
    found = run(tmp_path)
    fast = [row for row in found["rows"] if "fast" in row["what"]]
    assert len(fast) == 3
    assert all(row["bias"] == pytest.approx(-0.02, abs=4e-3) and row["note"] == "past 0.1%" for row in fast)
    assert "past 0.1%" in (tmp_path / "accumulation.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "DEVICE", "cuda")
    assert main([*FLAGS, "--output", str(tmp_path)]) == 1
    assert "no CUDA device" in capsys.readouterr().err
