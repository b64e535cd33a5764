"""One query token per live document against that document's own extent of an fp8 KV arena."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.attention import HOPPER_DIMS, check_decode, choose_with_hopper
from kernels._common.fp8 import FP8, HeadScales, fp8_obstacle
from kernels._common.prefixes import Prefixes
from kernels._common.rows import FLOATING, choose_row_kernel
from kernels._common.tma import tma_obstacle
from kernels.dispatch import Choice, hopper_unavailable, implementation, on_its_gpu


def choose_decode_attention_fp8(
    q: Tensor,
    impl: str = "auto",
    *,
    prefixes: bool = False,
    window: int | None = None,
    arenas: tuple[Tensor, ...] = (),
) -> Choice:
    """The implementation that `decode_attention_fp8` uses for queries like `q`.

    prefixes: whether rows have some. For them alone there is a Hopper path: there many queries meet each key. It takes
    what `window` and `arenas`, k and vt, are.
    """
    if not prefixes:
        return choose_row_kernel("decode_attention_fp8", q.device, impl, fp8=True)

    def obstacle() -> str:
        if missing := hopper_unavailable(q.device):
            return missing
        if q.dtype != torch.bfloat16 or q.shape[-1] not in HOPPER_DIMS:
            return f"the Hopper path takes bfloat16 queries of D in {HOPPER_DIMS}, got {q.dtype}, D={q.shape[-1]}"
        return "the Hopper path has no sliding window" if window is not None else tma_obstacle(*arenas)

    return choose_with_hopper("decode_attention_fp8", q.device, impl, obstacle, fp8_obstacle(q.device))


@on_its_gpu
def decode_attention_fp8(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    starts: Tensor,
    lengths: Tensor,
    *,
    max_length: int,
    scale: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    prefixes: Prefixes | None = None,
    impl: str = "auto",
) -> Tensor:
    """As `kernels.decode_attention`, with keys and values in e4m3; queries and probabilities stay in 16 bits or more,
    and behind prefixes on Hopper in two e4m3 numbers each, which hold as much as bfloat16.

    q: [S, H, D] bfloat16, float16 or float32. k: float8_e4m3fn [Hkv, T, D]; vt: float8_e4m3fn [Hkv, D, T], values
        transposed and their keys permuted (kernels.fp8_heads), finite up to the end of the last key's group of 16
        (`kernels.fp8_heads.append_kv` sees to it); last dimensions contiguous; H a multiple of Hkv.
    scales: k and v are used; q's is not.
    starts: int64 [S], multiples of 16 (not checked: that would wait for the GPU); lengths: int32 [S], 0 for an unused
        slot, which gives zeros. max_length: a bound on `lengths` known on the host.
    scale: defaults to 1 / sqrt(D). window: only the last `window` tokens are seen. sinks: floating-point [H], as there.
    prefixes: as there; their starts are multiples of 16, too.
    Returns [S, H, D] in q's dtype. Raises ValueError for shapes or types that do not fit, or where fp8 cannot run.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[0]:
        raise ValueError(
            f"q must be [S, H, D] and k [Hkv, T, D] with H a multiple of Hkv, got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if vt.shape != (k.shape[0], k.shape[2], k.shape[1]):
        raise ValueError(f"vt must be [Hkv, D, T] for k {tuple(k.shape)}, got {tuple(vt.shape)}")
    if not k.dtype == vt.dtype == FP8 or q.dtype not in FLOATING:
        raise ValueError(f"k and vt must be {FP8} and q one of {FLOATING}, got {k.dtype}, {vt.dtype}, {q.dtype}")
    if any(tensor.stride(-1) != 1 for tensor in (q, k, vt)):
        raise ValueError("the last dimension of q, k and vt must be contiguous")
    check_decode(q, starts, lengths, max_length, window, sinks, prefixes)
    scales.check(None, k.shape[0], k.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = choose_decode_attention_fp8(q, impl, prefixes=prefixes is not None, window=window, arenas=(k, vt))
    chosen: Tensor = implementation("decode_attention_fp8", choice).decode_attention_fp8(
        q, k, vt, scales, starts, lengths, max_length, scale, window, sinks, prefixes
    )
    return chosen
