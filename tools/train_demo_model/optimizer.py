"""Muon for the matrices of the layers, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The quintic of Newton-Schulz orthogonalisation that Muon uses (Jordan et al., 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon:
    """Matrices of one shape are orthogonalised together. rates: learning rates of the matrices and of the rest."""

    def __init__(
        self, matrices: Sequence[nn.Parameter], rest: Sequence[nn.Parameter], rates: tuple[float, float], decay: float
    ) -> None:
        self._rates, self._decay = rates, decay
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        self._groups = [[matrix for matrix in matrices if tuple(matrix.shape) == shape] for shape in shapes]
        self._momenta = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self._groups]
        fused = rest[0].device.type == "cuda"
        self._adam = torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.95), weight_decay=0.0, fused=fused)

    @torch.no_grad()
    def step(self, share: float, momentum: float) -> None:
        """One step at `share` of the learning rates."""
        for settings in self._adam.param_groups:
            settings["lr"] = self._rates[1] * share
        self._adam.step()
        rate = self._rates[0] * share
        for group, momenta in zip(self._groups, self._momenta, strict=True):
            matrices: list[Tensor] = list(group)
            gradient = torch.stack([matrix.grad for matrix in group])  # type: ignore[misc]
            momenta.lerp_(gradient, 1 - momentum)
            update = orthogonalised(gradient.lerp(momenta, momentum))
            torch._foreach_mul_(matrices, 1 - rate * self._decay)
            torch._foreach_add_(matrices, list(update.unbind(0)), alpha=-rate)


def orthogonalised(gradients: Tensor) -> Tensor:
    """gradients float32 [N, R, C] -> their nearest semi-orthogonal matrices, about, scaled by the shape."""
    x = gradients.bfloat16()
    flip = x.size(1) > x.size(2)
    x = x.mT if flip else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    x = x.mT if flip else x
    return (x * max(1.0, x.size(1) / x.size(2)) ** 0.5).float()
