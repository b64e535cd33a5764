"""One query token per live document against that document's own extent of the KV arena."""

from __future__ import annotations

from torch import Tensor

from kernels._common.attention import check_decode
from kernels._common.prefixes import Prefixes
from kernels.dispatch import Choice, choose_portable, implementation, on_its_gpu


def choose_decode_attention(q: Tensor, impl: str = "auto") -> Choice:
    """The implementation that `decode_attention` uses for queries like `q`."""
    return choose_portable("decode_attention", q.device, impl)


@on_its_gpu
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """Attention of each document's newest token to everything that document holds in the arena.

    q: [S, H, D], one query per document. k, v: the arena [Hkv, T, D], last dimension contiguous; H a multiple of Hkv.
    starts: int64 [S]; lengths: int32 [S]: document s occupies arena rows [starts[s], starts[s] + lengths[s]), its
        newest token (the query's own) last. A length of 0 (an unused slot) gives zeros.
    max_length: a bound on `lengths` known on the host; it fixes the launch grid, so that a CUDA graph can be captured.
    scale: defaults to 1 / sqrt(D). window: only the last `window` tokens are seen.
    sinks: [H], a logit for each head that takes part in its softmax and has no value (gpt-oss); seen in every window.
    prefixes: keys that rows see before their own, which several rows may share: those are read once for all of them.
        Row s then attends to prefixes.lengths[s] + lengths[s] keys, and the window is over both. A row of length 0
        with a prefix sees that alone.
    Returns [S, H, D] in q's dtype. Raises ValueError for shapes or types that do not fit.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[0]:
        raise ValueError(
            f"q must be [S, H, D] and k, v [Hkv, T, D] with H a multiple of Hkv, got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    check_decode(q, starts, lengths, max_length, window, sinks, prefixes)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = choose_decode_attention(q, impl)
    chosen: Tensor = implementation("decode_attention", choice).decode_attention(
        q, k, v, starts, lengths, max_length, scale, window, sinks, prefixes
    )
    return chosen
