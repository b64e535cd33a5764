"""Causal attention over the kept key blocks only (or over all of them)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.attention import HOPPER_DIMS, HOPPER_TYPES, check_prefill, choose_with_hopper, hopper_obstacle
from kernels._common.selection import BlockSelection
from kernels.dispatch import Choice, on_its_gpu

BLOCK_SIZES = (16, 32, 64, 128, 256)


def choose_block_sparse_attention(
    q: Tensor,
    block_size: int = 128,
    impl: str = "auto",
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    query_start: int = 0,
    window: int | None = None,
) -> Choice:
    """The implementation that `block_sparse_attention` uses for queries like `q`.

    k, v, query_start and window matter to the Hopper path only; without them the answer holds for aligned tensors, a
    query_start that is a multiple of 128 and no window. Raises ValueError if `impl` names one that cannot run.
    """

    def obstacle() -> str:
        wrong = ""
        if q.dtype not in HOPPER_TYPES or q.shape[-1] not in HOPPER_DIMS:
            wrong = f"the Hopper path takes bfloat16 and float16, D 64 and 128, got {q.dtype} and {q.shape[-1]}"
        return hopper_obstacle(q.device, wrong, block_size, query_start, window, (q, k, v))

    return choose_with_hopper("block_sparse_attention", q.device, impl, obstacle)


@on_its_gpu
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection | None,
    *,
    query_start: int = 0,
    block_size: int = 128,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v over the kept key blocks, with the token-level causal mask; online softmax in float32.

    q: [N, H, Lq, D]; the tokens [query_start, query_start + Lq) of the prompt; with a selection query_start must be a
        multiple of block_size, without one it may be anything.
    k, v: [N, Hkv, Lk, D], Lk >= query_start + Lq; H is a multiple of Hkv, head h reads KV head h // (H // Hkv).
        Any strides with a contiguous last dimension. bfloat16, float16 or float32, all three the same.
    selection: kept blocks for each of the ceil(Lq / block_size) query blocks; None keeps every causal block (dense).
    scale: defaults to 1 / sqrt(D).
    window: token t sees keys in (t - window, t] only (transformers' sliding window); None for no limit.
    Returns out [N, H, Lq, D] in q's dtype (memory laid out [N, Lq, H, D], as transformers wants it next), and with
    `return_lse` also the natural log-sum-exp of the scaled scores, float32 [N, H, Lq].
    Raises ValueError for shapes or types that do not fit, or an implementation that cannot run here.
    """
    _check(q, k, v, selection, query_start, block_size, scale, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Dense calls have no blocks: the Hopper path may take them whatever block_size says.
    blocks = 128 if selection is None else block_size
    choice = choose_block_sparse_attention(q, blocks, impl, k=k, v=v, query_start=query_start, window=window)
    lse: Tensor | None
    if choice.impl == "gluon":
        from kernels.block_sparse_attention import gluon

        out, lse = gluon.block_sparse_attention(q, k, v, selection, query_start, scale, return_lse)
    elif choice.impl == "triton":
        from kernels.block_sparse_attention import triton

        out, lse = triton.block_sparse_attention(q, k, v, selection, query_start, block_size, scale, window, return_lse)
    else:
        from kernels.block_sparse_attention import reference

        out, lse = reference.block_sparse_attention(q, k, v, selection, query_start, block_size, scale, window)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection | None,
    query_start: int,
    block_size: int,
    scale: float | None,
    window: int | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q must be [N, H, Lq, D] and k, v [N, Hkv, Lk, D], got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    N, H, Lq, D = q.shape
    if k.shape[0] != N or k.shape[3] != D or H % k.shape[1]:
        raise ValueError(
            f"k {tuple(k.shape)} does not go with q {tuple(q.shape)}: batch and D equal, H a multiple of Hkv"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16, torch.float32)):
        raise ValueError(f"q, k, v must share bfloat16, float16 or float32, got {q.dtype}, {k.dtype}, {v.dtype}")
    if Lq < 1 or query_start < 0 or k.shape[2] < query_start + Lq:
        raise ValueError(f"queries [{query_start}, {query_start + Lq}) must lie inside the {k.shape[2]} keys")
    if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
        raise ValueError("the last dimension of q, k and v must be contiguous; call .contiguous() first")
    check_prefill(q, selection, query_start, block_size, BLOCK_SIZES, scale, window)
