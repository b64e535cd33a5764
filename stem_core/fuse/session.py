"""What one `fuse_model` call replaced and how to undo it, and the numerical comparison that each replacement passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fusion:
    """A module that was considered. reason: why it keeps its own forward; empty if it was fused."""

    kind: str
    module: str
    reason: str = ""


@dataclass
class Session:
    """impl: of the kernels. unfused_calls: counters of calls that a fused module handed to the model's own code."""

    impl: str
    fusions: list[Fusion] = field(default_factory=list)
    norms: dict[str, Any] = field(default_factory=dict)
    unfused_calls: list[Callable[[], int]] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def fused(self, kind: str, name: str) -> None:
        self.fusions.append(Fusion(kind, name))

    def skipped(self, kind: str, name: str, reason: str) -> None:
        self.fusions.append(Fusion(kind, name, reason))

    def on_undo(self, action: Callable[[], None]) -> None:
        self._undo.append(action)

    def mark(self) -> int:
        """A point that `undo_to` can return to."""
        return len(self._undo)

    def undo_to(self, mark: int) -> None:
        while len(self._undo) > mark:
            self._undo.pop()()

    def undo_all(self) -> None:
        self.undo_to(0)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Shadow the class's forward on this instance."""
        module.forward = forward  # type: ignore[method-assign]
        self.on_undo(lambda: delattr(module, "forward"))


def has_own_forward(module: nn.Module) -> bool:
    """Whether something (accelerate, another patch) has replaced this instance's forward already."""
    return "forward" in vars(module)


def trial_input(*shape: int, like: Tensor, scales: Sequence[float] = (1.0,), seed: int = 0) -> Tensor:
    """Normal random numbers in the dtype and on the device of `like`; row i is scaled by scales[i % len(scales)].

    Rows of different magnitude bring out an epsilon, a clamp or a saturating activation.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    factors = torch.tensor([scales[i % len(scales)] for i in range(shape[-2])]) if len(shape) > 1 else scales[0]
    return (x * (factors[:, None] if isinstance(factors, Tensor) else factors)).to(like.device, like.dtype)


def activations_like(model: nn.Module, module: nn.Module) -> Tensor:
    """An empty tensor with the dtype of the model's activations, on the device of `module`."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    return torch.empty(0, dtype=embedding.dtype, device=next(module.parameters(), embedding).device)


def row_error(got: Tensor, wanted: Tensor) -> float:
    """Largest relative error of a row, root mean square; rows whose wanted values overflow are left out.

    Infinite where shape or dtype differ, or where no row is finite.
    """
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    got, wanted = got.double().reshape(-1, got.shape[-1]), wanted.double().reshape(-1, wanted.shape[-1])
    finite = wanted.isfinite().all(-1)
    if not finite.any():
        return float("inf")
    got, wanted = got[finite], wanted[finite]
    error = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float("inf") if error.isnan().any() else float(error.max())


def tolerance(dtype: torch.dtype) -> float:
    """How far two evaluations of one formula may differ: orders of summation, single roundings."""
    return max(torch.finfo(dtype).eps, 1e-5)
