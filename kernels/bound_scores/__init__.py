"""How much of its attention a query block could give to each key block, from bounds of groups of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._common.scores import check_cache, check_inputs
from kernels.dispatch import Choice, choose_portable, on_its_gpu

__all__ = ["KeyBounds", "bound_scores", "choose_bound_scores"]


@dataclass
class KeyBounds:
    """The key side of one layer's bound scores for one document, kept between the chunks of its prefill.

    upper, lower: [N, Hkv, n_max * block_size / span, D] in the keys' type; the largest and smallest value of each
        channel among the keys [p * span, (p + 1) * span). Sizes are for the whole prompt.
    blocks: complete blocks bounded so far.
    """

    upper: Tensor
    lower: Tensor
    blocks: int = 0

    @classmethod
    def allocate(
        cls,
        batch: int,
        kv_heads: int,
        max_tokens: int,
        head_dim: int,
        *,
        block_size: int,
        span: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> KeyBounds:
        """Empty bounds for prompts of up to `max_tokens` tokens; dtype: the keys'."""
        spans = -(-max_tokens // block_size) * (block_size // span)
        upper, lower = torch.empty(2, batch, kv_heads, spans, head_dim, dtype=dtype, device=device)
        return cls(upper, lower)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All that was allocated."""
        return self.upper, self.lower


def choose_bound_scores(q: Tensor, impl: str = "auto") -> Choice:
    """The implementation that `bound_scores` uses for queries like `q`."""
    return choose_portable("bound_scores", q.device, impl)


@on_its_gpu
def bound_scores(
    q: Tensor,
    k: Tensor,
    *,
    query_start: int = 0,
    block_size: int = 128,
    group: int = 2,
    span: int = 16,
    scale: float | None = None,
    bounds: KeyBounds | None = None,
    key_start: int = 0,
    impl: str = "auto",
) -> Tensor:
    """The largest share of attention that a key block could get from any of a few rows of the query block.

    Row r stands for queries [r * group, (r + 1) * group) of the block: their mean; the last row of a part-filled block
    covers the queries that exist. What it could see in a span of keys is bounded channel by channel, as Quest does for
    decoding (Tang et al. 2024, arXiv 2406.10774):
        bound[r, p] = scale * sum over channels d of max(q_rd * upper_pd, q_rd * lower_pd) >= scale * max q_r . k_u.
    A key block's bound is the largest of its spans'; spans that begin behind the row's last query do not count. Then
        score[i, j] = max over r of exp(bound[r, j] - logsumexp over j of bound[r, j]).
    No key is averaged away, and a span costs as much as two keys.

    q: [N, H, Lq, D], the tokens [query_start, query_start + Lq), query_start a multiple of block_size.
    k: [N, Hkv, Lk, D] in q's type, the tokens [key_start, key_start + Lk), up to query_start + Lq at least; later ones
        are ignored. Last dimension contiguous.
    group, span: divide block_size. scale: defaults to 1 / sqrt(D).
    bounds: holds the blocks of earlier chunks and is extended by this one's; the scores are the same with and without.
    key_start: first token of k, a multiple of block_size; `bounds` must hold the blocks before it.
    Returns float32 [N, H, rows, n_keys] in [0, 1], rows = ceil(Lq / block_size), n_keys = ceil((query_start + Lq) /
    block_size), -inf for j > i. Raises ValueError for shapes or types that do not fit.
    """
    check_cache("bounds", None if bounds is None else bounds.blocks, query_start, block_size, key_start)
    check_inputs(q, k, query_start, block_size, key_start)
    if q.dtype != k.dtype:
        raise ValueError(f"q and k must share a floating-point type, got {q.dtype} and {k.dtype}")
    for name, value in (("group", group), ("span", span)):
        if value < 1 or block_size % value:
            raise ValueError(f"{name} must divide block_size={block_size}, got {value}")
    if bounds is None:
        bounds = KeyBounds.allocate(
            k.shape[0], k.shape[1], query_start + q.shape[2], k.shape[3],
            block_size=block_size, span=span, device=k.device, dtype=k.dtype,
        )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if choose_bound_scores(q, impl).impl == "triton":
        from kernels.bound_scores import triton as implementation
    else:
        from kernels.bound_scores import reference as implementation  # type: ignore[no-redef]
    return implementation.bound_scores(q, k, query_start, block_size, group, span, scale, bounds, key_start)
