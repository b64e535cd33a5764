"""The semantics of the fp8 attention operations as checks that every implementation has to pass.

Truth is float64 attention over the dequantised operands, so that only what a kernel itself does is measured: it rounds
P to e4m3. The allowed error is that of the reference, which rounds the same P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels._common.fp8 import BIAS_HEADS, join_bias, split_bias
from kernels.block_selection import BlockSelection
from kernels.block_sparse_attention_fp8 import block_sparse_attention_fp8
from kernels.decode_attention_fp8 import decode_attention_fp8
from kernels.fp8_heads import (
    FP8,
    KEY_GROUP,
    HeadScales,
    append_kv,
    bias_shape,
    key_bias,
    quantize_heads,
    write_kv,
)
from kernels.fp8_heads.reference import quantize, restore_keys, store_order
from kernels.oam_scores import KeySummary, key_sums_dtype, oam_scores
from kernels.sample_scores import sample_scores
from tests.kernels.attention_cases import Case, eager, random_selection, visible_keys
from tests.kernels.selection_cases import Decode, Scores
from tests.kernels.selection_cases import _attend as attend_one

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# A flash kernel rounds P relative to the largest score so far, and its output in another order.
ALLOWED = 1.25
# Hopper's fp8 tensor cores cut a sum off about 14 bits below its largest term, 32 products at a time and always towards
# zero, so that the errors of a head's steps add up. Largest seen in these cases on an H100: 2.6 x 2^-13, the same in
# every implementation.
SUM_EPS = 2.0**-11
NAN = 0x7F

CASES = [
    *(Case(length, unknown=40) for length in (1, 127, 128, 129, 1000, 1433)),
    *(Case(length, keep=None, unknown=40, heads=8, kv_heads=1) for length in (1, 15, 127, 128, 129, 1000)),
    *(Case(700, start=1024, head_dim=dim) for dim in (64, 96, 128, 256)),
    *(Case(700, start=1024, head_dim=dim, keep=None, dtype=FP16) for dim in (64, 128)),
    *(Case(300, start=512, block_size=block, head_dim=64) for block in (32, 64, 256)),
    Case(500, batch=3, heads=6, kv_heads=6, dtype=FP32),
    Case(640, batch=2, heads=32, kv_heads=8, keep=0.25, scale=0.2),
    Case(900, start=333, keep=None),
    Case(900, start=128, window=300),
    Case(900, start=77, keep=None, window=129, head_dim=256),
]


@dataclass(frozen=True)
class Inputs:
    """Operands in fp8 as the engine holds them, their exact values, and the selection."""

    q: Tensor
    k: Tensor
    vt: Tensor
    scales: HeadScales
    selection: BlockSelection | None
    exact: tuple[Tensor, Tensor, Tensor]  # float64 q [N, H, Lq, D]; k, v [N, Hkv, known, D]
    bias: Tensor | None  # e4m3 [N, Hkv, P, T, 16]

    def exact_with_bias(self) -> tuple[Tensor, Tensor, Tensor]:
        """`exact`, with a dimension of q and k more for each head of a KV head, which adds that head's bias."""
        q, k, v = self.exact
        if self.bias is None:
            return self.exact
        heads, group = q.shape[1], q.shape[1] // k.shape[1]
        units = self.scales.q.double() * self.scales.k.double().repeat_interleave(group)
        bias = join_bias(self.bias[:, :, :, : k.shape[2]], group).double() * units[:, None]
        ones = torch.eye(group, dtype=q.dtype, device=q.device).repeat(heads // group, 1)
        q = torch.cat([q, ones[None, :, None].expand(*q.shape[:3], group)], dim=-1)
        return q, torch.cat([k, bias.unflatten(1, (-1, group)).mT], dim=-1), v


def power_of_two_scale(x: Tensor, headroom: float = 4.0) -> Tensor:
    """One scale a head of x [N, H, L, D]."""
    return torch.exp2((x.abs().amax((0, 2, 3)) * headroom / 448).log2().ceil()).float()


def make_inputs(case: Case, device: str) -> Inputs:
    """q as a view of [N, L, H, D]; k and vt views into arenas that hold NaN wherever nothing was written."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    known = case.start + case.queries
    stored = -(-known // KEY_GROUP) * KEY_GROUP

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(case.batch, heads, tokens, case.head_dim, generator=generator)

    q, k, v = normal(case.heads, case.queries), normal(case.kv_heads, known), normal(case.kv_heads, known)
    k[:, :, known // 3 : known // 3 + 20] *= 3  # the running maximum has to grow late
    scales = HeadScales(*(power_of_two_scale(x) for x in (q, k, v)))
    q8, k8, v8 = (quantize(x, s[:, None, None]) for x, s in zip((q, k, v), (scales.q, scales.k, scales.v), strict=True))
    exact = tuple(
        (x.double() * s[:, None, None]).to(device)
        for x, s in zip((q8, k8, v8), (scales.q, scales.k, scales.v), strict=True)
    )
    extent = known + case.unknown // KEY_GROUP * KEY_GROUP + KEY_GROUP
    extent = extent // KEY_GROUP * KEY_GROUP
    k_arena = torch.full((case.batch, case.kv_heads, extent + 64, case.head_dim), NAN, dtype=torch.uint8).view(FP8)
    v_arena = torch.full((case.batch, case.kv_heads, case.head_dim, extent + 64), NAN, dtype=torch.uint8).view(FP8)
    k_arena[:, :, 32 : 32 + known] = k8
    padded = torch.zeros(case.batch, case.kv_heads, case.head_dim, stored).to(FP8)
    padded[..., :known] = v8.mT
    v_arena[..., 32 : 32 + stored] = store_order(padded)
    k_arena, v_arena = k_arena.to(device), v_arena.to(device)
    group = case.heads // case.kv_heads
    shape = bias_shape(case.heads, case.kv_heads, extent + 64)
    bias_arena = torch.full((case.batch, *shape), NAN, dtype=torch.uint8).view(FP8)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    units = (scales.q * scales.k.repeat_interleave(group) * scale).view(case.kv_heads, 1, group)
    biases = torch.randn(case.batch, case.kv_heads, known, group, generator=generator) * 3 / units
    of_planes = torch.nn.functional.pad(biases, (0, -group % BIAS_HEADS)).unflatten(3, (-1, BIAS_HEADS))
    bias_arena[:, :, :, 32 : 32 + known] = split_bias(of_planes).transpose(2, 3).flatten(4)
    bias_arena = bias_arena.to(device)
    selection = random_selection(case, generator) if case.keep is not None else None
    if selection is not None:
        selection = BlockSelection(selection.indices.to(device), selection.counts.to(device))
    return Inputs(
        q8.transpose(1, 2).contiguous().transpose(1, 2).to(device),
        k_arena[:, :, 32 : 32 + extent],
        v_arena[..., 32 : 32 + extent],
        HeadScales(*(s.to(device) for s in (scales.q, scales.k, scales.v))),
        selection,
        exact,  # type: ignore[arg-type]
        # Without one, too.
        bias_arena[:, :, :, 32 : 32 + extent] if case.start or case.queries % 2 else None,
    )


def assert_no_worse(out: Tensor, reference: Tensor, true: Tensor) -> None:
    """The error of `out` is that of `reference`, up to ALLOWED and float32's own roundings."""
    floor = 8 * torch.finfo(torch.float32).eps
    error, allowed, norm = (out.double() - true).norm(), (reference.double() - true).norm(), true.norm()
    assert error <= ALLOWED * allowed + floor * norm, f"error {error / norm:.2e}, reference {allowed / norm:.2e}"
    # The largest single error too, so that one wrong row does not drown in the norm. A maximum scatters more: twice.
    worst, allowed, norm = (
        (out.double() - true).abs().amax(),
        (reference.double() - true).abs().amax(),
        true.abs().amax(),
    )
    assert worst <= 2 * ALLOWED * allowed + floor * norm, f"largest error {worst:.2e}, reference {allowed:.2e}"


def check_attention(case: Case, impl: str, device: str) -> None:
    """Call with torch.empty poisoned (see conftest)."""
    inputs = make_inputs(case, device)

    def run(impl: str) -> tuple[Tensor, Tensor]:
        result = block_sparse_attention_fp8(
            inputs.q,
            inputs.k,
            inputs.vt,
            inputs.scales,
            inputs.selection,
            query_start=case.start,
            block_size=case.block_size,
            scale=case.scale,
            window=case.window,
            bias=inputs.bias,
            dtype=case.dtype,
            return_lse=True,
            impl=impl,
        )
        assert isinstance(result, tuple)
        return result

    before = [t.view(torch.uint8).clone() for t in (inputs.q, inputs.k, inputs.vt)]
    out, lse = run(impl)
    for tensor, copy in zip((inputs.q, inputs.k, inputs.vt), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), copy), "an input was written to"
    assert out.shape == inputs.q.shape
    assert out.dtype == case.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert not out.isnan().any(), "rows were not written, or NaN outside of the known keys was read"

    q, k, v = inputs.exact_with_bias()
    visible = visible_keys(case, inputs.selection, device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    true_out, true_lse = eager(q, k, v, visible, scale)
    reference, _ = run("reference")
    assert_no_worse(out, reference, true_out)
    # A log-sum-exp is wrong by no more than its worst score, a score by the rounding of a sum of magnitudes; and its
    # sum is of weights in e4m3, each wrong by up to 2^-4, which many of them even out.
    heads_per_kv = q.shape[1] // k.shape[1]
    magnitude = (q.abs() @ k.abs().repeat_interleave(heads_per_kv, 1).mT) * scale
    magnitude = magnitude.masked_fill(~visible, 0).amax(-1)
    scores = (q @ k.repeat_interleave(heads_per_kv, 1).mT) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    rounding = 4 * 2.0**-4 / 3**0.5 * weights.norm(dim=-1)
    excess = ((lse.double() - true_lse).abs() / (SUM_EPS * magnitude + 1e-6 * true_lse.abs() + rounding)).amax()
    assert excess <= 1, f"log-sum-exp: {excess:.2f} of the allowed error"


def bits(x: Tensor) -> Tensor:
    return x.cpu().view(torch.uint8)


def check_writing(length: int, dtype: torch.dtype, head_dim: int, impl: str, device: str) -> None:
    """quantize_heads, write_kv and append_kv equal torch's own conversion, bit for bit, and write nothing else: without
    a shift of the keys, and with one. key_bias is as exact as float32, and a key's the same in any chunk.
    """
    for shifted in (False, True):
        _check_writing(length, dtype, head_dim, shifted, impl, device)


def _check_writing(length: int, dtype: torch.dtype, head_dim: int, shifted: bool, impl: str, device: str) -> None:
    generator = torch.Generator().manual_seed(length)
    heads, room = 3, -(-length // KEY_GROUP) * KEY_GROUP
    made = torch.randn(2, length + 3, heads, head_dim, generator=generator)
    made *= 10 ** torch.empty(made.shape).uniform_(-4, 2, generator=generator)  # subnormal numbers and saturation
    made[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    k, v = made.to(dtype).to(device).transpose(1, 2)[:, None]
    shift = torch.randn(heads, head_dim, generator=generator).to(device) if shifted else None
    scales = HeadScales(*(torch.tensor([0.25, 0.5, 0.3], device=device) * f for f in (1, 2, 3)), shift)

    def wanted(x: Tensor, scale: Tensor) -> Tensor:
        return (x.float() * (1.0 / scale)).clamp(-448, 448).to(FP8)

    q8 = quantize_heads(k, scales.q, shift, impl=impl)
    assert q8.transpose(1, 2).is_contiguous()
    less = k.float() - (0 if shift is None else shift[:, None])
    assert torch.equal(bits(q8.contiguous()), bits(wanted(less, scales.q[:, None, None]).contiguous()))
    assert bool(q8.float().isfinite().all())

    start, tokens = 32, 80 + room
    arenas = [
        torch.full(shape, NAN, dtype=torch.uint8, device=device).view(FP8)
        for shape in ((heads, tokens, head_dim), (heads, head_dim, tokens))
    ]
    write_kv(k[:, :, :length], v[:, :, :length], scales, *arenas, start, impl=impl)
    key, value = (
        bits(wanted(x, s[:, None, None]).contiguous())
        for x, s in ((k[0].float() - (0 if shift is None else shift[:, None]), scales.k), (v[0], scales.v))
    )
    k_wanted = torch.full((heads, tokens, head_dim), NAN, dtype=torch.uint8)
    v_wanted = torch.full((heads, tokens, head_dim), NAN, dtype=torch.uint8)
    k_wanted[:, start : start + length] = key[:, :length]
    v_wanted[:, start : start + room] = 0
    v_wanted[:, start : start + length] = value[:, :length]

    def compare() -> None:
        assert torch.equal(bits(arenas[0]), k_wanted)
        assert torch.equal(restore_keys(bits(arenas[1])), v_wanted.mT)

    compare()
    # Three more tokens one by one beside a second document, into groups that hold zeros or nothing.
    for i in range(3):
        mine, other = start + length + i, start + room + 16 + i
        chosen = torch.tensor([length + i, i], device=device)
        slots = torch.tensor([mine, other], device=device)
        append_kv(*(x[0].transpose(0, 1)[chosen] for x in (k, v)), scales, *arenas, slots, impl=impl)
        for slot, token in ((mine, length + i), (other, i)):
            k_wanted[:, slot] = key[:, token]
            if slot % KEY_GROUP == 0:
                v_wanted[:, slot : slot + KEY_GROUP] = 0
            v_wanted[:, slot] = value[:, token]
        compare()


def check_runs(impl: str, device: str) -> None:
    """Tokens that follow one another in one call are written as one after the other: into one group of 16, over its
    border, into groups that hold something already; and where a run breaks off.
    """
    generator = torch.Generator().manual_seed(0)
    heads, head_dim, run, scratch = 2, 64, 5, 448
    scales = HeadScales(*(torch.tensor([0.25, 0.5], device=device) for _ in range(3)))
    firsts = [0, 78, 128, 204, 271, 336]
    slots = [[first + i for i in range(run)] for first in firsts]
    slots[2][3:], slots[4][1:] = [scratch] * 2, [scratch] * 4
    flat = torch.tensor([slot for row in slots for slot in row], device=device)
    k, v = torch.randn(2, len(flat), heads, head_dim, generator=generator).to(device)
    arenas = [
        torch.full(shape, NAN, dtype=torch.uint8, device=device).view(FP8)
        for shape in ((heads, 464, head_dim), (heads, head_dim, 464))
    ]
    wanted = [arena.clone() for arena in arenas]
    append_kv(k, v, scales, *arenas, flat, run=run, impl=impl)
    for i in range(len(flat)):
        append_kv(k[i : i + 1], v[i : i + 1], scales, *wanted, flat[i : i + 1], impl="reference")
    assert torch.equal(bits(arenas[0])[:, :scratch], bits(wanted[0])[:, :scratch])
    assert torch.equal(bits(arenas[1])[..., :scratch], bits(wanted[1])[..., :scratch])


def check_key_bias(length: int, dtype: torch.dtype, head_dim: int, impl: str, device: str) -> None:
    """As exact as float32, where it belongs and nowhere else, and a key's the same in any chunk."""
    generator = torch.Generator().manual_seed(length)
    heads, kv_heads, start = 6, 2, 5
    k = torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype).to(device).transpose(0, 1)[None]
    mean = torch.randn(heads, head_dim, generator=generator).to(device)
    shift = torch.randn(kv_heads, head_dim, generator=generator).to(device)
    scales = HeadScales(
        2.0 ** torch.arange(-3, 3, device=device), *(2.0 ** torch.arange(-1, 1, device=device) for _ in range(2)),
        shift, mean,
    )  # fmt: skip
    shape = (2, *bias_shape(heads, kv_heads, start + length + 7))
    whole, pieces = torch.full(shape, NAN, dtype=torch.uint8, device=device).view(FP8)
    key_bias(k, scales, whole, start, impl=impl)
    cut = length // 3
    key_bias(k[:, :, cut:], scales, pieces, start + cut, impl=impl)
    key_bias(k[:, :, :cut] if cut else k[:, :, :1], scales, pieces, start, impl=impl)
    assert torch.equal(bits(whole), bits(pieces))
    filled = ~whole.float().isnan()
    assert filled[:, :, start : start + length].all()
    assert filled.sum() == kv_heads * length * 16
    assert not whole.float()[:, :, start : start + length, 12:].any(), "of the head that is not there"
    keys = (k[0].float() - shift[:, None]).double().repeat_interleave(3, 0)
    units = scales.q.double() * scales.k.double().repeat_interleave(3)
    products = keys * mean.double()[:, None]
    got = join_bias(whole[None, :, :, start : start + length], heads // kv_heads)[0].double() * units[:, None]
    true = products.sum(-1)
    # The last part's smallest number is 2^-13.
    limit = 2.0**-16 * true.abs() + 2.0**-20 * products.abs().sum(-1) + 2.0**-14 * units[:, None]
    assert ((got - true).abs() <= limit).all()


DECODE = [
    Decode((0, 1, 129, 700), dtype=BF16),
    Decode((127, 128, 1000), head_dim=96, dtype=FP16, window=130),
    Decode((33, 17), heads=3, kv_heads=3, head_dim=256, window=5),
    Decode((5000, 15, 16), heads=32, kv_heads=2, head_dim=64),
    Decode((0, 1, 129, 700), heads=64, kv_heads=8, head_dim=64, dtype=BF16, sinks=True),
    Decode((127, 128, 1000), head_dim=96, dtype=FP16, window=130, sinks=True),
]


def check_decode(case: Decode, impl: str, device: str) -> None:
    """Extents at multiples of 16 in arenas of NaN, where a read outside of one spoils the output; large values for keys
    that only their group of 16 holds."""
    generator = torch.Generator().manual_seed(sum(case.lengths))
    starts, total = [], 48
    for length in case.lengths:
        starts.append(total)
        total += -(-length // KEY_GROUP) * KEY_GROUP + 32
    k_arena = torch.full((case.kv_heads, total, case.head_dim), NAN, dtype=torch.uint8).view(FP8)
    vt_arena = torch.full((case.kv_heads, case.head_dim, total), NAN, dtype=torch.uint8).view(FP8)
    ones = torch.ones(case.kv_heads)
    scales = HeadScales(torch.ones(case.heads), ones * 2.0**-5, ones * 2.0**-6)
    exact = []
    for start, length in zip(starts, case.lengths, strict=True):
        k, v = torch.randn(2, case.kv_heads, length, case.head_dim, generator=generator)
        k8, v8 = quantize(k, scales.k[:, None, None]), quantize(v, scales.v[:, None, None])
        k_arena[:, start : start + length] = k8
        room = -(-length // KEY_GROUP) * KEY_GROUP
        columns = torch.full((case.kv_heads, case.head_dim, room), 400.0).to(FP8)
        columns[..., :length] = v8.mT
        vt_arena[..., start : start + room] = store_order(columns)
        exact.append((k8.double() * scales.k[:, None, None], v8.double() * scales.v[:, None, None]))
    q = torch.randn(len(case.lengths), case.heads, case.head_dim, generator=generator).to(case.dtype) * 3
    sinks = case.sink_logits()
    got = decode_attention_fp8(
        q.to(device), k_arena.to(device), vt_arena.to(device),
        HeadScales(*(s.to(device) for s in (scales.q, scales.k, scales.v))),
        torch.tensor(starts, device=device), torch.tensor(case.lengths, dtype=torch.int32, device=device),
        max_length=max(case.lengths), window=case.window, sinks=None if sinks is None else sinks.to(device), impl=impl,
    ).cpu()  # fmt: skip
    assert got.dtype == case.dtype
    for s, length in enumerate(case.lengths):
        if not length:
            assert not got[s].any()
            continue
        first = 0 if case.window is None else max(0, length - case.window)
        k, v = (x[:, first:length] for x in exact[s])
        true = attend_one(q[s], k, v, torch.float64, sinks)
        # Queries and probabilities are kept to float16's 11 bits.
        eager_error = (attend_one(q[s], k, v, BF16 if case.dtype == BF16 else FP16, sinks) - true).abs().max()
        error = (got[s].double() - true).abs().max()
        assert error <= 1.5 * eager_error + 2e-7, (s, error, eager_error)


def check_sample(case: Scores, impl: str, device: str) -> None:
    """Scores from keys in fp8: as far from those of the exact keys as the reference's, in one piece and in chunks."""
    q, k, _ = case.inputs(device)
    length = case.length
    scales = HeadScales(power_of_two_scale(q), power_of_two_scale(k[:, :, :length]), torch.ones(case.kv_heads))
    scales = HeadScales(*(s.to(device) for s in (scales.q, scales.k, scales.v)))
    k8 = quantize(k, scales.k[:, None, None])
    options: dict[str, Any] = {"block_size": case.block_size, "every": case.every}

    def run(impl: str) -> Tensor:
        return sample_scores(q, k8, scales=scales, impl=impl, **options)

    got, reference = run(impl), run("reference")
    true = sample_scores(q.double(), k[:, :, :length].double(), impl="reference", **options)
    assert torch.equal(got.isneginf(), true.isneginf())
    seen = ~true.isneginf()
    error, allowed = ((x[seen].double() - true[seen]).norm() / true[seen].norm() for x in (got, reference))
    assert error <= ALLOWED * allowed + 1e-6, f"error {error:.2e}, reference {allowed:.2e}"
    cut = length // 2 // case.block_size * case.block_size
    if cut:
        rest = sample_scores(q[:, :, cut:], k8, query_start=cut, scales=scales, impl=impl, **options)
        assert torch.equal(rest, got[:, :, cut // case.block_size :])


def check_oam_by_chunks_of_keys(impl: str, device: str) -> None:
    """A chunk scored by its own keys and the summary alone gets the same bits as with all keys at hand."""
    case = Scores(277, heads=2, kv_heads=1, block_size=16, stride=4)
    q, k, v = case.inputs(device)
    options: dict[str, object] = {"block_size": 16, "stride": 4, "impl": impl}
    whole = oam_scores(q, k, v, **options)  # type: ignore[arg-type]
    summary = KeySummary.allocate(
        1, 1, case.length, case.head_dim, block_size=16, stride=4, device=q.device, dtype=key_sums_dtype(k, impl)
    )
    for begin, end in ((0, 96), (96, 112), (112, 240), (240, 277)):
        chunk = slice(begin, end)
        got = oam_scores(
            q[:, :, chunk], k[:, :, chunk].clone(), v[:, :, chunk].clone(), query_start=begin, key_start=begin,
            summary=summary, **options,
        )  # type: ignore[arg-type]  # fmt: skip
        rows = slice(begin // 16, -(-end // 16))
        assert torch.equal(got, whole[:, :, rows, : got.shape[3]])
