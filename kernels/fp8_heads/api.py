"""What the fp8 attention operations share: static scales per head, the storage order of values, which GPUs can.

Keys are kept as rows [T, D], values transposed [D, T], because Hopper's fp8 matrix instruction wants both of its
operands contiguous along the summed dimension. Within each group of 16 keys the values are also permuted: stored
position 4t + 2j + e holds key 8j + 2t + e (j, e < 2; t < 4). The 4 probabilities that a thread of the tensor core
holds after Q K^T, keys {2t, 2t + 1, 8 + 2t, 9 + 2t}, are then the 4 that it must bring along for P V: no shuffles.

Scales are static, one for each head, from a calibration (`stem_core.kv_scales`): a power of two with headroom. No pass
for the maximum is needed, no rescaling of earlier tokens, and results do not depend on how a prompt was cut into
chunks. e4m3 is a floating format: its relative error does not depend on the scale while values stay within 2^-6 .. 448.
Relative error of attention's output by quantisation in %, for three synthetic kinds of q, k and v and for the bundled
trained model (4096 tokens, dense; `python -m tests.kernels.fp8_scales`):

                          gaussian  outlier channels       heavy tails       tiny-reader
    per token                 7.92              8.80              4.18              3.79
    per block of 128          8.13             12.33              5.54              4.24
    per token, 2^n            8.41             17.54             10.34              4.07
    per head                  7.89             17.85             10.01              4.17
    static 2^n, x1            8.41             17.54             47.87              4.07
    static 2^n, x4            8.41             17.54             13.82              4.07
    static 2^n, x8 .. x16     8.41             17.54             10.35              4.07
    static 2^n, x64           8.41             17.54             10.43              4.07
    static 2^n, x256          8.41             17.54             13.12              4.06

(xN: headroom over the largest value of another sample or document.) So range is no problem: x16 keeps what outliers
need and is far from losing small values. What scales per token gain is something else: each token's largest value
becomes 448, which e4m3 holds exactly. That counts where one channel dominates a head's scores, and is gone with powers
of two. Values past the calibrated range saturate at 448 * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kernels import device as device_module
from kernels._common.rows import FP8, check_floating, choose_row_kernel
from kernels.dispatch import Choice, on_its_gpu

# Keys are permuted within groups of this many.
KEY_GROUP = 16


@dataclass(frozen=True)
class HeadScales:
    """Scales of one layer: value = e4m3 * scale. q: float32 [H]; k, v: float32 [Hkv]; contiguous, above 0."""

    q: Tensor
    k: Tensor
    v: Tensor

    def check(self, heads: int | None, kv_heads: int, device: torch.device) -> None:
        """Raise ValueError unless the shapes, types and device fit; heads None: whatever q has."""
        heads = self.q.numel() if heads is None else heads
        for name, tensor, length in (("q", self.q, heads), ("k", self.k, kv_heads), ("v", self.v, kv_heads)):
            if tensor.shape != (length,) or tensor.dtype != torch.float32 or tensor.device != device:
                raise ValueError(
                    f"scales.{name} must be float32 [{length}] on {device}, got {tensor.dtype} {tuple(tensor.shape)} "
                    f"on {tensor.device}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"scales.{name} must be contiguous")


def fp8_obstacle(device: torch.device) -> str:
    """Why kernels with fp8 cannot run on this GPU; empty if they can, and on a CPU."""
    if device.type != "cuda":
        return ""
    capability = device_module.capability(device)
    if capability >= (8, 9):
        return ""
    return (
        f"fp8 needs compute capability 8.9 (Ada, Hopper or later), this GPU has {capability[0]}.{capability[1]}; "
        "use bf16"
    )


def choose_fp8_heads(device: torch.device, impl: str = "auto") -> Choice:
    """The implementation that the operations of this module use on `device`."""
    return choose_row_kernel("fp8_heads", device, impl, fp8=True)


@on_its_gpu
def quantize_heads(x: Tensor, scale: Tensor, *, impl: str = "auto") -> Tensor:
    """x / scale in e4m3, saturated at +-448 (infinities too; NaN stays NaN).

    x: [N, H, L, D] bfloat16, float16 or float32, any strides with a contiguous last dimension. scale: float32 [H].
    Returns float8_e4m3fn [N, H, L, D], a view of [N, L, H, D]. Raises ValueError for shapes or types that do not fit.
    """
    choice = choose_fp8_heads(x.device, impl)
    check_floating("quantize_heads", x, backward=choice.impl == "reference")
    if x.ndim != 4 or scale.shape != (x.shape[1],) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"quantize_heads takes x [N, H, L, D] and a contiguous float32 scale [H], got {tuple(x.shape)}, "
            f"{scale.dtype} {tuple(scale.shape)}"
        )
    return _implementation(choice).quantize_heads(x, scale)


@on_its_gpu
def write_kv(
    k: Tensor, v: Tensor, scales: HeadScales, k_arena: Tensor, vt_arena: Tensor, start: int, *, impl: str = "auto"
) -> None:
    """Write a chunk of one document into the arena in fp8: keys to rows, values to permuted columns from `start` on.

    k, v: [1, Hkv, L, D] bfloat16, float16 or float32 (keys with their positions encoded), any strides with a contiguous
        last dimension. k_arena: float8_e4m3fn [Hkv, T, D]; vt_arena: float8_e4m3fn [Hkv, D, T]; last dimension
        contiguous. start: arena index of the chunk's first token, a multiple of 16. Values of the tokens that round
        the chunk up to 16 become zero, so that a ragged end holds nothing but finite numbers.
    Raises ValueError for shapes or types that do not fit.
    """
    choice = choose_fp8_heads(k.device, impl)
    check_floating("write_kv", k, v, backward=choice.impl == "reference")
    if k.ndim != 4 or k.shape != v.shape or k.shape[0] != 1:
        raise ValueError(f"write_kv takes k and v [1, Hkv, L, D], got {tuple(k.shape)} and {tuple(v.shape)}")
    _check_arena("write_kv", k.shape[1], k.shape[3], scales, k_arena, vt_arena)
    end = start + -(-k.shape[2] // KEY_GROUP) * KEY_GROUP
    if start % KEY_GROUP or start < 0 or end > k_arena.shape[1]:
        raise ValueError(
            f"write_kv: start must be a multiple of {KEY_GROUP} and the chunk, rounded up to {KEY_GROUP}, end inside "
            f"the arena of {k_arena.shape[1]} tokens, got [{start}, {end})"
        )
    _implementation(choice).write_kv(k, v, scales, k_arena, vt_arena, start)


@on_its_gpu
def append_kv(
    k: Tensor, v: Tensor, scales: HeadScales, k_arena: Tensor, vt_arena: Tensor, slots: Tensor, *, impl: str = "auto"
) -> None:
    """Write one token of each of S documents into the arena in fp8; capturable in a CUDA graph.

    k, v: [S, Hkv, D] bfloat16, float16 or float32, last dimension contiguous. slots: int64 [S], arena index of each
    token; documents start at multiples of 16. Arenas as for `write_kv`. The token that opens a group of 16 sets the
    values of the others to zero. Raises ValueError for shapes or types that do not fit.
    """
    choice = choose_fp8_heads(k.device, impl)
    check_floating("append_kv", k, v, backward=choice.impl == "reference")
    if k.ndim != 3 or k.shape != v.shape or slots.shape != k.shape[:1] or slots.dtype != torch.int64:
        raise ValueError(
            f"append_kv takes k and v [S, Hkv, D] and int64 slots [S], got {tuple(k.shape)}, {tuple(v.shape)}, "
            f"{slots.dtype} {tuple(slots.shape)}"
        )
    _check_arena("append_kv", k.shape[1], k.shape[2], scales, k_arena, vt_arena)
    _implementation(choice).append_kv(k, v, scales, k_arena, vt_arena, slots)


def _check_arena(op: str, heads: int, dim: int, scales: HeadScales, k_arena: Tensor, vt_arena: Tensor) -> None:
    if (
        k_arena.ndim != 3
        or (k_arena.shape[0], k_arena.shape[2]) != (heads, dim)
        or vt_arena.shape != (heads, dim, k_arena.shape[1])
        or not k_arena.dtype == vt_arena.dtype == FP8
        or k_arena.stride(-1) != 1
        or vt_arena.stride(-1) != 1
    ):
        raise ValueError(
            f"{op}: the arenas must be {FP8} [{heads}, T, {dim}] and [{heads}, {dim}, T] with a contiguous last "
            f"dimension, got {k_arena.dtype} {tuple(k_arena.shape)} and {vt_arena.dtype} {tuple(vt_arena.shape)}"
        )
    scales.check(None, heads, k_arena.device)


def _implementation(choice: Choice) -> ModuleType:
    return import_module(f"kernels.fp8_heads.{choice.impl}")
