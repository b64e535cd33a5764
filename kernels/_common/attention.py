"""What the attention operations, in 16 bits and in fp8, share on the host: checks, the choice of kernel, obstacles."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kernels._common.prefixes import Prefixes
from kernels._common.rows import check_rows
from kernels._common.selection import BlockSelection
from kernels._common.sizes import ceil_div
from kernels._common.tma import tma_obstacle
from kernels.dispatch import Choice, check_impl, hopper_unavailable, triton_unavailable

LOG2E = 1.4426950408889634
HOPPER_BLOCK = 128  # rows of a query block and of a key block on the Hopper path
HOPPER_DIMS = (64, 128)
HOPPER_TYPES = (torch.bfloat16, torch.float16)


def choose_with_hopper(
    op: str, device: torch.device, impl: str, hopper_obstacle: Callable[[], str], missing: str = ""
) -> Choice:
    """The implementation of an operation that has a reference, a Triton and a Hopper path, for tensors on `device`.

    hopper_obstacle: says why the Hopper path cannot take the call, or nothing; asked only where that decides.
    missing: what the GPU lacks for both kernels. Raises ValueError, naming `op`, if `impl` is one that cannot run, and
    for "auto" on a GPU that lacks something.
    """
    check_impl(impl)
    no_triton = triton_unavailable(device)
    if impl == "reference" or (impl == "auto" and (device.type != "cuda" or no_triton)):
        return Choice("reference", no_triton if device.type == "cuda" and impl == "auto" else "")
    if missing := no_triton or missing:
        raise ValueError(f"{op}: impl={impl!r} cannot run: {missing}")
    if impl == "triton":
        return Choice("triton")
    obstacle = hopper_obstacle()
    if impl == "gluon" and obstacle:
        raise ValueError(f"{op}: impl='gluon' cannot run: {obstacle}")
    return Choice("triton", obstacle) if obstacle else Choice("gluon")


def hopper_obstacle(
    device: torch.device,
    wrong: str,
    block_size: int,
    query_start: int,
    window: int | None,
    tensors: Iterable[Tensor | None],
) -> str:
    """Why the Hopper path cannot take a call; empty if it can.

    wrong: what the types and D are wrong in, which each operation judges itself. tensors: those that TMA reads.
    """
    if missing := hopper_unavailable(device):
        return missing
    if wrong:
        return wrong
    if block_size != HOPPER_BLOCK:
        return f"the Hopper path takes blocks of {HOPPER_BLOCK} tokens, got {block_size}"
    if query_start % HOPPER_BLOCK:
        return f"the Hopper path needs a query_start that {HOPPER_BLOCK} divides, got {query_start}"
    if window is not None:
        return "the Hopper path has no sliding window"
    return tma_obstacle(*(tensor for tensor in tensors if tensor is not None))


def check_prefill(
    q: Tensor,
    selection: BlockSelection | None,
    query_start: int,
    block_size: int,
    block_sizes: tuple[int, ...],
    scale: float | None,
    window: int | None,
) -> None:
    """Raise ValueError unless the arguments that say which keys queries [N, H, Lq, D] see are valid."""
    N, H, Lq, _ = q.shape
    if block_size not in block_sizes:
        raise ValueError(f"block_size must be one of {block_sizes}, got {block_size}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")  # the online softmax scales after its maximum
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if selection is None:
        return
    if query_start % block_size:
        raise ValueError(f"a selection needs a query_start that block_size={block_size} divides, got {query_start}")
    rows = ceil_div(Lq, block_size)
    if selection.counts.shape != (N, H, rows):
        raise ValueError(f"selection must have counts [{N}, {H}, {rows}], got {tuple(selection.counts.shape)}")


def allocate_output(q: Tensor, dtype: torch.dtype, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out [N, H, Lq, D] for queries like q, its memory laid out [N, Lq, H, D], and float32 lse [N, H, Lq] if wanted."""
    N, H, Lq, D = q.shape
    out = torch.empty(N, Lq, H, D, dtype=dtype, device=q.device).transpose(1, 2)
    return out, torch.empty(N, H, Lq, dtype=torch.float32, device=q.device) if with_lse else None


def dot_precision(q: Tensor) -> str:
    """How Triton multiplies with queries q [..., D] in float32; the other types take no notice."""
    # Three TF32 products reach float32's accuracy on tensor cores, but hold both halves of every operand in registers.
    return "tf32" if q.dtype != torch.float32 else "tf32x3" if q.shape[-1] <= 256 else "ieee"


def check_decode(
    q: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    window: int | None,
    sinks: Tensor | None,
    prefixes: Prefixes | None = None,
) -> None:
    """Raise ValueError unless starts and lengths describe the arena extents of the S documents of q [S, H, D], and
    sinks and prefixes, if there are any, are those of H heads and S rows."""
    S, H, _ = q.shape
    if prefixes is not None:
        prefixes.check(S)
    check_rows("starts", starts, torch.int64, S)
    check_rows("lengths", lengths, torch.int32, S)
    if max_length < 1 or (window is not None and window < 1):
        raise ValueError(f"max_length and window must be at least 1, got {max_length}, {window}")
    if sinks is not None and (sinks.shape != (H,) or not sinks.is_floating_point() or not sinks.is_contiguous()):
        raise ValueError(
            f"sinks must be contiguous floating-point logits [{H}], one a query head, got {sinks.dtype} "
            f"{tuple(sinks.shape)}"
        )
