"""The properties that a sparse prefill must have, whatever the estimator and schedule.

On a machine with a GPU they are asked of its kernels in bfloat16, elsewhere of the references in float32.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.block_selection import BlockSelection
from stem_core import StemConfig, prompt_budget
from stem_core.attention import stem_prefill
from stem_core.selection import new_key_state, stem_selection

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if ON_GPU else (torch.device("cpu"), torch.float32)
HEADS, KV_HEADS, DIM = 4, 2, 64 if ON_GPU else 16
CLOSE = {"atol": 2e-2, "rtol": 2e-2} if ON_GPU else {"atol": 1e-5, "rtol": 1.3e-6}
# Few always-kept blocks, so that scores decide most places of a short prompt.
FEW = {"sink_blocks": 1, "local_blocks": 2, "dense_tail": 2, "dense_below": 0}
CONFIGS = {
    "release": StemConfig.preset("release", block_size=16, dense_below=0),
    "density": StemConfig(schedule="density", density=0.3, block_size=32, stride=8, sink_blocks=1, local_blocks=2),
    # The block size of Stem's releases, which the Hopper kernel takes.
    "wide": StemConfig(schedule="density", density=0.6, sink_blocks=1, local_blocks=1),
    "sample": StemConfig.preset("sampled", block_size=32, schedule="density", density=0.4, sample_rows=8, **FEW),
}


def tensors(length, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(batch, heads, length, DIM, generator=generator)  # noqa: E731
    q, k, v = make(HEADS), make(KV_HEADS), make(KV_HEADS)
    # Values of very different sizes, so that the value term decides some places.
    v = v * torch.rand(batch, KV_HEADS, length, 1, generator=generator) ** 3
    return tuple(x.to(DEVICE, DTYPE) for x in (q, k, v))


def select(q, k, v, config, start=0, length=None, keys=None):
    length = q.shape[2] if length is None else length
    return stem_selection(q, k, v, config, prompt_budget(length, config), start=start, keys=keys)


def kept(selection: BlockSelection, n_blocks: int) -> torch.Tensor:
    return selection.to_mask(n_blocks)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("estimator", ["oam", "sample"])
def test_keeping_everything_equals_dense(length, estimator):
    config = StemConfig(schedule="density", density=1.0, estimator=estimator)
    q, k, v = tensors(length)
    budget = prompt_budget(length, config)
    assert budget.reason  # runs dense by itself; the kernels are made to select all blocks below
    n_blocks = -(-length // 128)
    full = type(budget)(budgets=torch.arange(1, n_blocks + 1, dtype=torch.int32).numpy(), density=1.0)
    out = stem_prefill(q, k, v, config, full)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_chunks_select_what_the_whole_prompt_selects(name, blocks):
    config, length = CONFIGS[name], 1500
    q, k, v = tensors(length)
    whole = kept(select(q, k, v, config), -(-length // config.block_size))
    assert whole.float().mean() < 0.5  # really sparse, so that there is something to get wrong
    keys = new_key_state(config, k, length)
    step = blocks * config.block_size
    for start in range(0, length, step):
        end = min(length, start + step)
        part = select(q[:, :, start:end], k[:, :, :end], v[:, :, :end], config, start, length, keys)
        rows = slice(start // config.block_size, -(-end // config.block_size))
        assert torch.equal(kept(part, whole.shape[-1]), whole[:, :, rows]), f"chunk at {start}"


@pytest.mark.parametrize("name", CONFIGS)
def test_later_tokens_change_no_earlier_row(name):
    config, length, change = CONFIGS[name], 1500, 900
    q, k, v = tensors(length)
    before = kept(select(q, k, v, config), -(-length // config.block_size))
    other = tensors(length, seed=1)
    changed = [
        torch.cat((a[:, :, :change], 5 * b[:, :, change:]), dim=2) for a, b in zip((q, k, v), other, strict=True)
    ]
    after = kept(select(*changed, config), before.shape[-1])
    row = change // config.block_size
    assert torch.equal(before[:, :, :row], after[:, :, :row])
    assert not torch.equal(before[:, :, row:], after[:, :, row:])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_document_does_not_depend_on_its_batch(name):
    config = CONFIGS[name]
    q, k, v = tensors(1000, batch=3)
    together = kept(select(q, k, v, config), -(-1000 // config.block_size))
    for n in range(3):
        alone = kept(select(q[n : n + 1], k[n : n + 1], v[n : n + 1], config), together.shape[-1])
        assert torch.equal(alone[0], together[n])


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_behind_the_chunk_are_not_read(name):
    # The engine hands over the document's extent of an arena, whose tail holds whatever was there before.
    config = CONFIGS[name]
    q, k, v = tensors(1000)
    tail = torch.full((1, KV_HEADS, 64, DIM), torch.nan, device=DEVICE, dtype=DTYPE)
    dirty = select(q, torch.cat((k, tail), 2), torch.cat((v, tail), 2), config)
    n_blocks = -(-1000 // config.block_size)
    assert torch.equal(kept(dirty, n_blocks), kept(select(q, k, v, config), n_blocks))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000, 7167, 7168, 7169])
def test_odd_lengths_and_the_dense_threshold(length):
    config = StemConfig.preset("release")
    q, k, v = (x[:, :2] for x in tensors(length))
    budget = prompt_budget(length, config)
    assert (budget.budgets is None) == (-(-length // 128) < 56)
    out = stem_prefill(q, k, v, config, budget)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.isfinite().all()
    if budget.budgets is None:
        torch.testing.assert_close(out, dense, **CLOSE)
    else:
        # Early rows keep everything, late ones do not.
        torch.testing.assert_close(out[:, :, : 29 * 128], dense[:, :, : 29 * 128], **CLOSE)
        assert (out[:, :, -128:] - dense[:, :, -128:]).float().norm() > 0.1 * dense[:, :, -128:].float().norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_realised_density_is_the_planned_one(name):
    config = CONFIGS[name]
    q, k, v = tensors(1500)
    assert select(q, k, v, config).density() == pytest.approx(prompt_budget(1500, config).density)


def test_a_loud_value_block_wins_with_the_value_term():
    config = StemConfig(
        schedule="density", density=0.1, block_size=16, dense_tail=0, decay=1.0, sink_blocks=1, local_blocks=1
    )
    q, k, v = tensors(1600)
    v[:, :, 40 * 16 : 41 * 16] *= 100
    with_term = kept(select(q * 0.01, k, v, config), 100)[:, :, 60:, 40]
    without = kept(select(q * 0.01, k, v, config.replace(value_weight=0.0)), 100)[:, :, 60:, 40]
    assert with_term.all()
    assert not without.all()


def test_a_needle_that_means_average_away_is_found():
    config = StemConfig.preset(
        "sampled", block_size=64, schedule="density", density=0.25, sample_rows=8, dense_tail=0, dense_below=0
    )
    q, k, v = tensors(6400)
    needle, row = 1000, 5007  # a sampled one
    q[:, :, row] = k[:, :, needle].repeat_interleave(2, 1) * 8  # one query of one block looks for one key
    found = kept(select(q, k, v, config), 100)[:, :, row // 64, needle // 64]
    pooled = kept(select(q, k, v, config.replace(estimator="oam")), 100)[:, :, row // 64, needle // 64]
    assert found.all()
    assert not pooled.all()
