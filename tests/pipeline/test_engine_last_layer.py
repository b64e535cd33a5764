"""Only the last token's output of a prompt is read: the last layer is run to its end for the last block alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine import EngineConfig
from pipeline.engine.kv.arena import Arena, Extent
from pipeline.engine.model.last_layer import _decoder_layer
from pipeline.engine.model.loading import load_model
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.prefill import Prefill
from stem_core import StemConfig
from stem_core.policy import DENSE_BLOCK_SIZE
from tests.pipeline.engine_models import save_model
from tools.models.check import build

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


@pytest.mark.parametrize(("kind", "computed"), [("gpt_neox", 30), ("gpt2", 30), ("gemma3n_text", 158)])
def test_layers_that_are_called_in_other_ways(tmp_path: Path, kind: str, computed: int) -> None:
    """The cache by another name; arguments by their places, and a model that counts rows; several hidden states a
    token, which are left alone."""
    build(kind, tmp_path)
    runner = ModelRunner(load_model(EngineConfig(str(tmp_path), device="cpu", precision="fp32")), None)
    assert runner.last_layer is not None
    found = _decoder_layer(runner.model, runner.last_layer)
    assert found is not None
    rows: list[int] = []
    mlp = next(module for name, module in found[0].named_modules() if name.endswith("mlp"))
    mlp.register_forward_hook(lambda module, args, out: rows.append(out.shape[-2]))
    ids = np.random.default_rng(0).integers(3, runner.vocabulary, size=DENSE_BLOCK_SIZE + 30)
    logits = []
    for every_row in (True, False):
        arena = runner.new_arena(256)
        prefill = Prefill(runner, arena, Extent(0, 256), ids, 8, 256, every_row=every_row)
        logits.append(prefill.step())
    assert rows == [DENSE_BLOCK_SIZE + 30, computed]
    assert logits[0] is not None
    assert logits[1] is not None
    assert torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_what_is_not_known_is_not_cut(tmp_path: Path) -> None:
    """A decoder layer that is handed tensors of which it is not known whether they have a row for each token."""
    config = EngineConfig(str(save_model(tmp_path, "qwen3")), device="cpu", precision="fp32")
    runner = ModelRunner(load_model(config), None)
    layer = runner.model.get_decoder().layers[-1]  # type: ignore[operator]
    rows: list[int] = []
    layer.mlp.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    forward = layer.forward
    ids = np.random.default_rng(0).integers(3, runner.vocabulary, size=DENSE_BLOCK_SIZE + 30)
    others: list[dict[str, Any]] = [
        {},
        {"cache_position": torch.zeros(1)},
        {"logits_to_keep": torch.zeros(1, len(ids))},
        {"output_router_logits": (torch.zeros(3),)},
    ]
    for more in others:
        layer.forward = lambda *args, more=more, **kwargs: forward(*args, **(kwargs | more))
        Prefill(runner, runner.new_arena(256), Extent(0, 256), ids, 8, 256).step()
    assert rows == [30, *[len(ids)] * 3]
