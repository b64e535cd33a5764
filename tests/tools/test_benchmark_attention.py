"""The attention benchmark on a CPU with the references: what it runs, refuses, skips and writes. Nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tools.benchmark.attention as benchmark
from kernels.block_sparse_attention import block_sparse_attention
from pipeline.errors import JobError
from tools.benchmark import _attention_cases as cases
from tools.benchmark import _measure as measuring
from tools.benchmark.__main__ import main
from tools.benchmark._attention_cases import Case

SHAPE = ["--heads", "2", "--kv-heads", "1", "--head-dim", "16"]
OURS = ["--only", "ours", "Stem", "preset", "selection alone"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    monkeypatch.setattr(cases, "fp8_obstacle", lambda device: "not here")
    monkeypatch.setattr(benchmark, "isolated_ms", lambda call, idle, repeats, seconds: 2.0)
    monkeypatch.setattr(benchmark, "sustained_ms", lambda call, seconds, ms: 4.0)


def run(folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["attention", *SHAPE, *flags, "--commit", "abc", "--output", str(folder)])
    return code, json.loads((folder / "attention.json").read_text())


def test_every_case_of_ours_is_checked_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, content = run(tmp_path, *OURS, "--lengths", "1536", "2000", "--densities", "0.7")
    assert code == 0, content["rows"]
    assert content["commit"] == "abc"
    assert content["head_dim"] == 16
    rows = {(row["tokens"], row["case"]): row for row in content["rows"]}
    names = [
        "dense ours reference", "selection alone (OAM)", "70% ours reference", "70% Stem, selection included",
        "sampled preset, selection included", "release preset, selection included",
    ]  # fmt: skip
    assert list(rows) == [(length, name) for length in (1536, 2000) for name in names]
    sparse = rows[1536, "70% ours reference"]
    assert 0.7 < sparse["density"] < 1
    assert 0 < sparse["error"] < 0.01
    assert 0 < abs(sparse["bias"]) < 1e-3
    assert [row["row"] for row in sparse["rows"]] == [1023, 1535]
    assert sparse["sustained ms"] == 4.0
    blocks = round(sparse["density"] * 12 * 13 / 2 * 2)
    assert sparse["TFLOP/s"] == pytest.approx(4 * 128 * 128 * 16 * blocks / 2e-3 / 1e12)
    assert "error" not in rows[1536, "selection alone (OAM)"]
    assert rows[2000, "release preset, selection included"]["density"] == 1.0  # all blocks of a short prompt
    text = (tmp_path / "attention.txt").read_text()
    assert "70% ours reference" in text
    assert "density" in text
    assert text in capsys.readouterr().out


def test_a_wrong_result_gets_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slightly_wrong(*args: Any, **kwargs: Any) -> Tensor:
        out = block_sparse_attention(*args, **kwargs)
        assert isinstance(out, Tensor)
        out[:, 1, -1] *= 1.5
        return out

    monkeypatch.setattr(cases, "block_sparse_attention", slightly_wrong)
    # All of the two heads' blocks are sampled in so short a prompt.
    code, content = run(tmp_path, "--only", "dense ours", "--lengths", "256")
    (row,) = content["rows"]
    assert code == 1
    assert row["status"] == "failed"
    assert "allowed" in row["note"]
    assert "ms" not in row
    assert "TFLOP/s" not in row
    assert "failed: dense ours reference at 256 tokens" in capsys.readouterr().err


def test_a_biased_row_gets_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.2% too little in the last rows is less than bfloat16's own error, which is all that the pooled check asks."""

    def truncates(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = block_sparse_attention(q.float(), k.float(), v.float(), *args, **kwargs)
        assert isinstance(out, Tensor)
        out[:, :, 1050:] *= 0.998
        return out

    monkeypatch.setattr(cases, "block_sparse_attention", truncates)
    code, content = run(tmp_path, "--only", "dense ours", "--lengths", "1024", "1100")
    right, wrong = content["rows"]
    assert code == 1
    assert (right["status"], wrong["status"]) == ("ok", "failed")
    assert "row 1099, 1100 keys: mean signed error -0.20%, allowed 0.1%" in wrong["note"]
    assert [row["row"] for row in wrong["rows"]] == [1023, 1099]
    assert wrong["bias"] == wrong["rows"][1]["bias"] == pytest.approx(-0.002, abs=1e-5)
    assert "ms" not in wrong


def test_rows_that_are_not_finite_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "block_sparse_attention", lambda q, *rest, **more: torch.full_like(q, torch.nan))
    code, content = run(tmp_path, "--only", "dense ours", "--lengths", "128")
    assert code == 1
    assert "ms" not in content["rows"][0]


