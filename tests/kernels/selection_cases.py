"""The semantics of block scores, block selection and decode attention as checks that every implementation must pass.

Truth is the float64 reference. The allowed error is that of the same computation with operands and intermediate
results rounded to the inputs' own type (float32 inputs: to TF32's 11 bits where a kernel multiplies in TF32): for OAM
scores a bound for each of them, otherwise the largest error of a computation in that type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.block_selection import BlockSelection, select_blocks
from kernels.decode_attention import decode_attention
from kernels.oam_scores import KeySummary, key_sums_dtype, oam_scores, reference
from kernels.sample_scores import sample_scores

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# float16 has the 11 significant bits of TF32.
ROUNDED = {BF16: BF16, FP16: FP16, FP32: FP16}


@dataclass(frozen=True)
class Scores:
    """One prompt. stride: for OAM; every: for sample."""

    length: int
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 32
    stride: int = 8
    every: int = 4
    dtype: torch.dtype = FP32
    contiguous: bool = False  # False: the transposed view of [N, L, H, D] that transformers hands over

    def __str__(self) -> str:
        shape = f"{self.length}-{self.batch}x{self.heads}/{self.kv_heads}x{self.head_dim}-B{self.block_size}"
        return f"{shape}-s{self.stride}-e{self.every}-{str(self.dtype).removeprefix('torch.')}"

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v; k and v are 40 tokens longer, and those are NaN: reading them spoils the scores."""
        generator = torch.Generator().manual_seed(self.length)

        def make(heads: int, extra: int) -> Tensor:
            x = torch.randn(self.batch, self.length + extra, heads, self.head_dim, generator=generator)
            x *= 1 + torch.rand(x.shape[:-1], generator=generator)[..., None]
            x[:, self.length :] = torch.nan
            x = x.to(self.dtype).to(device).transpose(1, 2)
            return x.contiguous() if self.contiguous else x

        return make(self.heads, 0), make(self.kv_heads, 40), make(self.kv_heads, 40)


def oam(case: Scores, q: Tensor, k: Tensor, v: Tensor, impl: str, **kwargs: object) -> Tensor:
    return oam_scores(q, k, v, block_size=case.block_size, stride=case.stride, impl=impl, **kwargs)  # type: ignore[arg-type]


def _differences(got: Tensor, wanted: Tensor) -> Tensor:
    """float64, 0 where both are -inf; fails unless they are that in the same places and finite elsewhere."""
    hidden = wanted.isneginf()
    assert torch.equal(got.isneginf(), hidden)
    assert got[~hidden].isfinite().all()
    return (got.double() - wanted.double()).abs().masked_fill(hidden, 0.0)


def _worst(got: Tensor, wanted: Tensor) -> float:
    return float(_differences(got, wanted).max())


def sample(case: Scores, q: Tensor, k: Tensor, impl: str, **kwargs: object) -> Tensor:
    return sample_scores(q, k, block_size=case.block_size, every=case.every, impl=impl, **kwargs)  # type: ignore[arg-type]


# Largest relative error of an operand of OAM's matrix product: sums rounded to bfloat16; sums cut off to TF32, as
# tensor cores take float32; three TF32 products, summed in float32.
OAM_OPERAND = {BF16: 2.0**-8, FP16: 2.0**-10, FP32: 2.0**-17}
# Of the logarithm of a value norm, in float32 and with a GPU's approximate logarithm.
LOG_NORM = 2.0**-21


