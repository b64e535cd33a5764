"""Causal attention over the kept key blocks with queries, keys, values and probabilities in fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.attention import HOPPER_DIMS, HOPPER_TYPES, check_prefill, choose_with_hopper, hopper_obstacle
from kernels._common.fp8 import FP8, KEY_GROUP, HeadScales, bias_shape, fp8_obstacle
from kernels._common.selection import BlockSelection
from kernels.dispatch import Choice, on_its_gpu

# Tensor cores sum 32 products of fp8 at a time.
BLOCK_SIZES = (32, 64, 128, 256)


def choose_block_sparse_attention_fp8(
    q: Tensor,
    block_size: int = 128,
    impl: str = "auto",
    *,
    k: Tensor | None = None,
    vt: Tensor | None = None,
    query_start: int = 0,
    window: int | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Choice:
    """The implementation that `block_sparse_attention_fp8` uses for queries like `q` (only its shape and device count).

    k, vt, query_start, window, bias and dtype matter to the Hopper path only. Raises ValueError if `impl` names one
    that cannot run, and for "auto" on a GPU without fp8.
    """

    def obstacle() -> str:
        wrong = ""
        if q.shape[-1] not in HOPPER_DIMS or dtype not in HOPPER_TYPES:
            wrong = f"the Hopper path takes D 64 and 128 and gives bfloat16 or float16, got {q.shape[-1]} and {dtype}"
        # Queries in another type stand for those that are quantised from them.
        read = (tensor for tensor in (q, k, vt) if tensor is not None and tensor.dtype == FP8)
        return hopper_obstacle(q.device, wrong, block_size, query_start, window, (*read, bias))

    return choose_with_hopper("block_sparse_attention_fp8", q.device, impl, obstacle, missing=fp8_obstacle(q.device))


@on_its_gpu
def block_sparse_attention_fp8(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    selection: BlockSelection | None,
    *,
    query_start: int = 0,
    block_size: int = 128,
    scale: float | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax((q k^T + bias) * scale) v as `kernels.block_sparse_attention`, of e4m3 operands with one scale a head.

    q: float8_e4m3fn [N, H, Lq, D], the tokens [query_start, query_start + Lq), of which there must be a multiple of
        block_size before the first if there is a selection.
    k: float8_e4m3fn [N, Hkv, Lk, D], Lk >= query_start + Lq. vt: float8_e4m3fn [N, Hkv, D, T], the values transposed
        and their keys permuted (kernels.fp8_heads), T >= query_start + Lq rounded up to 16; the keys that rounding
        adds must be finite (`kernels.fp8_heads.write_kv` writes zeros). Any strides with a contiguous last dimension.
    scales: what the operands are to be multiplied with, by head.
    selection, scale, window, return_lse: as for `kernels.block_sparse_attention`.
    bias: float8_e4m3fn [N, Hkv, P, T, 16], T >= query_start + Lq: what is added to the products of a key, in their
        units, as kernels.fp8_heads.key_bias writes it: what the mean that was taken from the queries adds. Rows of a
        plane lie one behind the other. None: nothing.
    dtype: of the output. P is rounded to e4m3 too, times 2^8. Products are summed on two levels: up to 128 keys by the
        tensor core, which on Hopper keeps about 14 bits of such a sum, and those sums in float32.
    Returns out [N, H, Lq, D] (memory laid out [N, Lq, H, D]) and with `return_lse` float32 [N, H, Lq].
    Raises ValueError for shapes or types that do not fit, or where fp8 cannot run.
    """
    _check(q, k, vt, scales, selection, query_start, block_size, scale, window, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocks = 128 if selection is None else block_size
    choice = choose_block_sparse_attention_fp8(
        q, blocks, impl, k=k, vt=vt, query_start=query_start, window=window, bias=bias, dtype=dtype
    )
    lse: Tensor | None
    if choice.impl == "gluon":
        from kernels.block_sparse_attention_fp8 import gluon

        out, lse = gluon.block_sparse_attention_fp8(
            q, k, vt, scales, selection, query_start, scale, bias, dtype, return_lse
        )
    elif choice.impl == "triton":
        from kernels.block_sparse_attention_fp8 import triton

        out, lse = triton.block_sparse_attention_fp8(
            q, k, vt, scales, selection, query_start, block_size, scale, window, bias, dtype, return_lse
        )
    else:
        from kernels.block_sparse_attention_fp8 import reference

        out, lse = reference.block_sparse_attention_fp8(
            q, k, vt, scales, selection, query_start, block_size, scale, window, bias, dtype
        )
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _check(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    selection: BlockSelection | None,
    query_start: int,
    block_size: int,
    scale: float | None,
    window: int | None,
    bias: Tensor | None,
) -> None:
    shapes = f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(vt.shape)}"
    if q.ndim != 4 or k.ndim != 4 or vt.ndim != 4:
        raise ValueError(f"q must be [N, H, Lq, D], k [N, Hkv, Lk, D] and vt [N, Hkv, D, T], {shapes}")
    N, H, Lq, D = q.shape
    if (k.shape[0], k.shape[3]) != (N, D) or vt.shape[:3] != (N, k.shape[1], D) or H % k.shape[1]:
        raise ValueError(f"batch, KV heads and D of q, k and vt must agree and H be a multiple of Hkv, {shapes}")
    if not q.dtype == k.dtype == vt.dtype == FP8:
        raise ValueError(f"q, k and vt must be {FP8}, got {q.dtype}, {k.dtype}, {vt.dtype}")
    if any(tensor.stride(-1) != 1 for tensor in (q, k, vt)):
        raise ValueError("the last dimension of q, k and vt must be contiguous; call .contiguous() first")
    known = query_start + Lq
    if Lq < 1 or query_start < 0 or k.shape[2] < known or vt.shape[3] < -(-known // KEY_GROUP) * KEY_GROUP:
        raise ValueError(
            f"queries [{query_start}, {known}) must lie inside the {k.shape[2]} keys, and vt hold {known} values "
            f"rounded up to {KEY_GROUP}, got {vt.shape[3]}"
        )
    if bias is not None:
        tokens = max(known, bias.shape[3] if bias.ndim == 5 else 0)
        wanted = (N, *bias_shape(H, k.shape[1], tokens))
        contiguous = bias.stride()[-2:] == (wanted[-1], 1)
        if bias.shape != wanted or bias.dtype != FP8 or not contiguous or bias.device != q.device:
            raise ValueError(
                f"bias must be {FP8} {list(wanted)} on {q.device}, its last two dimensions contiguous, got "
                f"{bias.dtype} {list(bias.shape)}, strides {bias.stride()}, on {bias.device}"
            )
    check_prefill(q, selection, query_start, block_size, BLOCK_SIZES, scale, window)
    scales.check(H, k.shape[1], q.device)