def test_memory_that_is_short_skips_a_case_or_a_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out")

    monkeypatch.setattr(cases, "random_selection", no_memory)
    code, content = run(tmp_path, "--only", "ours", "--lengths", "256", "--densities", "0.5")
    dense, sparse = content["rows"]
    assert code == 0
    assert dense["ms"] == 2.0
    assert (sparse["status"], sparse["note"]) == ("no memory", "skipped: memory")

    monkeypatch.setattr(torch, "randn", no_memory)
    code, content = run(tmp_path, "--lengths", "128", "256")
    assert code == 0
    assert [(row["tokens"], row["note"]) for row in content["rows"]] == [
        (128, "skipped: memory"), (256, "skipped: memory"),
    ]  # fmt: skip


def test_the_file_is_written_after_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks_at_256(q: Tensor, k: Tensor, v: Tensor, densities: list[float], flex: bool) -> Iterator[Case]:
        if q.shape[2] == 256:
            raise KeyboardInterrupt
        yield Case("dense ours", lambda: (lambda: block_sparse_attention(q, k, v, None), None))

    monkeypatch.setattr(benchmark, "table_cases", breaks_at_256)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--lengths", "128", "256")
    content = json.loads((tmp_path / "attention.json").read_text())
    assert [(row["tokens"], row["ms"]) for row in content["rows"]] == [(128, 2.0)]
    assert "dense ours" in (tmp_path / "attention.txt").read_text()


def test_quick_rests_less_and_flags_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    flexed: dict[int, bool] = {}

    def record(call: Callable[[], object], idle: float, repeats: int, seconds: float) -> float:
        seen.append((idle, seconds))
        return 1.0

    def one_case(q: Tensor, k: Tensor, v: Tensor, densities: list[float], flex: bool) -> Iterator[Case]:
        flexed[q.shape[2]] = flex
        yield Case("dense ours", lambda: (lambda: block_sparse_attention(q, k, v, None), None))

    monkeypatch.setattr(benchmark, "isolated_ms", record)
    monkeypatch.setattr(benchmark, "table_cases", one_case)
    _, content = run(tmp_path, "--quick", "--lengths", "128")
    assert content["rows"][0]["sustained ms"] is None
    run(tmp_path, "--quick", "--idle", "7", "--lengths", "256", "--flex-lengths", "256")
    run(tmp_path, "--lengths", "384")
    quick = benchmark.QUICK
    assert seen == [(quick["idle"], quick["seconds"]), (7.0, quick["seconds"]), (1.5, 2.0)]
    assert flexed == {128: False, 256: True, 384: True}


def test_crossover_compares_stem_with_the_fastest_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = {128: 1.0, 256: 3.0, 384: 2.0, 512: 4.0}

    def three(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
        for name in ("dense cuDNN", "dense ours", "Stem"):
            yield Case(name, lambda: (lambda: block_sparse_attention(q, k, v, None), None))

    times = iter(ms for length in dense for ms in (dense[length] + 1, dense[length], 2.5))
    monkeypatch.setattr(benchmark, "isolated_ms", lambda *_: next(times))
    monkeypatch.setattr(benchmark, "crossover_cases", three)
    lengths = [str(length) for length in dense]
    _, content = run(tmp_path, "--only", "nothing", "--lengths", "--crossover", "--crossover-lengths", *lengths)
    assert [(row["tokens"], row["fastest dense"], row["Stem faster by"]) for row in content["crossover"]] == [
        (128, "dense ours", 0.4), (256, "dense ours", 1.2), (384, "dense ours", 0.8), (512, "dense ours", 1.6),
    ]  # fmt: skip
    assert content["dense_below"] == 512
    assert "dense_below: 512 tokens" in (tmp_path / "attention.txt").read_text()


def test_without_a_win_at_the_longest_there_is_no_crossover() -> None:
    rows = [{"tokens": n, "case": c, "ms": m, "density": 1.0} for n, c, m in (
        (128, "dense ours", 2.0), (128, "Stem", 1.0), (256, "dense ours", 1.0), (256, "Stem", 2.0), (384, "Stem", 1.0),
    )]  # fmt: skip
    summary, dense_below = benchmark.summarise_crossover(rows)
    assert [row["tokens"] for row in summary] == [128, 256]
    assert dense_below is None


def test_repeats_fit_the_seconds_given(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def timed(call: Callable[[], object], repeats: int) -> list[float]:
        counts.append(repeats)
        return [100.0 + i for i in range(repeats)]

    monkeypatch.setattr(measuring, "_timed", timed)
    assert measuring.isolated_ms(lambda: None, 0.0, 9, 0.55) == 102.0  # the median of five
    assert measuring.isolated_ms(lambda: None, 0.0, 9, 0.01) == 100.0
    assert measuring.isolated_ms(lambda: None, 0.0) == 102.0
    assert counts == [1, 5, 1, 1, 1, 5]


@pytest.mark.parametrize(("flags", "message"), [(["--lenghts", "1"], "--lengths"), (["--heads", "x"], "invalid int")])
def test_wrong_flags_are_named(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=message):
        main(["attention", *flags, "--output", str(tmp_path)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "DEVICE", "cuda")
    assert main(["attention", "--output", str(tmp_path)]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
