"""Heads of queries, keys and values to fp8: `kernels.fp8_heads` says how they are scaled and stored."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.fp8 import FP8, KEY_GROUP, HeadScales, bias_shape
from kernels._common.rows import check_floating, check_rows, choose_row_kernel
from kernels.dispatch import Choice, implementation, on_its_gpu


def choose_fp8_heads(device: torch.device, impl: str = "auto") -> Choice:
    """The implementation that the operations of this module use on `device`."""
    return choose_row_kernel("fp8_heads", device, impl, fp8=True)


@on_its_gpu
def quantize_heads(x: Tensor, scale: Tensor, mean: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """(x - mean) / scale in e4m3, saturated at +-448 (infinities too; NaN stays NaN).

    x: [N, H, L, D] bfloat16, float16 or float32, any strides with a contiguous last dimension. scale: float32 [H].
    mean: float32 [H, D], contiguous; None: nothing.
    Returns float8_e4m3fn [N, H, L, D], a view of [N, L, H, D]. Raises ValueError for shapes or types that do not fit.
    """
    choice = choose_fp8_heads(x.device, impl)
    check_floating("quantize_heads", x, backward=choice.impl == "reference")
    if x.ndim != 4 or scale.shape != (x.shape[1],) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"quantize_heads takes x [N, H, L, D] and a contiguous float32 scale [H], got {tuple(x.shape)}, "
            f"{scale.dtype} {tuple(scale.shape)}"
        )
    if mean is not None:
        _check_mean("quantize_heads", mean, x.shape[1], x.shape[3])
    return implementation("fp8_heads", choice).quantize_heads(x, scale, mean)


@on_its_gpu
def key_bias(k: Tensor, scales: HeadScales, bias: Tensor, start: int, *, impl: str = "auto") -> None:
    """Write what the mean query adds to the scores of a chunk's keys, in units of products of rounded queries and keys:
    scales.q_mean . (k[t] - scales.k_shift) / (scales.q * scales.k).

    A bias lies in BIAS_PARTS numbers of e4m3, to be multiplied with BIAS_WEIGHTS and added: tensor cores do that on the
    way to the scores, which costs little. It is exact to 2^-16 of itself or to 2^-14, and saturated at 448 * 256.

    k: [1, Hkv, L, D] bfloat16, float16 or float32 (positions encoded, not rounded to fp8), any strides with a
        contiguous last dimension. bias: float8_e4m3fn [Hkv, P, T, 16] of bias_shape(H, Hkv, at least start + L),
        contiguous: head g of a KV head has the columns [4 (g % 4), 4 (g % 4) + 4) of plane g / 4; the rows
        [start, start + L) are written, with zeros where a plane has no head.
        A key's sums depend on nothing but the key. Raises ValueError for what does not fit.
    """
    choice = choose_fp8_heads(k.device, impl)
    check_floating("key_bias", k, backward=choice.impl == "reference")
    if k.ndim != 4 or k.shape[0] != 1:
        raise ValueError(f"key_bias takes k [1, Hkv, L, D], got {tuple(k.shape)}")
    heads, kv_heads = len(scales.q), k.shape[1]
    scales.check(None, kv_heads, k.device)
    if scales.q_mean is None or heads % kv_heads:
        raise ValueError(
            f"key_bias needs scales with a q_mean for a multiple of {kv_heads} heads, got {heads} heads and "
            f"{'no' if scales.q_mean is None else 'a'} q_mean"
        )
    _check_mean("key_bias", scales.q_mean, heads, k.shape[3])
    end = start + k.shape[2]
    tokens = bias.shape[2] if bias.ndim == 4 else end
    wanted = bias_shape(heads, kv_heads, tokens)
    if bias.shape != wanted or bias.dtype != FP8 or not bias.is_contiguous():
        raise ValueError(f"key_bias: bias must be contiguous {FP8} {list(wanted)}, got {bias.dtype} {list(bias.shape)}")
    if start < 0 or end > tokens:
        raise ValueError(f"key_bias: the chunk [{start}, {end}) must lie inside the {tokens} rows of bias")
    implementation("fp8_heads", choice).key_bias(k, scales, bias, start)


@on_its_gpu
def write_kv(
    k: Tensor, v: Tensor, scales: HeadScales, k_arena: Tensor, vt_arena: Tensor, start: int, *, impl: str = "auto"
) -> None:
    """Write a chunk of one document into the arena in fp8: keys, less scales.k_shift, to rows, values to permuted
    columns from `start` on.

    k, v: [1, Hkv, L, D] bfloat16, float16 or float32 (keys with their positions encoded), any strides with a contiguous
        last dimension. k_arena: float8_e4m3fn [Hkv, T, D]; vt_arena: float8_e4m3fn [Hkv, D, T]; last dimension
        contiguous. start: arena index of the chunk's first token, a multiple of 16. Values of the tokens that round
        the chunk up to 16 become zero, so that a ragged end holds nothing but finite numbers.
    Raises ValueError for shapes or types that do not fit.
    """
    choice = choose_fp8_heads(k.device, impl)
    check_floating("write_kv", k, v, backward=choice.impl == "reference")
    if k.ndim != 4 or k.shape != v.shape or k.shape[0] != 1:
        raise ValueError(f"write_kv takes k and v [1, Hkv, L, D], got {tuple(k.shape)} and {tuple(v.shape)}")
    _check_arena("write_kv", k.shape[1], k.shape[3], scales, k_arena, vt_arena)
    end = start + -(-k.shape[2] // KEY_GROUP) * KEY_GROUP
    if start % KEY_GROUP or start < 0 or end > k_arena.shape[1]:
        raise ValueError(
            f"write_kv: start must be a multiple of {KEY_GROUP} and the chunk, rounded up to {KEY_GROUP}, end inside "
            f"the arena of {k_arena.shape[1]} tokens, got [{start}, {end})"
        )
    implementation("fp8_heads", choice).write_kv(k, v, scales, k_arena, vt_arena, start)


@on_its_gpu
def append_kv(
    k: Tensor,
    v: Tensor,
    scales: HeadScales,
    k_arena: Tensor,
    vt_arena: Tensor,
    slots: Tensor,
    *,
    run: int = 1,
    impl: str = "auto",
) -> None:
    """Write S tokens, one of each document or a few that follow one another, into the arena in fp8.

    Capturable in a CUDA graph.

    k, v: [S, Hkv, D] bfloat16, float16 or float32, last dimension contiguous. slots: int64 [S], arena index of each
    token; documents start at multiples of 16. Arenas as for `write_kv`. The token that opens a group of 16 sets the
    values of the others to zero, but for those that this call writes.
    run: how many tokens of a document come behind one another at most, each in the slot after the last one's; a token
    of another document, or in a slot elsewhere, ends a run. Raises ValueError for shapes or types that do not fit.
    """
    choice = choose_fp8_heads(k.device, impl)
    check_floating("append_kv", k, v, backward=choice.impl == "reference")
    if k.ndim != 3 or k.shape != v.shape:
        raise ValueError(f"append_kv takes k and v [S, Hkv, D], got {tuple(k.shape)}, {tuple(v.shape)}")
    check_rows("append_kv: slots", slots, torch.int64, k.shape[0])
    _check_arena("append_kv", k.shape[1], k.shape[2], scales, k_arena, vt_arena)
    if run < 1:
        raise ValueError(f"append_kv: run must be at least 1, got {run}")
    implementation("fp8_heads", choice).append_kv(k, v, scales, k_arena, vt_arena, slots, run)


def _check_mean(op: str, mean: Tensor, heads: int, dim: int) -> None:
    if mean.shape != (heads, dim) or mean.dtype != torch.float32 or not mean.is_contiguous():
        raise ValueError(
            f"{op}: the mean must be contiguous float32 [{heads}, {dim}], got {mean.dtype} {tuple(mean.shape)}"
        )


def _check_arena(op: str, heads: int, dim: int, scales: HeadScales, k_arena: Tensor, vt_arena: Tensor) -> None:
    if (
        k_arena.ndim != 3
        or (k_arena.shape[0], k_arena.shape[2]) != (heads, dim)
        or vt_arena.shape != (heads, dim, k_arena.shape[1])
        or not k_arena.dtype == vt_arena.dtype == FP8
        or k_arena.stride(-1) != 1
        or vt_arena.stride(-1) != 1
    ):
        raise ValueError(
            f"{op}: the arenas must be {FP8} [{heads}, T, {dim}] and [{heads}, {dim}, T] with a contiguous last "
            f"dimension, got {k_arena.dtype} {tuple(k_arena.shape)} and {vt_arena.dtype} {tuple(vt_arena.shape)}"
        )
    scales.check(None, heads, k_arena.device)
    if scales.k_shift is not None and scales.k_shift.shape[1] != dim:
        raise ValueError(f"{op}: scales.k_shift must be [{heads}, {dim}], got {tuple(scales.k_shift.shape)}")
