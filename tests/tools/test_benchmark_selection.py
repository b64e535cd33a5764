"""The selection benchmark on a CPU with the references: what it checks, refuses and writes. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tools.benchmark.selection as benchmark
from kernels.block_selection import BlockSelection, select_blocks, share_budgets
from kernels.oam_scores import oam_scores
from pipeline.errors import JobError
from tools.benchmark import _selection_heads, _selection_sample
from tools.benchmark.__main__ import main

SHAPE = ["--heads", "2", "--kv-heads", "1", "--head-dim", "32", "--documents", "2"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda: 1000.0)
    monkeypatch.setattr(benchmark, "fp8_obstacle", lambda device: "not here")
    monkeypatch.setattr(benchmark, "isolated_ms", lambda call, idle: (call(), 3.0)[1])
    monkeypatch.setattr(benchmark, "graph_ms", lambda call, idle: (call(), 2.0)[1])


def run(folder: Path, *flags: str) -> tuple[int, dict[tuple[int, str], Any]]:
    path = folder / "selection.json"
    code = main(["selection", *SHAPE, *flags, "--commit", "abc", "--output", str(path)])
    content = json.loads(path.read_text())
    assert content["about"]["commit"] == "abc"
    return code, {(row.get("tokens", 0), row["case"]): row for row in content["rows"]}


def test_every_case_is_checked_and_written(tmp_path: Path) -> None:
    code, rows = run(tmp_path, "--lengths", "2048", "--every", "8")
    assert code == 0, rows
    names = [
        "OAM scores", "OAM scores, none above the diagonal", "block selection", "OAM scores + selection",
        "the same, last 8K chunk", "budgets shared among heads", "budgets shared, selection, order",
        "sample scores, every 8th query", "decode attention, 2 documents",
    ]  # fmt: skip
    assert list(rows) == [(0, "device copy, read + write"), *((2048, name) for name in names)]
    scores = rows[2048, "OAM scores"]
    assert (scores["ms"], scores["eager ms"]) == (2.0, 3.0)
    assert scores["GB/s"] == pytest.approx(2048 * 32 * (2 + 1 + 1) * 2 / 2e-3 / 1e9)
    assert scores["of copy"] == pytest.approx(scores["GB/s"] / 1000)
    assert rows[2048, "block selection"]["note"].startswith("density 0.")
    flops = 2 * 32 * 2 * 8 * 256 * 257 / 2
    assert rows[2048, "sample scores, every 8th query"]["TFLOP/s"] == pytest.approx(flops / 2e-3 / 1e12)


def test_wrong_scores_get_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(*args: Any, **kwargs: Any) -> Tensor:
        scores = oam_scores(*args, **kwargs)
        scores[:, 0, -1, 1] += 0.01
        return scores

    monkeypatch.setattr(benchmark, "oam_scores", off)
    code, rows = run(tmp_path, "--lengths", "1024", "--only", "OAM")
    assert code == 1
    assert "CHECK FAILED: OAM head 0 row 7" in rows[1024, "OAM scores"]["note"]
    assert all("ms" not in row for row in rows.values())
    assert "CHECK FAILED" in capsys.readouterr().out


def test_a_wrong_selection_gets_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*args: Any, **kwargs: Any) -> BlockSelection:
        selection = select_blocks(*args, **kwargs)
        if kwargs.get("impl") != "reference":
            selection.indices[0, 1, -1, 4] -= 1
        return selection

    monkeypatch.setattr(benchmark, "select_blocks", off)
    code, rows = run(tmp_path, "--lengths", "4096", "--only", "OAM scores")
    assert code == 1
    assert "CHECK FAILED: selection of head 1" in rows[4096, "OAM scores"]["note"]


def test_wrongly_shared_budgets_get_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*args: Any, **kwargs: Any) -> Tensor:
        counts = share_budgets(*args, **kwargs)
        if kwargs.get("impl") != "reference":
            counts[0, 1, -1] += 1
        return counts

    monkeypatch.setattr(_selection_heads, "share_budgets", off)
    code, rows = run(tmp_path, "--lengths", "4096", "--only", "budgets shared")
    assert code == 1
    assert "CHECK FAILED: shared budgets of row 31" in rows[4096, "budgets shared among heads"]["note"]


def test_wrong_shares_and_wrong_decoding_get_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, decode = _selection_sample.sample_scores, benchmark.decode_attention
    monkeypatch.setattr(_selection_sample, "sample_scores", lambda *args, **more: sample(*args, **more) * 1.1)
    monkeypatch.setattr(benchmark, "decode_attention", lambda *args, **more: decode(*args, **more) * 1.1)
    code, rows = run(tmp_path, "--lengths", "1024", "--every", "4", "--only", "sample", "decode")
    assert code == 1
    names = ["sample scores, every 4th query", "decode attention, 2 documents"]
    assert [name for _, name in rows][1:] == names
    assert all("CHECK FAILED" in row["note"] and "ms" not in row for row in list(rows.values())[1:])


def test_the_file_is_written_after_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks_at_256(args: Any, length: int, copy: float) -> list[dict[str, Any]]:
        if length == 256:
            raise KeyboardInterrupt
        return [{"tokens": length, "case": "OAM scores", "ms": 1.0}]

    monkeypatch.setattr(benchmark, "prefill_rows", breaks_at_256)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--lengths", "128", "256")
    assert json.loads((tmp_path / "selection.json").read_text())["rows"][1]["tokens"] == 128


def test_memory_that_is_short_skips_a_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any) -> list[dict[str, Any]]:
        raise torch.OutOfMemoryError("out")

    monkeypatch.setattr(benchmark, "prefill_rows", no_memory)
    code, rows = run(tmp_path, "--lengths", "128", "--only", "OAM")
    assert code == 0
    assert rows[128, "the rest"]["note"] == "skipped: memory"


@pytest.mark.parametrize("length", ["1000", "0", "127"])
def test_part_filled_blocks_are_refused_in_one_line(length: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=f"multiples of 128 tokens, got {length}"):
        main(["selection", "--lengths", length, "--output", str(tmp_path / "x.json")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "DEVICE", "cuda")
    assert main(["selection"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
