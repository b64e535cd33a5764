"""What the row-wise operations (norms, activations, quantisation) share: fp8 rows, layouts, the choice of kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._common.fp8 import fp8_obstacle, widen
from kernels.dispatch import Choice, choose_portable

# Rows that are zero get this largest magnitude, so that their scale can be divided by.
LEAST_AMAX = 1e-30
# What a program of the kernels that need a whole row holds in its registers.
MAX_COLUMNS = 65536
FLOATING = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class QuantizedRows:
    """Activations in fp8: row = values * scales.

    values: float8_e4m3fn [..., D], contiguous. scales: float32 [..., 1]. dtype: of the tensor that was quantised.
    Not a Tensor on purpose: only code made for it can use it, anything else fails instead of reading unscaled values.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.values.shape if dim is None else self.values.shape[dim]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dequantize(self) -> Tensor:
        """[..., D] in `dtype`."""
        return (self.values.float() * self.scales).to(self.dtype)


def scaled_product(rows: QuantizedRows, weight: Tensor, scale: Tensor) -> Tensor:
    """rows [M, K] @ weight.T in float32, the scales applied to the sums: what kernels of fp8 products are held to.

    weight: float8_e4m3fn [N, K]. scale: float32, of the output channels, [N] or [1, N]. Returns float32 [M, N].
    """
    return widen(rows.values) @ widen(weight).t() * rows.scales * scale


def choose_row_kernel(op: str, device: torch.device, impl: str = "auto", *, fp8: bool = False) -> Choice:
    """The implementation that `op` uses on `device`; fp8: whether it writes fp8.

    Raises ValueError where `impl` cannot run, and for fp8 on a GPU that has none (compute capability below 8.9).
    """
    if fp8 and (obstacle := fp8_obstacle(device)):
        raise ValueError(f"{op}: {obstacle}")
    return choose_portable(op, device, impl)


def check_floating(op: str, *tensors: Tensor, backward: bool = False) -> None:
    """Raise ValueError unless the tensors share one of FLOATING and have a contiguous last dimension.

    Raises RuntimeError where a gradient is wanted and `backward` says that the implementation has none.
    """
    first = tensors[0]
    if first.dtype not in FLOATING or any(t.dtype != first.dtype for t in tensors):
        got = ", ".join(str(t.dtype) for t in tensors)
        raise ValueError(f"{op} takes tensors of one type out of bfloat16, float16 and float32, got {got}")
    for t in tensors:
        if t.ndim < 1 or (t.shape[-1] > 1 and t.stride(-1) != 1):
            raise ValueError(
                f"{op}: the last dimension must be contiguous, got shape {tuple(t.shape)}, strides {t.stride()}"
            )
        if not backward and torch.is_grad_enabled() and t.requires_grad:
            raise RuntimeError(f"{op} has no backward pass here: run it under torch.inference_mode()")


def check_columns(op: str, columns: int) -> None:
    """Raise ValueError for rows that no program can hold."""
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"{op} takes rows of 1 to {MAX_COLUMNS} elements, got {columns}")


def as_rows(op: str, x: Tensor) -> Tensor:
    """x [..., D] as [rows, D] without copying. Raises ValueError if its rows are not evenly spaced."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError as error:
        raise ValueError(
            f"{op}: rows must be evenly spaced in memory, got shape {tuple(x.shape)}, strides {x.stride()}; "
            "call .contiguous()"
        ) from error


def in_memory_order(x: Tensor) -> tuple[Tensor, list[int]]:
    """x [..., D] with its leading dimensions sorted by falling stride, and the permutation that undoes it."""
    order = [*sorted(range(x.ndim - 1), key=lambda d: -int(x.stride()[d])), x.ndim - 1]
    inverse = [order.index(d) for d in range(x.ndim)]
    return x.permute(order), inverse


def row_layout(op: str, x: Tensor) -> tuple[int, int, tuple[int, int, int]]:
    """Sizes n2, n3 and strides s1, s2, s3 of the leading dimensions of x, merged to at most three.

    Row r starts at (r // (n2 * n3)) * s1 + (r // n3 % n2) * s2 + (r % n3) * s3. Raises ValueError for more than three.
    """
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 3:
        raise ValueError(f"{op}: the rows lie in memory at more than three strides: {x.stride()}; call .contiguous()")
    sizes, strides = [1] * (3 - len(sizes)) + sizes, [0] * (3 - len(strides)) + strides
    return sizes[1], sizes[2], (strides[0], strides[1], strides[2])


def check_rows(name: str, values: Tensor, dtype: torch.dtype, rows: int) -> None:
    """Raise ValueError unless there is one number of that dtype for each row, behind one another as kernels read them.

    (An expanded row flattens to a view in which all numbers are one.)
    """
    if values.shape != (rows,) or values.dtype != dtype or not values.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {str(dtype).removeprefix('torch.')} [{rows}], got {values.dtype} "
            f"{tuple(values.shape)} with strides {values.stride()}"
        )
