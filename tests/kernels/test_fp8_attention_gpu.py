"""fp8 attention on a GPU: every implementation that can take the case, against float64 of the same fp8 operands."""

from __future__ import annotations

import pytest
import torch

from kernels.block_selection import BlockSelection
from kernels.block_sparse_attention_fp8 import block_sparse_attention_fp8, choose_block_sparse_attention_fp8
from kernels.fp8_heads import FP8, HeadScales, fp8_obstacle, quantize_heads, write_kv
from tests.kernels import fp8_cases as cases
from tests.kernels.attention_cases import Case
from tests.kernels.selection_cases import Decode, Scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and bool(fp8_obstacle(torch.device("cuda", 0))), reason="no fp8 on this GPU"
    ),
]
BF16 = torch.bfloat16
IMPLS = ["gluon", "triton"]


def skip_without(impl: str, case: Case, inputs: cases.Inputs) -> None:
    """The Hopper path takes some cases only."""
    if impl == "gluon":
        blocks = case.block_size if case.keep is not None else 128
        choice = choose_block_sparse_attention_fp8(
            inputs.q, blocks, k=inputs.k, vt=inputs.vt, query_start=case.start, window=case.window, dtype=case.dtype
        )
        if choice.impl != "gluon":
            pytest.skip(choice.reason)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_matches_float64(case: Case, impl: str, poisoned: None) -> None:
    skip_without(impl, case, cases.make_inputs(case, "cuda"))
    cases.check_attention(case, impl, "cuda")


@pytest.mark.parametrize("impl", IMPLS)
def test_twice_in_chunks_and_with_every_block(impl: str) -> None:
    """The same bits from a second call and from chunks; every block kept equals dense."""
    case = Case(1100, keep=0.5)
    inputs = cases.make_inputs(case, "cuda")
    skip_without(impl, case, inputs)
    q, k, vt, scales, selection = inputs.q, inputs.k, inputs.vt, inputs.scales, inputs.selection
    assert selection is not None
    whole = block_sparse_attention_fp8(q, k, vt, scales, selection, impl=impl)
    for _ in range(5):
        assert torch.equal(whole, block_sparse_attention_fp8(q, k, vt, scales, selection, impl=impl))  # type: ignore[arg-type]
    for start, end in ((0, 256), (256, 896), (896, 1100)):
        rows = slice(start // 128, -(-end // 128))
        part = BlockSelection(selection.indices[:, :, rows], selection.counts[:, :, rows])
        got = block_sparse_attention_fp8(q[:, :, start:end], k, vt, scales, part, query_start=start, impl=impl)
        assert torch.equal(got, whole[:, :, start:end])  # type: ignore[arg-type, index]
    all_blocks = cases.random_selection(Case(1100, keep=1.0), torch.Generator())
    kept = BlockSelection(all_blocks.indices.cuda(), all_blocks.counts.cuda())
    sparse = block_sparse_attention_fp8(q, k, vt, scales, kept, impl=impl)
    dense = block_sparse_attention_fp8(q, k, vt, scales, None, impl=impl)
    torch.testing.assert_close(sparse, dense, atol=4e-3, rtol=1.6e-2)


@pytest.mark.parametrize(("length", "dtype", "head_dim"), [(1, BF16, 64), (70, BF16, 96), (128, torch.float16, 128)])
def test_writing(length: int, dtype: torch.dtype, head_dim: int, poisoned: None) -> None:
    cases.check_writing(length, dtype, head_dim, "triton", "cuda")
    cases.check_key_bias(length, dtype, head_dim, "triton", "cuda")


def test_writing_runs() -> None:
    cases.check_runs("triton", "cuda")


@pytest.mark.parametrize("case", cases.DECODE, ids=str)
def test_decode(case: Decode, poisoned: None) -> None:
    cases.check_decode(case, "triton", "cuda")


@pytest.mark.parametrize(
    "case",
    [
        Scores(1000, head_dim=dim, block_size=128, every=every, dtype=BF16)
        for dim, every in ((128, 8), (64, 8), (96, 16), (256, 4))
    ],
    ids=str,
)
def test_sample_scores(case: Scores, poisoned: None) -> None:
    cases.check_sample(case, "triton", "cuda")


def test_oam_scores_by_chunks_of_keys(poisoned: None) -> None:
    cases.check_oam_by_chunks_of_keys("triton", "cuda")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_million_tokens(impl: str) -> None:
    """Offsets past 2^31 in q, out and both arenas; some rows against float64."""
    length, heads, kv_heads, dim, chunk = 1 << 20, 16, 16, 128, 1 << 17
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    scales = HeadScales(*(torch.full((n,), 2.0**-5, device="cuda") for n in (heads, kv_heads, kv_heads)))
    q8 = torch.empty(1, length, heads, dim, dtype=FP8, device="cuda").transpose(1, 2)
    k8 = torch.empty(kv_heads, length, dim, dtype=FP8, device="cuda")
    vt8 = torch.empty(kv_heads, dim, length, dtype=FP8, device="cuda")
    exact = {}
    keep = [(head, block) for head in (0, 15) for block in (0, 1, 2047, 4095, 4096, 8190, 8191)]
    for start in range(0, length, chunk):
        q, k, v = torch.randn(3, 1, heads, chunk, dim, dtype=BF16, device="cuda")
        q8[:, :, start : start + chunk] = quantize_heads(q, scales.q)
        write_kv(k, v, scales, k8, vt8, start)
        for head, block in keep:
            at = block * 128 - start
            if 0 <= at < chunk:
                exact[head, block] = [x[0, head, at : at + 128].double() for x in (q, k, v)]
    rows = length // 128
    own = torch.arange(rows, dtype=torch.int32, device="cuda")
    indices = torch.stack([own // 2, own], 1).expand(1, heads, -1, -1).contiguous()
    counts = torch.where(own == 0, 1, 2).int().expand(1, heads, -1).contiguous()
    indices[:, :, 0, 0] = 0
    if impl == "gluon" and choose_block_sparse_attention_fp8(q8, k=k8[None], vt=vt8[None]).impl != "gluon":
        pytest.skip("no Hopper path here")
    out = block_sparse_attention_fp8(q8, k8[None], vt8[None], scales, BlockSelection(indices, counts), impl=impl)
    assert isinstance(out, torch.Tensor)
    hidden = torch.ones(128, 128, dtype=torch.bool, device="cuda").triu(1)
    for head in (0, 15):
        for row in (1, 4095, 8191):
            q, k, v = exact[head, row]
            k0, v0 = exact[head, row // 2][1:]
            scores = torch.cat((q @ k0.mT, (q @ k.mT).masked_fill(hidden, -torch.inf)), 1) * dim**-0.5
            wanted = scores.softmax(-1) @ torch.cat((v0, v))
            error = (out[0, head, row * 128 : row * 128 + 128].double() - wanted).norm() / wanted.norm()
            # Quantisation itself, measured at 4 to 7% on normal data; a wrong block would be above 100%.
            assert error < 0.12, (head, row, error)
