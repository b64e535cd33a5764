"""How much attention each key block gets at most from any of a sample of the query block's rows."""

from __future__ import annotations

from torch import Tensor

from kernels._common.fp8 import FP8, HeadScales, fp8_obstacle
from kernels._common.scores import check_inputs
from kernels.dispatch import Choice, choose_portable, on_its_gpu


def choose_sample_scores(q: Tensor, impl: str = "auto") -> Choice:
    """The implementation that `sample_scores` uses for queries like `q`."""
    return choose_portable("sample_scores", q.device, impl)


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
        in 16 or 32 bits) are rounded to e4m3 themselves; D must be at least 32.
    Returns float32 [N, H, rows, n_keys] in [0, 1], -inf for j > i, rows = ceil(Lq / block_size),
    n_keys = ceil((query_start + Lq) / block_size). Raises ValueError for what does not fit.
    """
    check_inputs(q, k, query_start, block_size)
    if scales is None and q.dtype != k.dtype:
        raise ValueError(f"q and k must share a floating-point type, got {q.dtype} and {k.dtype}")
    if every < 1 or block_size % every:
        raise ValueError(f"every must divide block_size={block_size}, got {every}")
    choice = choose_sample_scores(q, impl)
    if scales is not None:
        _check_fp8(q, k, scales, choice)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if choice.impl == "triton":
        from kernels.sample_scores import triton as implementation
    else:
        from kernels.sample_scores import reference as implementation  # type: ignore[no-redef]
    return implementation.sample_scores(q, k, query_start, block_size, every, scale, scales)


def _check_fp8(q: Tensor, k: Tensor, scales: HeadScales, choice: Choice) -> None:
    if k.dtype != FP8 or not q.dtype.is_floating_point or q.dtype == FP8:
        raise ValueError(f"with scales k must be {FP8} and q bfloat16, float16 or float32, got {k.dtype} and {q.dtype}")
    if q.shape[3] < 32:
        raise ValueError(f"keys in fp8 need D of at least 32, got {q.shape[3]}")
    scales.check(q.shape[1], k.shape[1], q.device)
    obstacle = fp8_obstacle(q.device)
    if obstacle and choice.impl == "triton":
        raise ValueError(f"sample_scores with keys in fp8 cannot run: {obstacle}")
