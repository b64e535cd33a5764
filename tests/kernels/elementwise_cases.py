"""What every implementation of the row-wise operations must satisfy; used compiled, interpreted and on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quantize import QuantizedRows, quantize_rows
from kernels.rms_norm import rms_norm, rms_norm_fp8
from kernels.rope import apply_rope
from kernels.silu_mul import silu_mul, silu_mul_fp8

EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_STEP = 2.0**-4  # half the distance of neighbouring e4m3 numbers, relative


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def assert_rounds_to(got: Tensor, exact: Tensor, roundings: int = 1, size: Tensor | None = None) -> None:
    """got is the float64 `exact` up to `roundings` roundings to got's dtype, of numbers as large as `size`."""
    assert got.shape == exact.shape
    limit = (exact.abs() if size is None else size) * torch.finfo(got.dtype).eps * (roundings + 0.01) / 2 + 1e-30
    # float32 sums over a row are not exact either
    limit += exact.abs() * 1e-6 + (1e-7 if got.dtype == torch.float16 else 0.0)
    worst = ((got.double() - exact).abs() / limit).max()
    assert worst <= 1, f"error is {worst:.2f} times the bound"


def norm_inputs(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Rows in every layout that models use, last dimensions that are no power of two among them."""
    wide = random(2, 7, 3 * 48 + 64, dtype=dtype, device=device) * 3
    return {
        "one row": random(1, 1, 33, dtype=dtype, device=device),
        "hidden states": random(2, 5, 320, dtype=dtype, device=device),
        "long rows": random(3, 4100, dtype=dtype, device=device),
        "heads of a slice": wide[..., 16:160].view(2, 7, 3, 48),
        "heads, transposed": wide[..., 16:160].view(2, 7, 3, 48).transpose(1, 2),
        "many rows": random(1, 130, 4, 16, dtype=dtype, device=device),
        "zeros and large": torch.cat((wide[0, :2] * 0, wide[0, 2:4] * 1e3)),
    }


def exact_norm(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    x = x.double()
    y = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return y if weight is None else y * (weight.double() + offset)


def check_rms_norm(dtype: torch.dtype, impl: str, device: str) -> None:
    for x in norm_inputs(dtype, device).values():
        weight = random(x.shape[-1], dtype=dtype, device=device, seed=1)
        for w, offset, early in ((weight, 0.0, True), (weight, 1.0, False), (weight, 0.0, False), (None, 0.0, True)):
            got = rms_norm(x, w, EPS, weight_offset=offset, round_before_weight=early, impl=impl)
            assert got.dtype == dtype
            assert_rounds_to(got, exact_norm(x, w, offset), roundings=2 if early else 1)
        single = rms_norm(x, weight.float(), EPS, round_before_weight=False, impl=impl)
        assert_rounds_to(single, exact_norm(x, weight, 0.0))


def check_quantised(values: Tensor, scales: Tensor, x: Tensor) -> None:
    """values * scales is x within half an fp8 step, and the scale is the largest magnitude over 448."""
    amax = x.double().abs().amax(-1, keepdim=True)
    assert values.is_contiguous()
    assert scales.shape == (*x.shape[:-1], 1)
    torch.testing.assert_close(scales.double(), amax.clamp(min=1e-30) / 448, rtol=1e-6, atol=0)
    error = (values.double() * scales.double() - x.double()).abs()
    # numbers below 2^-6 of the format have a fixed step of 2^-9
    assert (error <= x.double().abs() * FP8_STEP * 1.001 + scales.double() * 2.0**-10 * 1.001).all()


def check_equal(fused: QuantizedRows, apart: QuantizedRows, exact: bool) -> None:
    """The same bits; or the same numbers within a rounding of the scale, which may move a value by an fp8 step."""
    if exact:
        assert torch.equal(fused.values.view(torch.uint8), apart.values.view(torch.uint8))
        assert torch.equal(fused.scales, apart.scales)
        return
    torch.testing.assert_close(fused.scales, apart.scales, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    same = fused.values.view(torch.uint8) == apart.values.view(torch.uint8)
    assert same.float().mean() > 0.999


def check_fp8(dtype: torch.dtype, impl: str, device: str) -> None:
    """The fused producers equal quantisation of what the plain operation gives, bit for bit in 16-bit types.

    In float32 on a GPU the two kernels may add up a row in another order, and nothing rounds the difference away.
    """
    for x in norm_inputs(dtype, device).values():
        weight = random(x.shape[-1], dtype=dtype, device=device, seed=1)
        for offset, early in ((0.0, True), (1.0, False)):
            options = {"weight_offset": offset, "round_before_weight": early, "impl": impl}
            plain = rms_norm(x, weight, EPS, **options).contiguous()
            fused = rms_norm_fp8(x, weight, EPS, **options)
            check_quantised(fused.values, fused.scales, plain)
            apart = quantize_rows(plain, impl=impl)
            check_equal(fused, apart, exact=dtype != torch.float32 or device == "cpu")
            assert fused.dtype == dtype
    for gate, up in gate_inputs(dtype, device):
        for activation in ("silu", "gelu_tanh"):
            fused = silu_mul_fp8(gate, up, activation=activation, impl=impl)
            apart = quantize_rows(silu_mul(gate, up, activation=activation, impl=impl), impl=impl)
            check_equal(fused, apart, exact=dtype != torch.float32 or device == "cpu")
    check_quantised(*_pair(quantize_rows(random(5, 70, dtype=dtype, device=device)[:, 3:50], impl=impl)),
                    random(5, 70, dtype=dtype, device=device)[:, 3:50])  # fmt: skip


def _pair(rows: object) -> tuple[Tensor, Tensor]:
    return rows.values, rows.scales  # type: ignore[attr-defined]


def gate_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor]]:
    both = random(2, 9, 2 * 200, dtype=dtype, device=device) * 4
    long = random(3, 2 * 2500, dtype=dtype, device=device)
    return [
        (both[..., :200], both[..., 200:]),
        (both[..., 200:].contiguous(), both[..., 200:].contiguous() * 0.3),
        (long[:, 2500:], long[:, :2500]),
        (both[:1, :1, :1].contiguous() * 30, both[:1, :1, 7:8].contiguous()),
    ]


def check_silu_mul(dtype: torch.dtype, impl: str, device: str) -> None:
    for gate, up in gate_inputs(dtype, device):
        g = gate.double()
        wanted = {
            "silu": g * torch.sigmoid(g),
            "gelu_tanh": g * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))),
        }
        for activation, exact in wanted.items():
            got = silu_mul(gate, up, activation=activation, impl=impl)
            assert got.is_contiguous()
            # exp loses relative precision with the size of its argument
            size = exact.abs() + g.abs() * 1e-6 / torch.finfo(dtype).eps
            assert_rounds_to(got, exact * up.double(), roundings=2, size=size * up.double().abs())


def check_rope(dtype: torch.dtype, impl: str, device: str) -> None:
    for heads, kv_heads, D, R, batch, length in ((4, 2, 16, 16, 1, 9), (3, 3, 48, 48, 2, 5), (5, 1, 64, 32, 2, 1)):
        packed = random(batch, length, (heads + 2 * kv_heads) * D, dtype=dtype, device=device) * 2
        q = packed[..., : heads * D].view(batch, length, heads, D).transpose(1, 2)
        k = packed[..., heads * D : (heads + kv_heads) * D].view(batch, length, kv_heads, D).transpose(1, 2)
        for rows, work in ((batch, dtype), (1, torch.float32)):
            # The two halves differ, which no model's do, so that a kernel which mixes them up shows.
            cos = random(rows, length, R, dtype=work, device=device, seed=5).clamp(-1, 1)
            sin = random(rows, length, R, dtype=work, device=device, seed=6).clamp(-1, 1)
            before = packed.clone()
            for x, got in zip((q, k), apply_rope(q, k, cos, sin, impl=impl), strict=True):
                turned = torch.cat((-x[..., R // 2 : R], x[..., : R // 2]), dim=-1).double()
                terms = x[..., :R].double() * cos[:, None].double(), turned * sin[:, None].double()
                exact = torch.cat((sum(terms), x[..., R:].double()), dim=-1)
                size = torch.cat((terms[0].abs() + terms[1].abs(), x[..., R:].double().abs()), dim=-1)
                assert got.dtype == dtype
                assert got.transpose(1, 2).is_contiguous()
                assert_rounds_to(got, exact, roundings=2, size=size)
                assert torch.equal(got[..., R:], x[..., R:])
            assert torch.equal(packed, before)