def oam_bounds(case: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Allowed error of the routing term [N, H, rows, n_keys] and of the value term [N, H, 1, n_keys], float64.

    A score is a mean of products x_c * y_c over its own number of pairs. Operands that are off by independent relative
    errors up to u put it off by more than 3 * sqrt(2) * u * |x * y|, |.| being the 2-norm over c, once in some 10^9
    scores (errors are uniform: 7 standard deviations); errors of one sign (cut off, not rounded) add 2 * u * |score|.
    """
    length, B, stride, u = case.length, case.block_size, case.stride, OAM_OPERAND[case.dtype]
    share = case.heads // case.kv_heads
    x, y = (reference._offset_sums(tensor[:, :, :length], B, stride).double() for tensor in (q, k))
    x, y = x.flatten(3), y.flip(3).flatten(3).repeat_interleave(share, 1)
    counts = reference._offset_counts(length, B, stride, q.device)
    pairs = (counts @ counts.flip(1).T).clamp(min=1) * case.head_dim**0.5
    spread = (x.square() @ y.square().mT).sqrt()
    routing = u * (3 * 2**0.5 * spread + 2 * (x @ y.mT).abs()) / pairs
    # z divides the error of a logarithm by the deviation of all norms so far.
    norms = reference._group_log_norms(v[:, :, :length], B, stride).double()
    total, squares, number = (part.nansum(-1).cumsum(-1) for part in (norms, norms.square(), (~norms.isnan()).double()))
    number = number.clamp(min=1)
    deviation = (squares / number - (total / number).square()).clamp(min=0).sqrt()
    error = 4 * LOG_NORM * norms.nan_to_num(0).abs().amax()
    value = 0.2 * torch.where(deviation > 1e-6, error / deviation, 0.0) + 1e-6
    return routing, value.repeat_interleave(share, 1)[:, :, None]


def check_oam(case: Scores, impl: str, device: str) -> None:
    q, k, v = case.inputs(device)
    cpu = (q.cpu(), k.cpu(), v.cpu())
    wanted = oam(case, *cpu, "reference")
    got = oam(case, q, k, v, impl)
    assert got.dtype == torch.float32
    routing, value = oam_bounds(case, *cpu)
    excess = (_differences(got.cpu(), wanted) / (routing + value)).amax()
    assert excess <= 1, f"{float(excess):.2f} times the allowed error"


def check_sample(case: Scores, impl: str, device: str) -> None:
    q, k, _ = case.inputs(device)
    q_cpu, k_cpu = q.cpu(), k.cpu()
    wanted = sample(case, q_cpu, k_cpu, "reference")
    got = sample(case, q, k, impl).cpu()
    rounded = ROUNDED[case.dtype]
    eager = sample(
        case, q_cpu.to(rounded).float() * (1 + torch.finfo(rounded).eps), k_cpu.to(rounded).float(), "reference"
    )
    assert _worst(got, wanted) <= 2 * _worst(eager, wanted) + 2e-6
    assert float(got.max()) <= 1 + 1e-5


def check_chunks(case: Scores, impl: str, device: str, blocks: int, estimator: str) -> None:
    """In chunks of `blocks` blocks, with earlier keys kept and without: the same bits, hence the same selection."""
    q, k, v = case.inputs(device)
    whole = oam(case, q, k, v, impl) if estimator == "oam" else sample(case, q, k, impl)
    B = case.block_size
    summary = KeySummary.allocate(
        case.batch, case.kv_heads, case.length, case.head_dim,
        block_size=B, stride=case.stride, device=q.device, dtype=key_sums_dtype(k, impl),
    )  # fmt: skip
    budgets = torch.full((whole.shape[2],), 9, dtype=torch.int32, device=device)
    selection = select_blocks(whole, budgets, max_blocks=9, impl=impl)
    for begin in range(0, case.length, blocks * B):
        end = min(case.length, begin + blocks * B)
        chunk, known_k, known_v = q[:, :, begin:end], k[:, :, :end], v[:, :, :end]
        if estimator == "oam":
            scores = oam(case, chunk, known_k, known_v, impl, query_start=begin, summary=summary)
            assert torch.equal(scores, oam(case, chunk, k, v, impl, query_start=begin))
        else:
            scores = sample(case, chunk, known_k, impl, query_start=begin)
        first, n = begin // B, scores.shape[2]
        assert torch.equal(scores, whole[:, :, first : first + n, : scores.shape[3]])
        part = select_blocks(scores, budgets[:n], first_row=first, max_blocks=9, impl=impl)
        assert_same(
            part, BlockSelection(selection.indices[:, :, first : first + n], selection.counts[:, :, first : first + n])
        )


def check_causal(case: Scores, impl: str, device: str) -> None:
    """What comes later changes no earlier row, and batch neighbours change nothing."""
    q, k, v = case.inputs(device)
    B = case.block_size
    before = oam(case, q, k, v, impl), sample(case, q, k, impl)
    edge = case.length // B // 2 * B + 3
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, edge:] *= -3
    after = oam(case, *changed, impl), sample(case, *changed[:2], impl)
    last = q[-1:], k[-1:], v[-1:]
    alone = oam(case, *last, impl), sample(case, *last[:2], impl)
    for old, new, single in zip(before, after, alone, strict=True):
        assert torch.equal(old[:, :, : edge // B], new[:, :, : edge // B])
        assert not torch.equal(old, new)
        assert torch.equal(old[-1:], single)


def check_unfilled(case: Scores, impl: str, device: str) -> None:
    """Without the entries above the diagonal: the others are the same, and so is what is selected."""
    q, k, v = case.inputs(device)
    whole, part = oam(case, q, k, v, impl), oam(case, q, k, v, impl, fill_above=False)
    n = whole.shape[-1]
    block = torch.arange(n, device=device)
    causal = (block <= block[:, None]).expand_as(whole)
    assert whole[~causal].isneginf().all()
    assert torch.equal(part[causal], whole[causal])
    budgets = (block // 3 + 2).int()
    got, wanted = (select_blocks(scores, budgets, max_blocks=n, impl=impl) for scores in (part, whole))
    assert_same(got, wanted)


def assert_same(got: BlockSelection, wanted: BlockSelection) -> None:
    """Equal counts, and equal indices up to them."""
    assert torch.equal(got.counts, wanted.counts)
    width = min(got.indices.shape[-1], wanted.indices.shape[-1])
    valid = torch.arange(width, device=got.counts.device) < got.counts[..., None]
    assert torch.equal(got.indices[..., :width][valid], wanted.indices[..., :width][valid])


def _kinds() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "normal": lambda x: x,
        "ties": lambda x: (2 * x).round() / 2,
        "equal": lambda x: torch.full_like(x, -1.5),
        "hidden": lambda x: torch.where(x < 0.3, -torch.inf, x),
        "zeros": lambda x: torch.where(x > 0, 0.0, -0.0),
        "wide": lambda x: torch.exp(20 * x),
        "infinite": lambda x: torch.where(x > 1, torch.inf, x),
    }


KINDS = tuple(_kinds())


def check_selection(kind: str, rows: int, first_row: int, impl: str, device: str) -> None:
    """Against the reference, for random, tiny and boundless budgets; columns above the diagonal hold NaN."""
    generator = torch.Generator().manual_seed(rows)
    n = first_row + rows
    scores = _kinds()[kind](torch.randn(1, 2, rows, n, generator=generator))
    i, j = torch.arange(first_row, n)[:, None], torch.arange(n)
    spoiled = scores.masked_fill(j > i, torch.nan).to(device)
    random_budgets = torch.randint(1, n // 3 + 2, (rows,), dtype=torch.int32, generator=generator)
    tiny, boundless = torch.ones_like(random_budgets), torch.full_like(random_budgets, 1 << 30)
    for budgets, sink, local in ((random_budgets, 4, 4), (random_budgets, 0, 1), (tiny, 2, 3), (boundless, 4, 4)):
        options = {"first_row": first_row, "sink_blocks": sink, "local_blocks": local, "max_blocks": n}
        wanted = select_blocks(scores, budgets, impl="reference", **options)
        got = select_blocks(spoiled, budgets.to(device), impl=impl, **options)
        assert_same(BlockSelection(got.indices.cpu(), got.counts.cpu()), wanted)


def check_selection_by_heads(impl: str, device: str) -> None:
    """Budgets for each head select what every head selects alone with its own."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(2, 3, 17, 40, generator=generator).to(device)
    # Every second of them, as a slice is not contiguous.
    budgets = torch.randint(1, 40, (2, 3, 34), dtype=torch.int32, generator=generator).to(device)[..., ::2]
    got = select_blocks(scores, budgets, first_row=23, max_blocks=40, impl=impl)
    for n in range(2):
        for h in range(3):
            alone = select_blocks(scores[n : n + 1, h : h + 1], budgets[n, h], first_row=23, max_blocks=40, impl=impl)
            assert_same(BlockSelection(got.indices[n : n + 1, h : h + 1], got.counts[n : n + 1, h : h + 1]), alone)
    assert len(got.counts.unique()) > 10


def check_selection_of_nan(impl: str, device: str, parts: tuple[tuple[int, int], ...] = ((0, 150),)) -> None:
    """A NaN score is kept by forced blocks and full rows only, and a row that lacks others keeps fewer: as the
    reference does, of which that is seen. Rows of a wider tensor, at an odd stride. parts: the rows, first and last,
    that `impl` selects."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 3, 150, 167, generator=generator)[..., 3:160]
    scores[..., 100] = torch.nan
    scores[0, 0, 120:] = torch.nan
    scores[0, 1, 110:, 30:] = torch.nan
    scores[0, 2, :, 5:20] = -torch.inf
    budgets = torch.full((150,), 60, dtype=torch.int32)
    budgets[50:60] = 56
    budgets[140:] = 1000
    wanted = select_blocks(scores, budgets, first_row=7, max_blocks=157, impl="reference")
    on_device, budgets = scores.to(device), budgets.to(device)
    for first, last in parts:
        some = on_device[:, :, first:last]
        got = select_blocks(some, budgets[first:last], first_row=7 + first, max_blocks=157, impl=impl)
        same = BlockSelection(wanted.indices[:, :, first:last], wanted.counts[:, :, first:last])
        assert_same(BlockSelection(got.indices.cpu(), got.counts.cpu()), same)
    # Row r is block r + 7. Without a score a row keeps what needs none, with too few (30 less 4 sinks) those too.
    assert (wanted.counts[0, 0, 120:140] == 8).all()
    assert (wanted.counts[0, 1, 110:140] == 8 + 26).all()
    assert (wanted.counts[0, 2, 60:140] == 60).all()
    rows, block = torch.arange(7, 157)[:, None], torch.arange(157)
    forced, full = (block < 4) | (block > rows - 4), wanted.counts == rows[:, 0] + 1
    kept = wanted.to_mask(157)
    assert not (kept & scores.isnan() & ~forced & ~full[..., None]).any()
    assert not (kept & (block > rows)).any()


@dataclass(frozen=True)
class Decode:
    lengths: tuple[int, ...]
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    dtype: torch.dtype = FP32
    window: int | None = None
    token_major: bool = False  # the arena as a view of [T, Hkv, D]
    sinks: bool = False

    def __str__(self) -> str:
        shape = f"{'+'.join(map(str, self.lengths))}-{self.heads}/{self.kv_heads}x{self.head_dim}"
        return f"{shape}-{str(self.dtype).removeprefix('torch.')}-w{self.window}{'-sinks' * self.sinks}"

    def sink_logits(self) -> Tensor | None:
        """[H]: some that hardly count, some that outweigh every key, one that is not there."""
        if not self.sinks:
            return None
        logits = torch.linspace(-20.0, 30.0, self.heads)
        logits[1] = -torch.inf
        return logits.to(self.dtype)


def check_decode(case: Decode, impl: str, device: str) -> None:
    """Extents lie apart in an arena of NaN, so that a read outside of one spoils the output."""
    generator = torch.Generator().manual_seed(sum(case.lengths))
    starts, total = [], 5
    for length in case.lengths:
        starts.append(total)
        total += length + 3
    shape = (total, case.kv_heads, case.head_dim) if case.token_major else (case.kv_heads, total, case.head_dim)
    k, v = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    if case.token_major:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    for start, length in zip(starts, case.lengths, strict=True):
        for x in (k, v):
            x[:, start : start + length] = torch.randn(case.kv_heads, length, case.head_dim, generator=generator)
    q = torch.randn(len(case.lengths), case.heads, case.head_dim, generator=generator)
    q, k, v = (x.to(case.dtype) for x in (q, k, v))
    sinks = case.sink_logits()
    got = decode_attention(
        q.to(device), k.to(device), v.to(device),
        torch.tensor(starts, device=device), torch.tensor(case.lengths, dtype=torch.int32, device=device),
        max_length=max(case.lengths), window=case.window, sinks=None if sinks is None else sinks.to(device), impl=impl,
    ).cpu()  # fmt: skip
    for s, (start, length) in enumerate(zip(starts, case.lengths, strict=True)):
        if not length:
            assert not got[s].any()
            continue
        first = start if case.window is None else start + max(0, length - case.window)
        keys, values = k[:, first : start + length], v[:, first : start + length]
        exact = _attend(q[s], keys, values, torch.float64, sinks)
        eager = float((_attend(q[s], keys, values, case.dtype, sinks) - exact).abs().max())
        error = float((got[s].double() - exact).abs().max())
        # Of one key, eager attention is exact: shares that are weighed and divided again may be off by a rounding. In
        # float32 the rounding is that of products in three terms of TF32.
        rounding = (2.0**-19 if case.dtype == FP32 else 2.0**-22) * float(exact.abs().max())
        assert error <= (8 if case.dtype == FP32 else 1.5) * eager + rounding, (s, error, eager)


def _attend(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, sinks: Tensor | None = None) -> Tensor:
    """q [H, D], k and v [Hkv, L, D], sinks [H] -> float64 [H, D], every intermediate result rounded to `dtype`."""
    grouped = q.double().unflatten(0, (k.shape[0], -1))
    logits = (grouped @ k.double().mT * q.shape[-1] ** -0.5).to(dtype).double()
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(k.shape[0], -1, 1)], -1)
    weights = torch.softmax(logits, -1).to(dtype).double()[..., : k.shape[1]]
    return (weights @ v.double()).to(dtype).double().flatten(0, 1)
