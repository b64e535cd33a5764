"""fp8 on the host: which GPUs have it, scales per head, the order of stored values (`kernels.fp8_heads` says why)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import device as device_module
from kernels._common.sizes import ceil_div

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite e4m3fn
# Keys are permuted within groups of this many.
KEY_GROUP = 16
# What the parts of a key's bias are multiplied with (kernels.fp8_heads.key_bias): four significant bits each, up to
# 448 * 256.
BIAS_WEIGHTS = (256.0, 16.0, 1.0, 0.0625)
BIAS_PARTS = len(BIAS_WEIGHTS)
BIAS_HEADS = 4  # whose parts lie beside one another: 16 bytes
BIAS_KEYS = 8  # of so many keys one behind the other: 128 bytes, what TMA brings at a time
_EVERY = torch.arange(256, dtype=torch.uint8).view(FP8).float()  # by its bits


@dataclass(frozen=True)
class HeadScales:
    """Scales of one layer: value = e4m3 * scale. q: float32 [H]; k, v: float32 [Hkv]; contiguous, above 0.

    q_mean: float32 [H, D], contiguous; taken from queries before they are rounded, in a prefill. Its products with the
    keys before those are rounded are added to the scores (kernels.fp8_heads.key_bias). None: nothing.

    k_shift: float32 [Hkv, D], contiguous; taken from keys before they are rounded, and never added again: it changes
    all logits of a query by the same, so that its softmax stays (unless it has sinks). None: nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_shift: Tensor | None = None
    q_mean: Tensor | None = None

    def shifted(self, k: Tensor) -> Tensor:
        """k [Hkv, ..., D] less the shift; float32 if there is one."""
        if self.k_shift is None:
            return k
        return k.float() - self.k_shift.unflatten(1, (*[1] * (k.ndim - 2), -1))

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
        for name, matrix, length in (("q_mean", self.q_mean, heads), ("k_shift", self.k_shift, kv_heads)):
            if matrix is not None and (
                matrix.ndim != 2 or len(matrix) != length or matrix.dtype != torch.float32
                or not matrix.is_contiguous() or matrix.device != device
            ):  # fmt: skip
                raise ValueError(
                    f"scales.{name} must be contiguous float32 [{length}, D] on {device}, got {matrix.dtype} "
                    f"{tuple(matrix.shape)} on {matrix.device}"
                )


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


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in e4m3, saturated at +-448; NaN stays NaN. scale: float32, broadcast against x."""
    return (x.float() * (1.0 / scale)).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def widen(values: Tensor) -> Tensor:
    """fp8 values as float32. On a CPU by a table, three times as fast as torch, which converts one by one there."""
    if values.device.type != "cpu":
        return values.float()
    return _EVERY.index_select(0, values.contiguous().view(torch.uint8).flatten().int()).view(values.shape)


def split_bias(bias: Tensor) -> Tensor:
    """Biases, any shape -> e4m3 [..., BIAS_PARTS], whose sum times BIAS_WEIGHTS they are, to 2^-16 and saturated."""
    parts = []
    for weight in BIAS_WEIGHTS:
        parts.append((bias / weight).float().clamp(-FP8_MAX, FP8_MAX).to(FP8))
        bias = bias - widen(parts[-1]) * weight
    return torch.stack(parts, dim=-1)


def join_bias(parts: Tensor, group: int) -> Tensor:
    """A bias as kernels take it, e4m3 [N, Hkv, P, T, 16], of `group` heads a KV head -> contiguous float32 [N, H, T].

    Waits for nothing on a GPU."""
    by_part = widen(parts).unflatten(-1, (BIAS_HEADS, BIAS_PARTS)).unbind(-1)
    of_heads = torch.stack([part * weight for part, weight in zip(by_part, BIAS_WEIGHTS, strict=True)]).sum(0)
    return of_heads.movedim(-1, 3).flatten(2, 3)[:, :, :group].flatten(1, 2).contiguous()


def bias_shape(heads: int, kv_heads: int, tokens: int) -> tuple[int, int, int, int]:
    """[Hkv, P, T, 16] of a bias for so many keys: P planes of BIAS_HEADS heads each, T a multiple of BIAS_KEYS."""
    planes = ceil_div(heads // kv_heads, BIAS_HEADS)
    return kv_heads, planes, ceil_div(tokens, BIAS_KEYS) * BIAS_KEYS, BIAS_HEADS * BIAS_PARTS


def store_order(values: Tensor) -> Tensor:
    """values [..., T], 16 | T, keys in order -> the order in which they are stored."""
    return values.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def restore_keys(stored: Tensor) -> Tensor:
    """The inverse of `store_order`."""
    return stored.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)
