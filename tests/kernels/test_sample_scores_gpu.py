"""The Hopper path of the sampled rows' scores on a GPU: against the reference, by chunks, at the ends of float16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.fp8_heads import FP8, HeadScales, fp8_obstacle
from kernels.sample_scores import choose_sample_scores, sample_scores

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
KEY_SCALE = 2.0**-5


@pytest.fixture(autouse=True)
def _hopper() -> None:
    choice = choose_sample_scores(torch.empty(1, 1, 1, 128, dtype=BF16, device="cuda"))
    if choice.impl != "gluon":
        pytest.skip(choice.reason)


def operands(
    queries: int, heads: int, kv_heads: int, dim: int, start: int, fp8: bool
) -> tuple[Tensor, Tensor, HeadScales | None]:
    """q, k of [N, L, heads, D], k longer than what is known and NaN there; logits large enough to single out keys.

    No query is larger than the head's scale reaches: there the reference saturates, and the kernel, with a scale for
    each row, does not.
    """
    generator = torch.Generator("cuda").manual_seed(queries + start)
    q = torch.randn(2, queries, heads, dim, generator=generator, device="cuda", dtype=BF16).transpose(1, 2) * 3
    q = q.clamp(-448 * KEY_SCALE, 448 * KEY_SCALE)
    known = start + queries
    k = torch.randn(2, known + 200, kv_heads, dim, generator=generator, device="cuda", dtype=BF16).transpose(1, 2)
    k[:, :, known:] = torch.nan
    if not fp8:
        return q, k, None
    scales = HeadScales(*(torch.full((n,), KEY_SCALE, device="cuda") for n in (heads, kv_heads, kv_heads)))
    return q, (k / KEY_SCALE).clamp(-448, 448).to(FP8), scales


def on_cpu(scales: HeadScales | None) -> HeadScales | None:
    return None if scales is None else HeadScales(scales.q.cpu(), scales.k.cpu(), scales.v.cpu())


CASES = [
    (1000, 4, 2, 128, 8, 0),
    (1, 2, 1, 128, 8, 0),
    (127, 2, 2, 64, 16, 256),
    (3000, 8, 2, 128, 8, 1280),
    (700, 3, 1, 64, 2, 0),
    (900, 4, 4, 128, 32, 128),
    (900, 4, 4, 128, 128, 128),
]


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("queries", "heads", "kv_heads", "dim", "every", "start"), CASES, ids=str)
def test_scores(
    queries: int, heads: int, kv_heads: int, dim: int, every: int, start: int, fp8: bool, poisoned: None
) -> None:
    if fp8 and (missing := fp8_obstacle(torch.device("cuda", 0))):
        pytest.skip(missing)
    q, k, scales = operands(queries, heads, kv_heads, dim, start, fp8)
    got = sample_scores(q, k, query_start=start, every=every, scales=scales, impl="gluon").cpu()
    q_cpu, k_cpu = (q.cpu(), k.cpu()) if fp8 else (q.cpu().float(), k.cpu().float())
    wanted = sample_scores(q_cpu, k_cpu, query_start=start, every=every, scales=on_cpu(scales), impl="reference")
    hidden = wanted.isneginf()
    assert torch.equal(got.isneginf(), hidden)
    # float16 keeps 11 bits of a sum, here up to 2^5 in the exponent of a share, rounded four times: 2^-5 of it.
    error = (got - wanted).masked_fill(hidden, 0.0).abs() / wanted.masked_fill(hidden, 1.0).clamp(min=1e-2)
    assert float(error.max()) <= (2.0**-5 if fp8 else 1e-4)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_chunks_and_neighbours_change_nothing(fp8: bool, poisoned: None) -> None:
    q, k, scales = operands(4000, 8, 2, 128, 0, fp8)
    whole = sample_scores(q, k, scales=scales, impl="gluon")
    for begin, end in ((0, 128), (128, 1664), (1664, 4000)):
        part = sample_scores(q[:, :, begin:end], k, query_start=begin, scales=scales, impl="gluon")
        rows = slice(begin // 128, -(-end // 128))
        assert torch.equal(part, whole[:, :, rows, : part.shape[3]])
    alone = sample_scores(q[1:], k[1:], scales=scales, impl="gluon")
    assert torch.equal(alone[0], whole[1])


def test_the_largest_fp8_operands_stay_inside_float16() -> None:
    """Every key 448 and every query at its scale's end: 128 products of 448 * 448 are 392 times float16's largest."""
    scales = HeadScales(*(torch.ones(1, device="cuda") for _ in range(3)))
    q = torch.full((1, 1, 512, 128), 448.0, device="cuda", dtype=BF16)
    k = torch.full((1, 1, 512, 128), 448.0, device="cuda").to(FP8)
    k[:, :, 128:256] = (-k[:, :, 128:256].float()).to(FP8)
    got = sample_scores(q, k, scales=scales, scale=2.0**-24, impl="gluon")[0, 0]
    wanted = sample_scores(q.cpu(), k.cpu(), scales=on_cpu(scales), scale=2.0**-24, impl="reference")[0, 0]
    hidden = wanted.isneginf()
    assert float((got.cpu() - wanted).masked_fill(hidden, 0.0).abs().max()) < 1e-2


def test_a_long_prompt_equals_the_portable_path() -> None:
    """Offsets past 2^31 bytes of the scratch slots and of q; more tiles than multiprocessors."""
    q = torch.randn(1, 8192, 32, 128, device="cuda", dtype=BF16).transpose(1, 2)
    k = torch.randn(1, 8, 262_144, 128, device="cuda", dtype=BF16)
    start = 262_144 - 8192
    got, wanted = (sample_scores(q, k, query_start=start, impl=impl) for impl in ("gluon", "triton"))
    hidden = wanted.isneginf()
    assert torch.equal(got.isneginf(), hidden)
    assert torch.allclose(got.masked_fill(hidden, 0.0), wanted.masked_fill(hidden, 0.0), rtol=1e-3, atol=1e-6)
