"""Only the last token's output of a prompt is read: the last layer is run to its end for the last block alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine import EngineConfig
from pipeline.engine.kv.arena import Arena, Extent
from pipeline.engine.model.loading import load_model
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.prefill import Prefill
from stem_core import StemConfig
from stem_core.policy import DENSE_BLOCK_SIZE
from tests.pipeline.engine_models import save_model

TOKENS = 600
CHUNK = 256


def stored(arena: Arena) -> list[Tensor]:
    """Bytes of the first tokens (a multiple of 16) of all layers' keys and values."""
    first = [tensor[..., :592] if tensor.shape[-1] > arena.capacity else tensor[:, :592] for tensor in arena.tensors()]
    return [tensor.contiguous().view(torch.uint8) for tensor in first]


def stem(estimator: str) -> StemConfig:
    return StemConfig(
        schedule="density", density=0.5, block_size=32, estimator=estimator, dense_layers=1, dense_below=0
    )


@pytest.mark.parametrize("chunk", [CHUNK, 1024])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("estimator", ["oam", "sample", "dense"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_same_logits_and_cache_without_rows_that_nobody_reads(
    tmp_path: Path, architecture: str, estimator: str, precision: str, chunk: int
) -> None:
    """Also where the last layer has a sliding window (gemma3)."""
    attention = None if estimator == "dense" else stem(estimator)
    config = EngineConfig(str(save_model(tmp_path, architecture, head_dim=32)), device="cpu", precision=precision)
    runner = ModelRunner(load_model(config), attention)
    ids = np.random.default_rng(0).integers(0, runner.vocabulary, size=TOKENS)
    computed: list[int] = []
    last = runner.model.get_decoder().layers[-1]  # type: ignore[operator]
    last.mlp.register_forward_hook(lambda module, args, output: computed.append(output.shape[1]))

    def run(every_row: bool) -> tuple[Tensor | None, list[int], list[Tensor]]:
        computed.clear()
        arena = runner.new_arena(640)
        prefill = Prefill(runner, arena, Extent(0, 640), ids, 8, chunk, every_row=every_row)
        while not prefill.done:
            logits = prefill.step()
            assert every_row or (logits is not None) == prefill.done
        return logits, list(computed), stored(arena)

    logits, rows, cache = run(every_row=True)
    short_logits, short_rows, short_cache = run(every_row=False)
    assert rows == ([256, 256, 88] if chunk == CHUNK else [600])
    assert short_rows == [600 % (DENSE_BLOCK_SIZE if attention is None else 32)]
    assert logits is not None
    assert short_logits is not None
    # A GEMM of fewer rows may add in another order.
    assert torch.allclose(logits, short_logits, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, cache, short_cache))


def test_a_guard_measures_the_blocks_that_are_left_out(tmp_path: Path) -> None:
    """Its reading is of all sampled blocks, however the last layer came to them."""
    config = EngineConfig(str(save_model(tmp_path, "qwen3")), device="cpu", precision="fp32")
    attention = replace(stem("sample"), max_output_error=10.0)
    readings = []
    for whole in (True, False):
        runner = ModelRunner(load_model(config), attention)
        if whole:
            del runner.model.get_decoder().layers[-1].forward  # type: ignore[operator]
        ids = np.random.default_rng(0).integers(0, runner.vocabulary, size=TOKENS)
        prefill = Prefill(runner, runner.new_arena(640), Extent(0, 640), ids, 8, 1024)
        while not prefill.done:
            prefill.step()
        readings.append(prefill.plan.output_error)
    assert readings[0] is not None
    assert readings[0] > 0
    assert readings == [pytest.approx(readings[0])] * 2
