"""A chunk that the prompt goes on behind needs no output: its last layer ends with the keys and values."""

from __future__ import annotations

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
from tests.pipeline.engine_models import save_model

TOKENS = 600
CHUNK = 256


def stored(arena: Arena) -> list[Tensor]:
    """Bytes of the first tokens (a multiple of 16) of all layers' keys and values."""
    first = [tensor[..., :592] if tensor.shape[-1] > arena.capacity else tensor[:, :592] for tensor in arena.tensors()]
    return [tensor.contiguous().view(torch.uint8) for tensor in first]


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("estimator", ["oam", "sample"])
def test_same_logits_and_cache_without_rows_that_nobody_reads(tmp_path: Path, estimator: str, precision: str) -> None:
    attention = StemConfig(
        schedule="density", density=0.5, block_size=32, estimator=estimator, dense_layers=1, dense_below=0
    )
    config = EngineConfig(str(save_model(tmp_path, "qwen3", head_dim=32)), device="cpu", precision=precision)
    runner = ModelRunner(load_model(config), attention)
    assert [policy.budget(TOKENS, None).budgets is None for policy, _ in runner.layers] == [True, False, False]
    ids = np.random.default_rng(0).integers(0, runner.vocabulary, size=TOKENS)
    computed: list[int] = []
    last = runner.model.get_decoder().layers[-1]  # type: ignore[operator]
    last.register_forward_hook(lambda module, args, output: computed.append(args[0].shape[1]))

    def run(every_row: bool) -> tuple[Tensor | None, list[int], list[Tensor]]:
        computed.clear()
        arena = runner.new_arena(640)
        prefill = Prefill(runner, arena, Extent(0, 640), ids, 8, CHUNK, every_row=every_row)
        while not prefill.done:
            logits = prefill.step()
            assert every_row or (logits is not None) == prefill.done
        return logits, list(computed), stored(arena)

    logits, rows, cache = run(every_row=True)
    short_logits, short_rows, short_cache = run(every_row=False)
    assert (rows, short_rows) == ([256, 256, 88], [88])
    assert logits is not None
    assert short_logits is not None
    assert torch.equal(logits, short_logits)
    assert all(map(torch.equal, cache, short_cache))
