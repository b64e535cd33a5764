"""The share of the attention mass that sparse prefill keeps: what is sampled, and that the share is right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import stem_core.retained
from kernels.fp8_heads import FP8, HeadScales, quantize_heads, write_kv
from stem_core import StemConfig, prompt_budget
from stem_core.attention import stem_prefill
from stem_core.context import QuantizedKV
from stem_core.retained import RetainedMass, sampled_blocks
from stem_core.selection import new_key_state, stem_selection

LENGTH, BLOCK = 1000, 32
STEM = StemConfig(
    schedule="density", density=0.3, block_size=BLOCK, stride=8, sink_blocks=1, local_blocks=2, min_mass=0.5
)


@pytest.fixture(autouse=True)
def _short_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stem_core.retained, "SAMPLE_BLOCKS", 8)


def tensors(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 32, generator=generator) for heads in (4, 2, 2))
    return 2 * q, k, v


def measured(config: StemConfig, q: Tensor, k: Tensor, v: Tensor, chunk: int) -> tuple[RetainedMass, Tensor]:
    """The shares of a prompt read in chunks, and the blocks that it kept: bool [1, H, blocks, blocks]."""
    budget = prompt_budget(LENGTH, config)
    mass = RetainedMass(sampled_blocks(budget, config), config.block_size)
    keys = new_key_state(config, k, LENGTH)
    for start in range(0, LENGTH, chunk):
        end = min(LENGTH, start + chunk)
        part = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        out = stem_prefill(*part, config, budget, start=start, keys=keys, mass=mass)
        if start == 0:
            plain = stem_prefill(*part, config, budget, keys=new_key_state(config, k, LENGTH))
            assert torch.equal(out, plain)
    return mass, stem_selection(q, k, v, config, budget).to_mask(-(-LENGTH // BLOCK))


def kept_share(q: Tensor, k: Tensor, kept: Tensor, block: int) -> float:
    """In float64: mean over heads and rows of the share of the softmax that falls on the kept blocks."""
    rows = torch.arange(block * BLOCK, min(LENGTH, (block + 1) * BLOCK))
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q[:, :, rows].double() @ keys.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.arange(LENGTH) > rows[:, None], -torch.inf)
    kept_tokens = kept[:, :, block].repeat_interleave(BLOCK, dim=-1)[..., :LENGTH]
    return float((scores.softmax(-1) * kept_tokens[:, :, None]).sum(-1).mean())


@pytest.mark.parametrize("chunk", [BLOCK, 7 * BLOCK, 1024])
@pytest.mark.parametrize("estimator", ["oam", "sample"])
def test_shares_are_those_of_float64_however_the_prompt_is_chunked(estimator: str, chunk: int) -> None:
    q, k, v = tensors()
    mass, kept = measured(STEM.replace(estimator=estimator), q, k, v, chunk)
    assert mass.blocks == (7, 15, 23, 31)
    assert mass.layers == [1] * 4
    expected = [kept_share(q, k, kept, block) for block in mass.blocks]
    assert mass.sums[q.device].tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) < 0.95, "something must be lost, or this test shows nothing"


def test_shares_of_fp8_are_those_of_what_fp8_holds() -> None:
    q, k, v = tensors()
    scales = HeadScales(q=torch.full((4,), 0.05), k=torch.full((2,), 0.02), v=torch.full((2,), 0.02))
    keys, values = torch.zeros(2, 1024, 32, dtype=FP8), torch.zeros(2, 32, 1024, dtype=FP8)
    write_kv(k, v, scales, keys, values, 0)
    quantized = QuantizedKV(keys, values, scales)
    budget = prompt_budget(LENGTH, STEM)
    mass = RetainedMass(sampled_blocks(budget, STEM), BLOCK)
    stem_prefill(q, k, v, STEM, budget, quantized=quantized, mass=mass)
    kept = stem_selection(q, k, v, STEM, budget, quantized=quantized).to_mask(32)
    held_q = quantize_heads(q, scales.q).double() * scales.q[0]
    held_k = keys[None, :, :LENGTH].double() * scales.k[0]
    expected = [kept_share(held_q, held_k, kept, block) for block in mass.blocks]
    # The sums are of weights in e4m3, whose roundings nearly even out over a block.
    assert mass.sums[q.device].tolist() == pytest.approx(expected, abs=1e-3)


def test_what_is_sampled() -> None:
    def sampled(tokens: int, **changes: object) -> tuple[int, ...]:
        config = STEM.replace(**changes)
        return sampled_blocks(prompt_budget(tokens, config), config)

    assert sampled(LENGTH) == (7, 15, 23, 31)
    assert sampled(LENGTH + BLOCK) == (7, 15, 23, 31, 32), "the last block may be a short one"
    assert sampled(LENGTH, dense_tail=3) == (7, 15, 23, 28), "not in the dense tail"
    assert sampled(LENGTH, min_mass=0.0) == ()
    assert sampled(LENGTH, dense_below=2000) == sampled(60) == (), "prompts that are dense anyway"
    assert sampled(LENGTH, sink_blocks=6, local_blocks=9)[:1] != (7,), "blocks that keep all have nothing to measure"


def test_blocks_belong_to_the_chunk_that_holds_them() -> None:
    mass = RetainedMass((7, 15, 23, 31), BLOCK)
    assert [mass.within(start, start + 256) for start in range(0, 1024, 256)] == [range(i, i + 1) for i in range(4)]
    assert mass.within(0, 7 * BLOCK) == range(0)
    assert mass.within(7 * BLOCK, LENGTH) == range(4)
    assert mass.tokens(3, LENGTH) == (992, 1000)


@pytest.mark.parametrize("value", [-0.1, 1.1, "much", True])
def test_min_mass_is_a_share(value: object) -> None:
    with pytest.raises(ValueError, match="min_mass must be"):
        STEM.replace(min_mass=value)
