"""The column `kernel` and the line about slower paths say what attention was asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_models import prompts, run, save_model

import pipeline.engine.describe as describe
import stem_core.attention as attention
from kernels.dispatch import Choice
from pipeline.engine import Engine, EngineConfig, Request
from stem_core import StemConfig

STEM = StemConfig(
    schedule="density", density=0.4, block_size=16, stride=8, sink_blocks=1, local_blocks=2, dense_layers=1
)
WINDOW = 70
TYPES = ["full_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.parametrize("stem", [STEM, None], ids=["stem", "dense"])
@pytest.mark.parametrize("tokens", [WINDOW, 300], ids=["window larger", "window smaller"])
def test_described_as_attention_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, stem: StemConfig | None
) -> None:
    """Block sizes and windows in the row are those of the calls, whether or not the window cuts the prompt."""
    called: list[str] = []
    compute = attention.block_sparse_attention

    def spy(q: Any, k: Any, v: Any, selection: Any, *, block_size: int, window: int | None, **rest: Any) -> Any:
        called.append(f"{128 if selection is None else block_size}/{window}")
        return compute(q, k, v, selection, block_size=block_size, window=window, **rest)

    def choose(q: Any, block_size: int, *, window: int | None) -> Choice:
        return Choice(f"{block_size}/{window}")

    folder = save_model(tmp_path, "gemma3", sliding_window=WINDOW, layer_types=TYPES)
    engine = Engine(EngineConfig(str(folder), device="cpu", chunk_tokens=512, arena_tokens=1024, attention=stem))
    monkeypatch.setattr(attention, "block_sparse_attention", spy)
    monkeypatch.setattr(describe, "choose_block_sparse_attention", choose)
    kernel = run(engine, [Request("a", prompts([tokens])[0], 1)])["a"].kernel
    prefill = next(part for part in kernel.split(", ") if part.startswith("prefill: "))
    assert prefill == "prefill: " + " and ".join(dict.fromkeys(called))
    assert ("scores" in kernel) == any(call.startswith("16/") for call in called)
    assert (f"128/{WINDOW}" in called) == (tokens > WINDOW)
    assert ("16/None" in called) == (tokens == WINDOW and stem is not None)


@pytest.mark.parametrize("whole", [1, 2])
@pytest.mark.parametrize("stem", [STEM.replace(dense_layers=0), None], ids=["stem", "dense"])
def test_a_model_of_few_layers_without_a_window_is_told_of(tmp_path: Path, whole: int, stem: StemConfig | None) -> None:
    kinds = ["full_attention"] * whole + ["sliding_attention"] * (4 - whole)
    changes = {"num_hidden_layers": 4, "sliding_window": WINDOW, "layer_types": kinds}
    engine = Engine(
        EngineConfig(str(save_model(tmp_path, "gemma3", **changes)), device="cpu", arena_tokens=1024, attention=stem)
    )
    notes = engine.describe()["notes"]
    assert len(notes) == (whole == 1 and stem is not None)
    assert all("only 1 of this model's 4 layers of attention look beyond a window" in note for note in notes)


def test_a_slower_path_is_told_but_not_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(EngineConfig(str(save_model(tmp_path, "llama")), device="cpu", arena_tokens=1024, attention=STEM))
    assert engine.describe()["slower"] == []
    reasons = {16: "blocks of 128 only", 128: ""}

    def choose(q: Any, block_size: int, *, window: int | None) -> Choice:
        return Choice("triton" if reasons[block_size] else "gluon", reasons[block_size])

    monkeypatch.setattr(describe, "choose_block_sparse_attention", choose)
    assert engine.describe()["kernels"]["prefill"] == "gluon and triton (blocks of 128 only)"
    assert engine.describe()["slower"] == ["prefill of some layers runs on triton, not gluon: blocks of 128 only"]
    monkeypatch.setitem(reasons, 128, "Triton 9")
    monkeypatch.setitem(reasons, 16, "Triton 9")
    assert engine.describe()["slower"] == ["prefill runs on triton, not gluon: Triton 9"]
