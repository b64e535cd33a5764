"""Prefills that branch, rows of a prefill, selections by others: what jobs.evaluate reads with."""

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


def run(prefill: Prefill, end: int | None = None) -> Tensor:
    """Logits of the last token."""
    logits = None
    while prefill.start < (len_of(prefill) if end is None else end):
        logits = prefill.step(end=end)
    assert logits is not None
    return logits


def len_of(prefill: Prefill) -> int:
    return prefill._context.prompt_length


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    """Two prompts of as many blocks that begin with the same tokens."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 199, size=SHARED)
    return [np.concatenate([shared, rng.integers(3, 199, size=more)]) for more in (61, 40)]


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("estimator", ["oam", "sample", "dense"])
def test_a_branch_reads_as_its_own_prefill(
    tmp_path: Path, prompts: list[np.ndarray], estimator: str, precision: str
) -> None:
    used = runner(tmp_path, precision, None if estimator == "dense" else sparse(estimator))
    arena = used.new_arena(4 * ROOM)
    extents = [Extent(index * ROOM, ROOM) for index in range(4)]
    trunk = Prefill(used, arena, extents[0], prompts[0], 8, CHUNK, every_row=True)
    run(trunk, SHARED)
    found = []
    for prompt, extent in zip(prompts, extents[1:], strict=False):
        arena.copy(extents[0], extent, SHARED)
        found.append(run(trunk.branch(prompt, extent)))
    for prompt, logits in zip(prompts, found, strict=True):
        expected = run(Prefill(used, arena, extents[3], prompt, 8, CHUNK, every_row=True))
        assert torch.allclose(logits, expected, rtol=0, atol=1e-4)


def test_a_branch_that_would_attend_otherwise_is_refused(tmp_path: Path, prompts: list[np.ndarray]) -> None:
    used = runner(tmp_path, "fp32", sparse())
    trunk = Prefill(used, used.new_arena(ROOM), Extent(0, ROOM), prompts[0], 8, CHUNK, every_row=True)
    run(trunk, SHARED)
    longer = np.concatenate([prompts[0], prompts[0][:20]])
    with pytest.raises(ValueError, match="of 18 blocks of 32 tokens where the prefill has 17"):
        trunk.branch(longer, Extent(0, ROOM))
    trunk.branch(longer, Extent(0, ROOM), dense=True)
    uneven = Prefill(used, used.new_arena(ROOM), Extent(0, ROOM), prompts[0], 8, CHUNK, every_row=True)
    run(uneven, 40)
    with pytest.raises(ValueError, match="behind 40 tokens"):
        uneven.branch(prompts[1], Extent(0, ROOM))


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_a_dense_branch_attends_to_everything(tmp_path: Path, prompts: list[np.ndarray], precision: str) -> None:
    """Behind a dense prefill it is the same whatever the layers' policy; behind a sparse one it is not."""
    used = runner(tmp_path, precision, None)
    arena = used.new_arena(ROOM)
    expected = run(Prefill(used, arena, Extent(0, ROOM), prompts[0], 8, CHUNK, every_row=True))
    trunk = Prefill(used, arena, Extent(0, ROOM), prompts[0][:SHARED], 8, CHUNK, every_row=True)
    run(trunk)
    used.attend(sparse())
    assert torch.allclose(run(trunk.branch(prompts[0], Extent(0, ROOM), dense=True)), expected, atol=1e-4)
    cut = Prefill(used, arena, Extent(0, ROOM), prompts[0][:SHARED], 8, CHUNK, every_row=True)
    run(cut)
    assert not torch.allclose(run(cut.branch(prompts[0], Extent(0, ROOM), dense=True)), expected, atol=1e-2)


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
