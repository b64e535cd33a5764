"""Row-wise kernels and linears at a model's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantize import QuantizedRows, quantize_rows
from kernels.rms_norm import rms_norm, rms_norm_fp8
from kernels.rope import apply_rope
from kernels.silu_mul import silu_mul, silu_mul_fp8
from stem_core.fp8 import scaled_linear
from tools.benchmark.elementwise.case import Case, dequantised_ends, ends

DEVICE = "cuda"
BF16 = torch.bfloat16
EPS = 1e-5


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=BF16) * scale


def _reference_norm(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm.forward."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * y.to(x.dtype)


def row_cases(shape: dict[str, Any], M: int) -> Iterator[Case]:
    """Every row-wise kernel at the shapes of one model, M tokens."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    D, I, H, Hkv, E = (  # noqa: E741
        shape[key]
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    x, w = _random(M, D), _random(D, seed=1) * 0.1 + 1
    qkv = _random(M, (H + 2 * Hkv) * E, seed=2)
    heads, head_weight = qkv[:, : H * E].view(M, H, E), w[:E]
    gate, up = _random(M, 2 * I, seed=3, scale=2).chunk(2, dim=-1)

    def norm64(x: Tensor, weight: Tensor) -> Tensor:
        x = ends(x).double()
        return (x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()).flatten(1)

    def gate64() -> Tensor:
        return F.silu(ends(gate).double()) * ends(up).double()

    yield Case(
        f"rms_norm [{D}]", lambda: rms_norm(x, w, EPS), lambda: _reference_norm(x, w), lambda: norm64(x, w), 4 * M * D
    )
    yield Case(
        f"rms_norm of heads [{H}, {E}]",
        lambda: rms_norm(heads, head_weight, EPS),
        lambda: _reference_norm(heads, head_weight),
        lambda: norm64(heads, head_weight),
        4 * M * H * E,
    )
    yield Case(
        f"rms_norm_fp8 [{D}]",
        lambda: rms_norm_fp8(x, w, EPS),
        lambda: quantize_rows(_reference_norm(x, w), impl="reference"),
        lambda: norm64(x, w),
        3 * M * D,
    )
    yield Case(f"silu_mul [{I}]", lambda: silu_mul(gate, up), lambda: F.silu(gate) * up, gate64, 6 * M * I)
    yield Case(
        f"silu_mul_fp8 [{I}]",
        lambda: silu_mul_fp8(gate, up),
        lambda: quantize_rows(F.silu(gate) * up, impl="reference"),
        gate64,
        5 * M * I,
    )
    yield Case(
        f"quantize_rows [{D}]",
        lambda: quantize_rows(x),
        lambda: quantize_rows(x, impl="reference"),
        lambda: ends(x).double(),
        3 * M * D,
    )
    yield _rope_case(qkv, H, Hkv, E, apply_rotary_pos_emb)


def _rope_case(qkv: Tensor, H: int, Hkv: int, E: int, original: Callable[..., Any]) -> Case:
    M = len(qkv)
    q = qkv[:, : H * E].view(1, M, H, E).transpose(1, 2)
    k = qkv[:, H * E : (H + Hkv) * E].view(1, M, Hkv, E).transpose(1, 2)
    angles = torch.arange(1000, 1000 + M, device=DEVICE)[:, None] * 500_000.0 ** (
        -torch.arange(0, E, 2, device=DEVICE) / E
    )
    angles = torch.cat((angles, angles), dim=-1)[None]
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)

    def by_token(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0][0].transpose(0, 1), pair[1][0].transpose(0, 1)

    def exact() -> Tensor:
        c, s = ends(cos[0]).double()[:, None], ends(sin[0]).double()[:, None]
        parts = []
        for x in by_token((q, k)):
            x = ends(x).double()
            turned = torch.cat((-x[..., E // 2 :], x[..., : E // 2]), dim=-1)
            parts.append((x * c + turned * s).flatten(1))
        return torch.cat(parts, dim=1)

    return Case(
        f"apply_rope [{H}+{Hkv}, {E}]",
        lambda: by_token(apply_rope(q, k, cos, sin)),
        lambda: by_token(original(q, k, cos, sin)),
        exact,
        4 * M * (H + Hkv) * E + 4 * M * E,
    )


def linear_cases(shape: dict[str, Any], M: int) -> Iterator[Case]:
    """The model's stacked linears: bf16, and fp8 with exact and with fast accumulation.

    Errors of the fp8 GEMMs are against the product of their own rounded operands: what the accumulation costs. The last
    case has the whole error, quantisation included.
    """
    D, I, E = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]  # noqa: E741
    q, kv = shape["num_attention_heads"] * E, shape["num_key_value_heads"] * E
    for name, N, K in (("qkv", q + 2 * kv, D), ("o", D, q), ("gate_up", 2 * I, D), ("down", D, I)):
        x, weight = _random(M, K), _random(N, K, seed=1, scale=K**-0.5)
        rows, weights = quantize_rows(x), quantize_rows(weight)
        scale = weights.scales.view(1, -1)
        flops = 2 * M * N * K

        def product(a: Tensor, b: Tensor) -> Tensor:
            return ends(a).double() @ b.double().t()

        def fp8(fast: bool, rows: QuantizedRows = rows, w: Tensor = weights.values, s: Tensor = scale) -> Tensor:
            return scaled_linear(rows, w, s, fast_accumulation=fast)

        yield Case(
            f"{name} bf16 [{K} -> {N}]", lambda x=x, w=weight: F.linear(x, w), None,  # type: ignore[misc]
            lambda x=x, w=weight: product(x, w), flops=flops,  # type: ignore[misc]
        )  # fmt: skip
        for fast in (False, True):
            yield Case(
                f"{name} fp8{' fast' if fast else ''} [{K} -> {N}]",
                lambda fast=fast, fp8=fp8: fp8(fast),  # type: ignore[misc]
                lambda x=x, w=weight: F.linear(x, w),  # type: ignore[misc]
                lambda r=rows, w=weights: dequantised_ends(r) @ (w.values.double() * w.scales.double()).t(),  # type: ignore[misc]
                flops=flops,
                compared=False,
                note="error of accumulation and output alone",
            )
        if name == "down":
            yield Case(
                f"{name} fp8, quantisation included",
                lambda x=x, fp8=fp8, w=weights.values, s=scale: scaled_linear(quantize_rows(x), w, s),  # type: ignore[misc]
                lambda x=x, w=weight: F.linear(x, w),  # type: ignore[misc]
                lambda x=x, w=weight: product(x, w),  # type: ignore[misc]
                flops=flops,
                slack=float("inf"),
                note="whole error of fp8",
            )
