"""Rows of a prefill and of what stands behind it, selections by others: what jobs.evaluate reads with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.block_selection import BlockSelection
from pipeline.engine import EngineConfig
from pipeline.engine.kv.arena import Extent
from pipeline.engine.model.loading import load_model
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.prefill import Prefill
from pipeline.engine.run.tail import TailPrefill
from stem_core import StemConfig
from stem_core.selection import stem_selection
from tests.pipeline.engine_models import save_model

SHARED, CHUNK = 480, 192
ROOM = 640


def sparse(estimator: str = "oam") -> StemConfig:
    return StemConfig(schedule="density", density=0.5, block_size=32, estimator=estimator, dense_layers=1, dense_tail=1)


def runner(folder: Path, precision: str, attention: StemConfig | None) -> ModelRunner:
    config = EngineConfig(str(save_model(folder, "qwen3", head_dim=32)), device="cpu", precision=precision)
    return ModelRunner(load_model(config), attention)


def run(prefill: Prefill) -> Tensor:
    """Logits of the last token."""
    logits = None
    while not prefill.done:
        logits = prefill.step()
    assert logits is not None
    return logits


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    """Two prompts of as many blocks that begin with the same tokens."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 199, size=SHARED)
    return [np.concatenate([shared, rng.integers(3, 199, size=more)]) for more in (61, 40)]


def test_logits_of_every_token_behind_a_prefix(tmp_path: Path, prompts: list[np.ndarray]) -> None:
    used = runner(tmp_path, "fp32", None)
    arena = used.new_arena(2 * ROOM)
    ids, document, place = prompts[0], Extent(0, SHARED), Extent(ROOM, ROOM)
    expected = Prefill(used, arena, Extent(0, ROOM), ids, 0, ROOM, every_row=True).step(rows=range(SHARED, len(ids)))
    run(Prefill(used, arena, document, ids[:SHARED], 0, CHUNK))
    found = []
    tail = TailPrefill(used, arena, document, SHARED, place, ids[SHARED:], ROOM)
    while not tail.done:
        found.append(tail.step(every_token=True))
    assert torch.allclose(torch.cat(found), expected, atol=1e-4)
    last = TailPrefill(used, arena, document, SHARED, place, ids[SHARED:], ROOM).step()
    assert torch.allclose(last, expected[-1:], atol=1e-4)


def test_a_prefill_in_fp8_begins_at_the_beginning(tmp_path: Path, prompts: list[np.ndarray]) -> None:
    """What the mean query adds to the keys before it is kept by the prefill that read them, not with them."""
    used = runner(tmp_path, "fp8", None)
    prefill = Prefill(used, used.new_arena(ROOM), Extent(0, ROOM), prompts[0], 8, CHUNK, every_row=True)
    prefill._context.start = CHUNK
    with pytest.raises(RuntimeError, match="begins at token 192 in fp8"):
        prefill.step()


def test_logits_of_any_rows(tmp_path: Path, prompts: list[np.ndarray]) -> None:
    used = runner(tmp_path, "fp32", sparse())
    ids = prompts[0]
    whole = Prefill(used, used.new_arena(ROOM), Extent(0, ROOM), ids, 8, ROOM, every_row=True)
    expected = whole.step(rows=[3, 200, 250, len(ids) - 1])
    assert expected is not None
    assert expected.shape == (4, used.vocabulary)
    chunked = Prefill(used, used.new_arena(ROOM), Extent(0, ROOM), ids, 8, CHUNK, every_row=True)
    found = [chunked.step(rows=rows) for rows in ([3], [200, 250], [len(ids) - 1])]
    assert torch.allclose(torch.cat([part for part in found if part is not None]), expected, atol=1e-4)


def test_others_may_select(tmp_path: Path, prompts: list[np.ndarray]) -> None:
    used = runner(tmp_path, "fp32", sparse())
    seen: list[tuple[int, int]] = []

    def prefill(select: Any) -> Tensor:
        return run(Prefill(used, used.new_arena(ROOM), Extent(0, ROOM), prompts[0], 8, CHUNK, select=select))

    def noting(layer: int, *args: Any, **kwargs: Any) -> BlockSelection:
        seen.append((layer, kwargs["start"]))
        return stem_selection(*args, **kwargs)

    def nearest(layer: int, q: Tensor, *args: Any, start: int, **kwargs: Any) -> BlockSelection:
        rows = torch.arange(start // 32, start // 32 + -(-q.shape[2] // 32), dtype=torch.int32)
        return BlockSelection(
            rows.expand(1, q.shape[1], -1)[..., None].contiguous(), torch.ones_like(rows).expand(1, q.shape[1], -1)
        )

    assert torch.equal(prefill(noting), prefill(None))
    chunks = [(layer, start) for start in (0, 192, 384) for layer in (1, 2)]  # the first layer is dense
    assert seen == [*chunks, (2, 512)]  # the last one takes the last block apart
    assert not torch.allclose(prefill(nearest), prefill(None), atol=1e-2)
