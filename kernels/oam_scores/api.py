"""How much each key block matters to each query block: Stem's output-aware metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._common.scores import check_cache, check_inputs
from kernels.dispatch import Choice, choose_portable, implementation, on_its_gpu


@dataclass
class KeySummary:
    """The key side of one layer's OAM scores for one document, kept between the chunks of its prefill.

    Without it every chunk would read all earlier keys and values again. Sizes are for the whole prompt.

    key_sums:  [N, Hkv, n_max, stride, D]; per block and offset the sum of its keys at that offset; float32, or
        bfloat16 where the Triton path serves bfloat16 keys (see `key_sums_dtype`).
    log_norms: float32 [N, Hkv, n_max, block_size / stride]; log of the largest value norm in each group of `stride`
        consecutive tokens; NaN where a group is not complete.
    blocks: complete blocks summarised so far.
    """

    key_sums: Tensor
    log_norms: Tensor
    blocks: int = 0

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All that was allocated."""
        return self.key_sums, self.log_norms

    @classmethod
    def allocate(
        cls,
        batch: int,
        kv_heads: int,
        max_tokens: int,
        head_dim: int,
        *,
        block_size: int,
        stride: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> KeySummary:
        """An empty summary for prompts of up to `max_tokens` tokens; dtype: what `key_sums_dtype(keys)` says."""
        n_max = -(-max_tokens // block_size)
        sums = torch.empty(batch, kv_heads, n_max, stride, head_dim, dtype=dtype, device=device)
        norms = torch.empty(batch, kv_heads, n_max, block_size // stride, dtype=torch.float32, device=device)
        return cls(sums, norms)


def key_sums_dtype(k: Tensor, impl: str = "auto") -> torch.dtype:
    """The type of a KeySummary's sums for keys like `k`.

    bfloat16 for bfloat16 keys on the Triton path: half the memory, and the rounding is that of the keys themselves.
    """
    on_triton = choose_oam_scores(k, impl).impl == "triton"
    return torch.bfloat16 if on_triton and k.dtype == torch.bfloat16 else torch.float32


def choose_oam_scores(q: Tensor, impl: str = "auto") -> Choice:
    """The implementation that `oam_scores` uses for queries like `q`."""
    return choose_portable("oam_scores", q.device, impl)


@on_its_gpu
def oam_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_start: int = 0,
    block_size: int = 128,
    stride: int = 16,
    value_weight: float = 0.2,
    scale: float | None = None,
    summary: KeySummary | None = None,
    key_start: int = 0,
    fill_above: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Stem's Output-Aware Metric for every causal pair of blocks (arXiv 2603.06274, sections on OAM).

    score[i, j] = mean over the antidiagonal pairs (t + u) % stride == stride - 1 of q_t . k_u * scale
                + value_weight * mean over the groups of block j of max(0, z),
    z being the standardised log of the largest value norm in a group of `stride` tokens. Mean and (population) standard
    deviation run over the complete groups of tokens [0, (j + 1) * block_size): causal, unlike the published
    implementations' whole-sequence statistics. Tokens that do not exist enter neither sums nor statistics.

    q: [N, H, Lq, D], the tokens [query_start, query_start + Lq), query_start a multiple of block_size.
    k, v: [N, Hkv, Lk, D], the tokens [key_start, key_start + Lk), up to query_start + Lq at least; later tokens are
        ignored. Last dimension contiguous.
    scale: defaults to 1 / sqrt(D).
    summary: holds the blocks of earlier chunks and is extended by this one's; the scores are the same with and without.
    key_start: first token of k and v, a multiple of block_size; the summary must hold the blocks before it. So a chunk
        can be scored by its own keys where those of earlier chunks exist in fp8 only.
    fill_above: False leaves entries j > i undefined on GPUs, for `select_blocks`, which does not read them: in a long
        prompt half of the scores need not be written then.
    Returns float32 [N, H, rows, n_keys], rows = ceil(Lq / block_size), n_keys = ceil((query_start + Lq) / block_size),
    -inf for j > i. Raises ValueError for shapes or types that do not fit.
    """
    check_cache("summary", None if summary is None else summary.blocks, query_start, block_size, key_start)
    check_inputs(q, k, query_start, block_size, key_start)
    if q.dtype != k.dtype:
        raise ValueError(f"q and k must share a floating-point type, got {q.dtype} and {k.dtype}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if stride < 1 or block_size % stride:
        raise ValueError(f"stride must divide block_size={block_size}, got {stride}")
    sums = key_sums_dtype(k, impl)
    if summary is not None and summary.key_sums.dtype != sums:
        raise ValueError(f"summary holds {summary.key_sums.dtype} sums, but {sums} is needed: see key_sums_dtype")
    if summary is None:
        summary = KeySummary.allocate(
            k.shape[0],
            k.shape[1],
            query_start + q.shape[2],
            k.shape[3],
            block_size=block_size,
            stride=stride,
            device=k.device,
            dtype=sums,
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return implementation("oam_scores", choose_oam_scores(q, impl)).oam_scores(
        q, k, v, query_start, block_size, stride, value_weight, scale, summary, key_start, fill_above
    )
