"""Block-sparse attention on a GPU: every implementation that can take the case, against float64."""

from __future__ import annotations

import pytest
import torch

from kernels.block_selection import BlockSelection
from kernels.block_sparse_attention import block_sparse_attention, choose_block_sparse_attention
from tests.kernels.attention_cases import GPU_CASES, Case, check, make_inputs

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


@pytest.mark.parametrize("impl", ["gluon", "triton"])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_matches_float64(case: Case, impl: str, poisoned: None) -> None:
    if impl == "gluon":
        q, k, v, _ = make_inputs(case, "cuda")
        blocks = case.block_size if case.keep is not None else 128
        choice = choose_block_sparse_attention(q, blocks, k=k, v=v, query_start=case.start, window=case.window)
        if choice.impl != "gluon":
            pytest.skip(choice.reason)
    check(case, impl, "cuda")


def test_pointer_path_for_tensors_that_tma_cannot_address(poisoned: None) -> None:
    base = torch.randn(1, 4, 300, 136, dtype=BF16, device="cuda")
    q = base[..., 4:132]  # 8 bytes off a multiple of 16
    choice = choose_block_sparse_attention(q, 128, k=q, v=q)
    assert choice.impl == "triton"
    assert "multiple of 16" in choice.reason
    out = block_sparse_attention(q, q, q, None)
    aligned = q.contiguous()
    wanted = block_sparse_attention(aligned, aligned, aligned, None, impl="triton")
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("impl", ["gluon", "triton"])
def test_the_same_call_twice_gives_the_same_bits(impl: str) -> None:
    case = Case(3000, heads=8, keep=0.4)
    q, k, v, selection = make_inputs(case, "cuda")
    if impl == "gluon" and choose_block_sparse_attention(q, k=k, v=v).impl != "gluon":
        pytest.skip("no Hopper path here")
    first = block_sparse_attention(q, k, v, selection, impl=impl)  # type: ignore[arg-type]
    for _ in range(5):
        assert torch.equal(first, block_sparse_attention(q, k, v, selection, impl=impl))  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["gluon", "triton"])
def test_keeping_every_block_equals_dense(impl: str) -> None:
    case = Case(1000, start=256, keep=1.0)
    q, k, v, selection = make_inputs(case, "cuda")
    if impl == "gluon" and choose_block_sparse_attention(q, k=k, v=v).impl != "gluon":
        pytest.skip("no Hopper path here")
    sparse = block_sparse_attention(q, k, v, selection, query_start=256, impl=impl)  # type: ignore[arg-type]
    dense = block_sparse_attention(q, k, v, None, query_start=256, impl=impl)  # type: ignore[arg-type]
    torch.testing.assert_close(sparse, dense, atol=4e-3, rtol=1.6e-2)


@pytest.mark.parametrize("impl", ["gluon", "triton"])
def test_chunks_equal_the_whole(impl: str) -> None:
    case = Case(1100, keep=0.5)
    q, k, v, selection = make_inputs(case, "cuda")
    assert selection is not None
    if impl == "gluon" and choose_block_sparse_attention(q, k=k, v=v).impl != "gluon":
        pytest.skip("no Hopper path here")
    whole = block_sparse_attention(q, k, v, selection, impl=impl)  # type: ignore[arg-type]
    for start, end in ((0, 256), (256, 896), (896, 1100)):
        rows = slice(start // 128, -(-end // 128))
        part = BlockSelection(selection.indices[:, :, rows], selection.counts[:, :, rows])
        got = block_sparse_attention(
            q[:, :, start:end],
            k[:, :, :end],
            v[:, :, :end],
            part,
            query_start=start,
            impl=impl,  # type: ignore[arg-type]
        )
        assert torch.equal(got, whole[:, :, start:end])


@pytest.mark.parametrize("impl", ["gluon", "triton"])
def test_a_million_tokens(impl: str) -> None:
    """Offsets past 2^31 elements in q and out ([N, L, H, D] of 4.3e9 elements); last rows against float64."""
    length, heads, dim = 1 << 20, 32, 128
    if torch.cuda.mem_get_info()[0] < 28 << 30:
        pytest.skip("needs 28 GiB of GPU memory")
    q = torch.empty(1, length, heads, dim, dtype=BF16, device="cuda").normal_().transpose(1, 2)
    arena = torch.empty(2, 1, length, 8, dim, dtype=BF16, device="cuda").normal_()
    k, v = arena.transpose(2, 3)
    if impl == "gluon" and choose_block_sparse_attention(q, k=k, v=v).impl != "gluon":
        pytest.skip("no Hopper path here")
    rows = length // 128
    own = torch.arange(rows, dtype=torch.int32, device="cuda")
    indices = torch.stack([own // 2, own], 1).expand(1, heads, -1, -1).contiguous()
    counts = torch.where(own == 0, 1, 2).int().expand(1, heads, -1).contiguous()
    indices[:, :, 0, 0] = 0
    out = block_sparse_attention(q, k, v, BlockSelection(indices, counts), impl=impl)  # type: ignore[arg-type]
    for head in (0, 13, 31):
        for row in (1, 4095, 4096, 4097, rows - 1):
            tokens = (indices[0, head, row].long()[:, None] * 128 + torch.arange(128, device="cuda")).flatten()
            mine = torch.arange(row * 128, (row + 1) * 128, device="cuda")
            scores = q[0, head, mine].double() @ k[0, head // 4, tokens].double().mT * dim**-0.5
            scores = scores.masked_fill(tokens[None] > mine[:, None], -torch.inf)
            wanted = scores.softmax(-1) @ v[0, head // 4, tokens].double()
            error = (out[0, head, mine].double() - wanted).norm() / wanted.norm()
            assert error < 5e-3, (head, row, error)
