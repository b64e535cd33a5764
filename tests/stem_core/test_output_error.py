"""The error of sparse prefill's attention output: what is sampled, and that the error is right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.fp8_heads import FP8, HeadScales, quantize_heads, write_kv
from kernels.fp8_heads.reference import restore_keys
from stem_core import StemConfig, prompt_budget
from stem_core.attention import stem_prefill
from stem_core.context import QuantizedKV
from stem_core.output_error import ErrorProbe, row_errors, sampled_blocks
from stem_core.selection import new_key_state, stem_selection

LENGTH, BLOCK = 1000, 32
STEM = StemConfig(
    schedule="density", density=0.3, block_size=BLOCK, stride=8, sink_blocks=1, local_blocks=2, max_output_error=0.5
)


def tensors(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 32, generator=generator) for heads in (4, 2, 2))
    return 2 * q, k, v


def measured(config: StemConfig, q: Tensor, k: Tensor, v: Tensor, chunk: int) -> tuple[ErrorProbe, Tensor]:
    """The errors of a prompt read in chunks, and the blocks that it kept: bool [1, H, blocks, blocks]."""
    budget = prompt_budget(LENGTH, config)
    probe = ErrorProbe(sampled_blocks(budget, config), config.block_size)
    keys = new_key_state(config, k, LENGTH)
    for start in range(0, LENGTH, chunk):
        end = min(LENGTH, start + chunk)
        part = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        out = stem_prefill(*part, config, budget, start=start, keys=keys, probe=probe)
        if start == 0:
            plain = stem_prefill(*part, config, budget, keys=new_key_state(config, k, LENGTH))
            assert torch.equal(out, plain)
    return probe, stem_selection(q, k, v, config, budget).to_mask(-(-LENGTH // BLOCK))


def true_error(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int) -> float:
    """In float64: mean over the rows of a block of ||sparse - dense|| / ||dense||, over all heads together."""
    rows = torch.arange(block * BLOCK, min(LENGTH, (block + 1) * BLOCK))
    keys, values = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q[:, :, rows].double() @ keys.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.arange(LENGTH) > rows[:, None], -torch.inf)
    kept_tokens = kept[:, :, block].repeat_interleave(BLOCK, dim=-1)[..., :LENGTH]
    dense = scores.softmax(-1) @ values
    sparse = scores.masked_fill(~kept_tokens[:, :, None], -torch.inf).softmax(-1) @ values
    errors = []
    for row in range(len(rows)):
        errors.append(float((sparse[0, :, row] - dense[0, :, row]).norm() / dense[0, :, row].norm()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("chunk", [BLOCK, 7 * BLOCK, 1024])
@pytest.mark.parametrize("estimator", ["oam", "sample"])
def test_errors_are_those_of_float64_however_the_prompt_is_chunked(estimator: str, chunk: int) -> None:
    q, k, v = tensors()
    probe, kept = measured(STEM.replace(estimator=estimator), q, k, v, chunk)
    assert len(probe.blocks) == 4
    assert probe.layers == [1] * 4
    expected = [true_error(q, k, v, kept, block) for block in probe.blocks]
    assert probe.sums[q.device].tolist() == pytest.approx(expected, abs=1e-5)
    assert min(expected) > 0.05, "something must be lost, or this test shows nothing"


def test_errors_in_fp8_are_those_of_what_fp8_holds() -> None:
    """Of the blocks that were dropped, not of the roundings: both sides of the difference are in fp8."""
    q, k, v = tensors()
    scales = HeadScales(q=torch.full((4,), 0.05), k=torch.full((2,), 0.02), v=torch.full((2,), 0.02))
    keys, values = torch.zeros(2, 1024, 32, dtype=FP8), torch.zeros(2, 32, 1024, dtype=FP8)
    write_kv(k, v, scales, keys, values, 0)
    quantized = QuantizedKV(keys, values, scales)
    budget = prompt_budget(LENGTH, STEM)
    probe = ErrorProbe(sampled_blocks(budget, STEM), BLOCK)
    stem_prefill(q, k, v, STEM, budget, quantized=quantized, probe=probe)
    kept = stem_selection(q, k, v, STEM, budget, quantized=quantized).to_mask(32)
    held_q = quantize_heads(q, scales.q).double() * scales.q[0]
    held_k = keys[None, :, :LENGTH].double() * scales.k[0]
    held_v = restore_keys(values).mT[None, :, :LENGTH].double() * scales.v[0]
    expected = [true_error(held_q, held_k, held_v, kept, block) for block in probe.blocks]
    # The sums are of weights in e4m3, whose roundings nearly even out over a block.
    assert probe.sums[q.device].tolist() == pytest.approx(expected, rel=0.03)


def test_what_is_sampled() -> None:
    def sampled(tokens: int, **changes: object) -> tuple[int, ...]:
        config = STEM.replace(**changes)
        return sampled_blocks(prompt_budget(tokens, config), config)

    budgets = prompt_budget(LENGTH, STEM).budgets
    assert budgets is not None
    assert [block for block in range(32) if budgets[block] <= block] == [*range(6, 32)]
    assert sampled(LENGTH) == (11, 18, 24, 31), "the last block may be a short one"
    assert sampled(LENGTH, dense_tail=3)[-1] == 28, "not in the dense tail"
    assert len(sampled(100 * LENGTH)) == 4, "however long the prompt is"
    assert sampled(LENGTH, max_output_error=0.0) == ()
    assert sampled(LENGTH, dense_below=2000) == sampled(60) == (), "prompts that are dense anyway"
    few = StemConfig.preset("sampled", max_output_error=0.5, dense_below=0, sample_rows=1, dense_tail=8)
    assert sampled_blocks(prompt_budget(60 * 128, few), few) == (51,), "rows that keep all are left out"


def test_rows_are_weighed_alike_and_zeros_are_no_error() -> None:
    dense = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]).view(1, 1, 3, 2)
    sparse = torch.tensor([[3.0, 0.0], [0.3, 0.4], [0.0, 0.0]]).view(1, 1, 3, 2)
    assert row_errors(sparse, dense).tolist() == [pytest.approx([0.8, 0.0, 0.0])]
    assert math.isnan(float(row_errors(sparse * torch.nan, dense).mean()))


def test_blocks_belong_to_the_chunk_that_holds_them() -> None:
    probe = ErrorProbe((7, 15, 23, 31), BLOCK)
    assert [probe.within(start, start + 256) for start in range(0, 1024, 256)] == [range(i, i + 1) for i in range(4)]
    assert probe.within(0, 7 * BLOCK) == range(0)
    assert probe.within(7 * BLOCK, LENGTH) == range(4)
    assert probe.tokens(3, LENGTH) == (992, 1000)


@pytest.mark.parametrize("value", [-0.1, "much", True])
def test_the_limit_is_a_number(value: object) -> None:
    with pytest.raises(ValueError, match="max_output_error must be"):
        STEM.replace(max_output_error=value)
