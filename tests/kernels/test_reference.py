"""The reference implementations against the formulas written out, in float64 and token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.block_selection import select_blocks, share_budgets
from kernels.block_sparse_attention import block_sparse_attention
from kernels.decode_attention import Prefixes, decode_attention
from kernels.oam_scores import KeySummary, oam_scores
from kernels.sample_scores import sample_scores


def tensors(length, heads=4, kv_heads=2, dim=8, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    shape = lambda h: (batch, h, length, dim)  # noqa: E731
    return [torch.randn(shape(h), generator=generator) for h in (heads, kv_heads, kv_heads)]


def spelled_out_oam(q, k, v, block, stride, weight):
    """spec: mean over antidiagonal pairs of q.k / sqrt(D), plus the value term with running statistics."""
    H, length, D = q.shape[1:]
    n, group = -(-length // block), H // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.full((1, H, n, n), -math.inf, dtype=torch.float64)
    for h in range(H):
        norms = v[0, h // group].norm(dim=-1)
        logs = [norms[g * stride : (g + 1) * stride].max().log() for g in range(length // stride)]
        per_block = block // stride
        for i in range(n):
            for j in range(i + 1):
                rows = range(i * block, min(length, (i + 1) * block))
                columns = range(j * block, min(length, (j + 1) * block))
                pairs = [(t, u) for t in rows for u in columns if (t + u) % stride == stride - 1]
                dots = [float(q[0, h, t] @ k[0, h // group, u]) for t, u in pairs]
                seen = torch.stack(logs[: (j + 1) * per_block])
                own = torch.stack(logs[j * per_block : (j + 1) * per_block]) if j * per_block < len(logs) else seen[:0]
                z = ((own - seen.mean()) / (seen.std(correction=0) + 1e-6)).clamp(min=0)
                value = float(z.mean()) if len(z) else 0.0
                scores[0, h, i, j] = sum(dots) / max(1, len(dots)) / math.sqrt(D) + weight * value
    return scores


@pytest.mark.parametrize("length", [64, 70, 85])
def test_oam_scores_equal_the_formula(length):
    q, k, v = tensors(length)
    wanted = spelled_out_oam(q, k, v, block=16, stride=4, weight=0.2)
    got = oam_scores(q, k, v, block_size=16, stride=4, value_weight=0.2, impl="reference")
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("every", [1, 4, 16])
@pytest.mark.parametrize("length", [64, 70])
def test_sample_scores_equal_the_formula(every, length):
    q, k, _ = tensors(length)
    block, n, peaks = 16, -(-length // 16), 4
    wanted = torch.full((1, 4, n, n), -math.inf, dtype=torch.float64)
    for h in range(4):
        for i in range(n):
            shares = []
            for start in range(i * block, min(length, (i + 1) * block), every):
                row = min(length, start + every) - 1
                weights = torch.zeros(i + 1, dtype=torch.float64)
                for j in range(i + 1):
                    for group in range(peaks):
                        keys = [u for u in range(j * block, min(row + 1, (j + 1) * block)) if u // 2 % peaks == group]
                        if keys:
                            logits = k[0, h // 2, keys].double() @ q[0, h, row].double() / math.sqrt(8)
                            weights[j] += logits.max().exp()
                shares.append(weights / weights.sum())
            wanted[0, h, i, : i + 1] = torch.stack(shares).amax(0)
    got = sample_scores(q, k, block_size=block, every=every, impl="reference")
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-5)


def test_ties_go_to_the_lower_block_and_counts_are_exact():
    scores = torch.zeros(1, 1, 10, 10)
    selection = select_blocks(
        scores, torch.full((10,), 5, dtype=torch.int32), sink_blocks=1, local_blocks=2, max_blocks=6, impl="reference"
    )
    assert selection.counts[0, 0].tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 5, 5]
    assert selection.indices[0, 0, 9, :5].tolist() == [0, 1, 2, 8, 9]
    assert selection.density() == pytest.approx((1 + 2 + 3 + 4 + 6 * 5) / 55)


def test_selection_in_chunks_keeps_absolute_rows():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 12, 12, generator=generator)
    budgets = torch.full((12,), 4, dtype=torch.int32)
    options = {"sink_blocks": 1, "local_blocks": 1, "max_blocks": 4, "impl": "reference"}
    whole = select_blocks(scores, budgets, **options).to_mask(12)
    part = select_blocks(scores[:, :, 5:], budgets[5:], first_row=5, **options).to_mask(12)
    assert torch.equal(part, whole[:, :, 5:])


def test_a_causal_block_that_scores_minus_infinity_still_fills_the_budget():
    scores = torch.full((1, 1, 6, 6), -math.inf)
    budgets = torch.full((6,), 4, dtype=torch.int32)
    selection = select_blocks(scores, budgets, sink_blocks=0, local_blocks=1, max_blocks=4, impl="reference")
    assert selection.indices[0, 0, 5, :4].tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_sparse_attention_equals_masked_softmax(length, window):
    q, k, v = tensors(length, batch=2)
    n = -(-length // 16)
    scores = torch.randn(2, 4, n, n, generator=torch.Generator().manual_seed(3))
    budgets = torch.full((n,), 3, dtype=torch.int32)
    selection = select_blocks(scores, budgets, sink_blocks=1, local_blocks=1, max_blocks=3, impl="reference")
    for chosen in (selection, None):
        out, lse = block_sparse_attention(
            q, k, v, chosen, block_size=16, window=window, return_lse=True, impl="reference"
        )
        t = torch.arange(length)
        visible = (t <= t[:, None]) if window is None else (t <= t[:, None]) & (t > t[:, None] - window)
        if chosen is not None:
            blocks = chosen.to_mask(n).repeat_interleave(16, 2).repeat_interleave(16, 3)
            visible = visible & blocks[:, :, :length, :length]
        logits = q.double() @ k.double().repeat_interleave(2, 1).mT / math.sqrt(8)
        logits = logits.masked_fill(~visible, -math.inf)
        wanted = logits.softmax(-1) @ v.double().repeat_interleave(2, 1)
        torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_decode_attention_equals_attention_of_the_last_token():
    q, k, v = tensors(60)
    arena_k, arena_v = torch.full((2, 100, 8), math.nan), torch.full((2, 100, 8), math.nan)
    arena_k[:, 30:90], arena_v[:, 30:90] = k[0], v[0]
    starts, lengths = torch.tensor([30, 0, 30]), torch.tensor([60, 0, 10], dtype=torch.int32)
    queries = torch.stack((q[0, :, -1], q[0, :, 0], q[0, :, 9]))
    out = decode_attention(queries, arena_k, arena_v, starts, lengths, max_length=64, impl="reference")
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[0], dense[0, :, -1])
    assert torch.equal(out[1], torch.zeros(4, 8))
    torch.testing.assert_close(out[2], dense[0, :, 9])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda q, k, v: oam_scores(q, k, v, query_start=3, block_size=16),
            "must start at a multiple of block_size=16",
        ),
        (lambda q, k, v: oam_scores(q, k, v, block_size=16, stride=5), "stride must divide"),
        (lambda q, k, v: oam_scores(q, k[:, :, :9], v[:, :, :9], block_size=16), "lie inside the 9 keys"),
        (lambda q, k, v: oam_scores(q, k.double(), v, block_size=16), "share a floating-point type"),
        (lambda q, k, v: sample_scores(q, k, block_size=16, every=3), "every must divide"),
        (lambda q, k, v: oam_scores(q, k, v, query_start=16, key_start=16, block_size=16), "summary holds the keys"),
        (lambda q, k, v: block_sparse_attention(q, k[:, :, :9], v[:, :, :9], None), "lie inside the 9 keys"),
        (lambda q, k, v: block_sparse_attention(q, k, v, None, block_size=100), "block_size must be one of"),
        (lambda q, k, v: block_sparse_attention(q, k, v, None, impl="cuda"), "impl='cuda' is not known"),
        (lambda q, k, v: block_sparse_attention(q[:, :3], k, v, None), "H a multiple of Hkv"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*tensors(32))


@pytest.mark.parametrize("prefix", [False, True], ids=["own", "prefix"])
def test_rows_that_are_not_behind_one_another_are_refused(prefix):
    """One number that is seen as one for each row: the kernels would read what lies behind it."""
    q, (_, k, v) = torch.zeros(4, 4, 8), tensors(16)
    starts, lengths = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int32)
    seen = torch.zeros(1, 1, dtype=torch.int64).expand(1, 4).flatten()
    prefixes = Prefixes(seen, lengths, torch.arange(4, dtype=torch.int32)[None], 4) if prefix else None
    with pytest.raises(ValueError, match=r"starts must be contiguous int64 \[4\], .* strides \(0,\)"):
        decode_attention(q, k[0], v[0], starts if prefix else seen, lengths, max_length=4, prefixes=prefixes)


def test_chunks_out_of_order_are_refused():
    q, k, v = tensors(64)
    summary = KeySummary.allocate(1, 2, 64, 8, block_size=16, stride=4, device=q.device)
    with pytest.raises(ValueError, match=r"summary holds 0 blocks.*pass the chunks of a prompt in order"):
        oam_scores(q[:, :, 32:], k, v, query_start=32, block_size=16, stride=4, summary=summary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(1, 2, 3, 3).double()}, "scores must be float32"),
        ({"first_row": 2}, "3 rows from 2 need at least 5 key blocks, got 4"),
        ({"budgets": torch.ones(1, 2, 3, dtype=torch.int32)}, r"budgets must be int32 \[3\]"),
        ({"budgets": torch.ones(3)}, "got torch.float32"),
        ({"local_blocks": 0}, "local_blocks >= 1 are needed, got 4, 0"),
        ({"floor": 1.5}, "got floor=1.5, cap=4.0"),
        ({"cap": 0.9}, "got floor=0.2, cap=0.9"),
    ],
)
def test_what_cannot_be_shared_is_named(changes, message):
    given = {"scores": torch.zeros(1, 2, 3, 4), "budgets": torch.ones(3, dtype=torch.int32), "floor": 0.2, "cap": 4.0}
    with pytest.raises(ValueError, match=message):
        share_budgets(**given | changes)


def test_budgets_of_heads_must_fit_the_scores():
    with pytest.raises(ValueError, match=r"int32 \[3\] or \[1, 2, 3\], got torch.int32 \(2, 3\)"):
        select_blocks(torch.zeros(1, 2, 3, 4), torch.ones(2, 3, dtype=torch.int32), max_blocks=3)
