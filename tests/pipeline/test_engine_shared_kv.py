"""Layers that read the keys and values of another layer (Gemma 3n and 4)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import run

from pipeline.engine import Engine, EngineConfig, Request, estimate_plan
from pipeline.engine.config import ModelRefusedError
from pipeline.engine.kv.arena import Extent
from pipeline.engine.run.prefill import Prefill
from stem_core import StemConfig
from tools.models.check import build

STEM = StemConfig(block_size=16, schedule="density", density=0.5, dense_layers=0, dense_below=0)


@pytest.fixture(scope="module", params=["gemma3n_text", "gemma4_text"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return str(folder), build(request.param, folder)


def engine(folder: str, attention: StemConfig | None = None, lookup: str = "auto") -> Engine:
    options = {"attention": attention, "arena_tokens": 1024, "chunk_tokens": 128, "prompt_lookup": lookup}
    return Engine(EngineConfig(folder, device="cpu", **options))


def test_they_have_no_arena_of_their_own(saved: tuple[str, Any]) -> None:
    folder, _ = saved
    runner = engine(folder)._runner
    assert runner.sources == {4: 3, 5: 2}
    assert sorted(runner.shapes) == [0, 1, 2, 3]
    assert len(runner.new_arena(64).tensors()) == 8
    assert estimate_plan(EngineConfig(folder, device="cpu")).bytes_per_token == runner.bytes_per_token()


def test_fp8_is_refused_before_weights_are_read(saved: tuple[str, Any], tmp_path: Path) -> None:
    shutil.copy(Path(saved[0], "config.json"), tmp_path)
    for call in (Engine, estimate_plan):
        with pytest.raises(ModelRefusedError, match=r"\(shared KV\), as layer 4 of this model does: use bf16"):
            call(EngineConfig(str(tmp_path), device="cpu", precision="fp8"))


def test_layers_that_read_the_last_token_alone_run_in_the_last_chunk_alone(
    saved: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 4 hands them the last query alone, Gemma 3n all."""
    folder, whole = saved
    held = engine(folder, STEM, lookup="off")
    gemma4 = "Gemma4" in type(whole).__name__
    assert [policy.layer for policy, _ in held._runner.layers] == ([0, 1, 2, 3] if gemma4 else [0, 1, 2, 3, 4, 5])
    calls: list[int] = []
    layer: Any = next(
        m for m in held._runner.model.modules() if getattr(m, "layer_idx", None) == 4 and hasattr(m, "q_proj")
    )
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    # A last chunk of one token must not take them for sparse layers.
    assert run(held, [Request("a", np.arange(257) % 100 + 3, 3)])["a"].status == "ok"
    assert calls == ([1, 1, 1] if gemma4 else [128, 128, 1, 1, 1])


def test_layers_behind_the_last_one_with_keys_get_every_row(saved: tuple[str, Any]) -> None:
    """Only the layer that runs last leaves rows out (test_engine_last_layer): in Gemma 4 others follow it."""
    folder, whole = saved
    runner = engine(folder, STEM)._runner
    layers = runner.model.get_decoder().layers  # type: ignore[operator]
    replaced = [index for index, layer in enumerate(layers) if "forward" in vars(layer)]
    assert replaced == ([] if "Gemma4" in type(whole).__name__ else [len(layers) - 1])


def test_every_row_of_a_prompt_can_be_read(saved: tuple[str, Any]) -> None:
    """As likelihoods are: then all queries come to these layers, too."""
    folder, whole = saved
    runner = engine(folder)._runner
    ids = np.arange(200, dtype=np.int64) % 100 + 3
    arena = runner.new_arena(512)
    prefill = Prefill(runner, arena, Extent(0, 256), ids, 0, 128, every_row=True)
    got = [prefill.step(rows=rows) for rows in ([5, 127], [128, 199])]
    with torch.inference_mode():
        expected = whole(torch.as_tensor(ids)[None]).logits[0, [5, 127, 128, 199]]
    torch.testing.assert_close(torch.cat([row for row in got if row is not None]), expected, atol=1e-3, rtol=1e-3)
