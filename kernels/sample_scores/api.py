"""How much attention each key block gets at most from any of a sample of the query block's rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.fp8 import FP8, HeadScales, fp8_obstacle
from kernels._common.scores import check_inputs
from kernels._common.tma import tma_obstacle
from kernels.dispatch import Choice, choose_portable, hopper_unavailable, implementation, on_its_gpu


def choose_sample_scores(
    q: Tensor, block_size: int = 128, every: int = 8, impl: str = "auto", *, k: Tensor | None = None
) -> Choice:
    """The implementation that `sample_scores` uses for queries like `q` (only its shape, type and device count).

    k matters to the Hopper path only. Raises ValueError if `impl` names one that cannot run.
    """
    obstacle = _hopper_obstacle(q, k, block_size, every) if q.device.type == "cuda" else "no GPU"
    if impl == "gluon":
        if obstacle:
            raise ValueError(f"sample_scores: impl='gluon' cannot run: {obstacle}")
        return Choice("gluon")
    if q.dtype == torch.float32 and q.shape[-1] > 256 and q.device.type == "cuda":
        large = f"blocks of float32 keys with heads of {q.shape[-1]} do not fit a multiprocessor's shared memory"
        if impl == "triton":
            raise ValueError(f"sample_scores: impl='triton' cannot run: {large}")
        return Choice("reference", large)
    choice = choose_portable("sample_scores", q.device, impl)
    if impl != "auto" or choice.impl != "triton":
        return choice
    return Choice("triton", obstacle) if obstacle else Choice("gluon")


def _hopper_obstacle(q: Tensor, k: Tensor | None, block_size: int, every: int) -> str:
    """Why the Hopper path cannot take this call; empty if it can."""
    if missing := hopper_unavailable(q.device):
        return missing
    if q.shape[-1] not in (64, 128) or q.dtype not in (torch.bfloat16, torch.float16):
        return f"the Hopper path takes D 64 and 128 in bfloat16 or float16, got {q.shape[-1]} and {q.dtype}"
    if block_size != 128 or every < 2 or every & (every - 1):
        return (
            "the Hopper path takes blocks of 128 tokens and a power of two above 1 as every, got "
            f"{block_size} and {every}"
        )
    return "" if k is None else tma_obstacle(k)


@on_its_gpu
def sample_scores(
    q: Tensor,
    k: Tensor,
    *,
    query_start: int = 0,
    block_size: int = 128,
    every: int = 8,
    scale: float | None = None,
    scales: HeadScales | None = None,
    impl: str = "auto",
) -> Tensor:
    """The largest share of attention that a key block gets from any sampled row of the query block.

    Sampled are the last of each `every` consecutive queries of a block, and the last one that there is of a group that
    ends early. A row weighs block j by its peaks, the largest logit in each of PEAKS interleaved groups of the block's
    keys (u belongs to group u // 2 % PEAKS):
        w[r, j] = sum over the groups c of exp(max over the keys u <= r of c in j of q_r . k_u * scale)
        score[i, j] = max over the sampled rows r of block i of w[r, j] / sum over j of w[r, j].
    Rows are never averaged, so that no needle drowns; and a block takes PEAKS exponentials, where its exact mass would
    take block_size: on a GPU those would cost as much as the products.

    q: [N, H, Lq, D], the tokens [query_start, query_start + Lq), query_start a multiple of block_size.
    k: [N, Hkv, Lk, D], at least the tokens up to query_start + Lq; later ones are ignored. Last dimension contiguous.
    every: divides block_size. scale: defaults to 1 / sqrt(D).
    scales: for keys in float8_e4m3fn: what k is to be multiplied with, and under which scale the sampled queries (still
        in 16 or 32 bits) are rounded to e4m3 themselves; D must be at least 32. The Hopper path raises the scale of a
        row by a power of two where its products could leave float16, in which it sums them.
    Returns float32 [N, H, rows, n_keys] in [0, 1], -inf for j > i, rows = ceil(Lq / block_size),
    n_keys = ceil((query_start + Lq) / block_size). Raises ValueError for what does not fit.
    """
    check_inputs(q, k, query_start, block_size)
    if scales is None and q.dtype != k.dtype:
        raise ValueError(f"q and k must share a floating-point type, got {q.dtype} and {k.dtype}")
    if every < 1 or block_size % every:
        raise ValueError(f"every must divide block_size={block_size}, got {every}")
    choice = choose_sample_scores(q, block_size, every, impl, k=k)
    if scales is not None:
        _check_fp8(q, k, scales, choice)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return implementation("sample_scores", choice).sample_scores(q, k, query_start, block_size, every, scale, scales)


def _check_fp8(q: Tensor, k: Tensor, scales: HeadScales, choice: Choice) -> None:
    if k.dtype != FP8 or not q.dtype.is_floating_point or q.dtype == FP8:
        raise ValueError(f"with scales k must be {FP8} and q bfloat16, float16 or float32, got {k.dtype} and {q.dtype}")
    if q.shape[3] < 32:
        raise ValueError(f"keys in fp8 need D of at least 32, got {q.shape[3]}")
    scales.check(q.shape[1], k.shape[1], q.device)
    obstacle = fp8_obstacle(q.device)
    if obstacle and choice.impl != "reference":
        raise ValueError(f"sample_scores with keys in fp8 cannot run: {obstacle}")
