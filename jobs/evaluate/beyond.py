"""Ideas beyond Stem, to be compared with it at equal density; plain torch, for the evaluation only.

mean: a row's dropped blocks enter its softmax, each as one pseudo-token. adaptive, threshold: rows and heads share a
budget, by the share of their scores that they keep or by one bound for all scores.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from jobs.evaluate.scores import MASS_ENTRIES, Place
from kernels.block_selection import BlockSelection
from stem_core.config import StemConfig


def mean_corrected(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    place: Place,
    block_size: int,
) -> Tensor:
    """Sparse attention's result with the dropped blocks added: each is block_size times its mean key and mean value.

        logit[t, j] = q_t . mean_k[j] * scale + log(block_size),  value mean_v[j],  for blocks j that row t drops

    Exact where the keys of a block are all the same. A dropped block is never the diagonal one, so it is complete.
    out [N, H, Lq, D], lse [N, H, Lq]: of block_sparse_attention with `selection`. Returns [N, H, Lq, D] in q's dtype.
    """
    N, H, Lq, D = q.shape
    kv_heads = k.shape[1]
    first, rows = place.start // block_size, selection.counts.shape[2]
    n_keys = first + rows - 1  # the last row's diagonal block, perhaps not complete, is dropped by no row
    if n_keys == 0:
        return out
    mean_k, mean_v = (x[:, :, : n_keys * block_size].unflatten(2, (n_keys, block_size)).float().mean(3) for x in (k, v))
    i = torch.arange(first, first + rows, device=q.device)[:, None]
    seen = selection.to_mask(n_keys) | (torch.arange(n_keys, device=q.device) >= i)
    scale = D**-0.5 if place.scale is None else place.scale
    result = torch.empty_like(out)
    step = max(1, MASS_ENTRIES // (N * H * block_size * n_keys))
    for row in range(0, rows, step):
        part = slice(row * block_size, min(Lq, (row + step) * block_size))
        length = part.stop - part.start
        hidden = seen[:, :, row : row + step].repeat_interleave(block_size, 2)[:, :, :length]
        queries = q[:, :, part].float().mul(scale).reshape(N, kv_heads, -1, D)
        logits = (queries @ mean_k.mT).view(N, H, length, n_keys).add_(log(block_size)).masked_fill_(hidden, -torch.inf)
        # One softmax over the kept tokens, which weigh exp(lse) together, and the pseudo-tokens.
        kept = lse[:, :, part, None]
        top = torch.maximum(kept, logits.amax(-1, keepdim=True))
        weights, kept = logits.sub_(top).exp_(), (kept - top).exp()
        added = (weights.reshape(N, kv_heads, -1, n_keys) @ mean_v).view(N, H, length, D)
        total = kept + weights.sum(-1, keepdim=True)
        result[:, :, part] = ((out[:, :, part].float() * kept + added) / total).to(out.dtype)
    return result


def shared_budget_selection(
    scores: Tensor, budgets: Tensor, place: Place, config: StemConfig, rule: str
) -> BlockSelection:
    """Blocks of a chunk when all its rows and heads share the blocks that `budgets` gives them in sum.

    rule "adaptive": a row's scores, largest shares of attention among its queries, are divided by their sum over its
    causal blocks. It keeps blocks from the highest score on until they have the share p of that sum: few where
    attention is narrow, many where it is wide. "threshold": a block is kept where its score is t or more: none where
    attention is so wide that no block matters. p, or t, is one number for the layer's heads and the chunk's rows, such
    that exactly as many blocks are kept as without; it is found by sorting. Since the number is the chunk's, the
    selection depends on how a prompt is cut: for a comparison, not for a product. "heads": as "threshold" with a number
    for each row: heads share a row's blocks, rows do not. Sink, local and diagonal blocks and the dense tail are always
    kept.

    scores: float32 [N, H, rows, n_keys], >= 0 where causal; budgets: int32 [rows]. No host synchronisation.
    """
    N, H, rows, n_keys = scores.shape
    first = place.start // config.block_size
    i = torch.arange(first, first + rows, device=scores.device)[:, None]
    j = torch.arange(n_keys, device=scores.device)
    causal = (j <= i).expand_as(scores)
    tail = -(-place.prompt_length // config.block_size) - config.dense_tail
    forced = causal & ((j < config.sink_blocks) | (j > i - config.local_blocks) | (i >= tail))
    share = scores.masked_fill(~causal, 0.0).double()
    if rule == "adaptive":
        share /= share.sum(-1, keepdim=True).clamp(min=1e-30)
    ranked = share.masked_fill(forced, torch.inf).masked_fill(~causal, -1.0)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    share, forced, causal = (x.gather(-1, order) for x in (share, forced, causal))
    # With "adaptive" what a row keeps before it comes to this block: the least p that keeps it.
    last = share.cumsum(-1) - share if rule == "adaptive" else -share
    last = last.masked_fill(forced, -torch.inf).masked_fill(~causal, torch.inf)
    wanted = H * torch.minimum(budgets, i[:, 0] + 1)
    # One competition of all rows, or one for each: [N, competitions, entries].
    last = last.transpose(1, 2)
    pool = last.flatten(2) if rule == "heads" else last.flatten(1)[:, None]
    wanted = wanted if rule == "heads" else wanted.sum()[None]
    least = pool.argsort(dim=-1, stable=True)
    leading = (torch.arange(least.shape[2], device=scores.device) < wanted[:, None]).expand_as(least)
    kept = torch.zeros_like(least, dtype=torch.bool).scatter(2, least, leading).view_as(last).transpose(1, 2)
    kept = torch.zeros_like(kept).scatter(-1, order, kept)
    indices = torch.where(kept, j, n_keys).sort(-1).values
    return BlockSelection(indices.int(), kept.sum(-1, dtype=torch.int32))
