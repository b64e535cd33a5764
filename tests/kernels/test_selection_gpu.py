"""Block scores, block selection, decode attention on a GPU: against float64, odd lengths, graphs, a million tokens."""

from __future__ import annotations

import pytest
import torch

from kernels.block_selection import select_blocks
from kernels.decode_attention import decode_attention
from kernels.oam_scores import oam_scores
from kernels.sample_scores import sample_scores
from tests.kernels import selection_cases as cases
from tests.kernels.selection_cases import BF16, FP16, FP32, Decode, Scores

pytestmark = pytest.mark.gpu

LARGE = {"heads": 8, "kv_heads": 2, "head_dim": 128, "block_size": 128, "stride": 16, "every": 8}
SHAPES = [
    *(Scores(length, dtype=BF16, **LARGE) for length in (1, 127, 128, 129, 1000, 1733)),  # type: ignore[arg-type]
    *(Scores(777, head_dim=dim, dtype=dtype) for dim in (64, 96, 128, 256) for dtype in (BF16, FP16, FP32)),
    *(Scores(777, head_dim=512, dtype=dtype) for dtype in (BF16, FP16)),
    *(Scores(900, block_size=block, stride=8, every=2, dtype=BF16) for block in (16, 32, 64, 128)),
    Scores(1100, batch=3, heads=6, kv_heads=6, block_size=128, every=1, dtype=BF16),
    Scores(1100, heads=7, kv_heads=1, block_size=64, stride=64, every=64, dtype=BF16, contiguous=True),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_scores(case: Scores, poisoned: None) -> None:
    cases.check_oam(case, "triton", "cuda")
    cases.check_sample(case, "triton", "cuda")


@pytest.mark.parametrize("blocks", [1, 2, 7])
@pytest.mark.parametrize("estimator", ["oam", "sample"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_chunks_change_nothing(estimator: str, blocks: int, dtype: torch.dtype, poisoned: None) -> None:
    cases.check_chunks(Scores(2900, dtype=dtype, **LARGE), "triton", "cuda", blocks, estimator)  # type: ignore[arg-type]
    cases.check_chunks(Scores(1000, dtype=dtype), "triton", "cuda", blocks, estimator)


def test_later_tokens_and_neighbours_change_nothing(poisoned: None) -> None:
    cases.check_causal(Scores(1900, batch=2, dtype=BF16, **LARGE), "triton", "cuda")  # type: ignore[arg-type]


def test_nan_is_never_selected(poisoned: None) -> None:
    cases.check_selection_of_nan("triton", "cuda")


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(("rows", "first_row"), [(300, 0), (64, 960), (5, 8187), (3, 20000), (1, 0)])
def test_selection(kind: str, rows: int, first_row: int, poisoned: None) -> None:
    cases.check_selection(kind, rows, first_row, "triton", "cuda")


def test_budgets_for_each_head(poisoned: None) -> None:
    cases.check_selection_by_heads("triton", "cuda")


@pytest.mark.parametrize(
    "case",
    [
        *(
            Decode((0, 1, 129, 5000), head_dim=dim, dtype=dtype)
            for dim in (64, 96, 128, 256, 512)
            for dtype in (BF16, FP32)
        ),
        Decode((127, 128, 1000), heads=6, head_dim=96, dtype=FP16, window=130, token_major=True),
        Decode((40_000, 3), heads=32, kv_heads=8, dtype=BF16, window=4096),
        Decode((9000, 17_123), heads=32, kv_heads=1, dtype=BF16),
        *(
            Decode((0, 1, 129, 5000), heads=64, kv_heads=8, head_dim=64, dtype=dtype, window=window, sinks=True)
            for dtype in (BF16, FP32)
            for window in (None, 128)
        ),
    ],
    ids=str,
)
def test_decode(case: Decode, poisoned: None) -> None:
    cases.check_decode(case, "triton", "cuda")


def test_no_host_synchronisation() -> None:
    """From q, k, v to the selection, and decode attention: captured in a CUDA graph, replayed on other inputs."""
    case = Scores(2000, dtype=BF16, **LARGE)  # type: ignore[arg-type]
    q, k, v = case.inputs("cuda")
    budgets = torch.full((16,), 5, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 500], device="cuda")
    lengths = torch.tensor([400, 1000], dtype=torch.int32, device="cuda")

    def everything() -> list[torch.Tensor]:
        by_oam = select_blocks(oam_scores(q, k, v), budgets, max_blocks=9)
        by_sample = select_blocks(sample_scores(q, k), budgets, max_blocks=9)
        decoded = decode_attention(q[0, :, :2].transpose(0, 1), k[0], v[0], starts, lengths, max_length=1000)
        return [by_oam.indices, by_oam.counts, by_sample.indices, by_sample.counts, decoded]

    everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for x in (q, k, v):
        x[:, :, :2000] = torch.randn_like(x[:, :, :2000])
    lengths.copy_(torch.tensor([7, 0], dtype=torch.int32))
    graph.replay()
    wanted = everything()
    for i in (0, 2):
        valid = torch.arange(9, device="cuda") < captured[i + 1][..., None]
        assert torch.equal(captured[i][valid], wanted[i][valid])
    assert torch.equal(captured[4], wanted[4])


def test_without_entries_above_the_diagonal(poisoned: None) -> None:
    cases.check_unfilled(Scores(2900, heads=8, kv_heads=2, head_dim=128, dtype=BF16), "triton", "cuda")


def test_a_million_tokens() -> None:
    """Offsets past 2^31 elements: the last chunk of 1M tokens, and decoding at their end, against small extracts."""
    length, chunk, kv_heads, D = 1 << 20, 1024, 17, 128
    k = torch.randn(1, length, kv_heads, D, dtype=BF16, device="cuda").transpose(1, 2)
    assert k.numel() > 1 << 31
    q = torch.randn(1, chunk, kv_heads, D, dtype=BF16, device="cuda").transpose(1, 2)
    far = oam_scores(q, k, k, query_start=length - chunk, value_weight=0.0)
    k_tail = k[:, -1:, -chunk:].contiguous()
    near = oam_scores(q[:, -1:], k_tail, k_tail, value_weight=0.0)
    assert torch.equal(far[:, -1:, :, -8:], near)
    shares = sample_scores(q[:, -1:], k[:, -1:], query_start=length - chunk)
    tail = sample_scores(q[:, -1:], k_tail)
    # The same shares up to each row's total; the largest row may differ, so only the order of magnitude is compared.
    assert (shares[..., -8:].nan_to_num(0, neginf=0) <= tail.nan_to_num(0, neginf=0) + 1e-6).all()
    starts = torch.tensor([length - 3000], device="cuda")
    lengths = torch.tensor([3000], dtype=torch.int32, device="cuda")
    query = q[0, :, :1].transpose(0, 1)
    got = decode_attention(query, k[0], k[0], starts, lengths, max_length=1 << 20)
    extract = k[0, :, -3000:].contiguous()
    wanted = decode_attention(query, extract, extract, torch.zeros_like(starts), lengths, max_length=1 << 20)
    assert torch.equal(got, wanted)
