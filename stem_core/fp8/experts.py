"""Experts of a mixture in fp8: transformers holds all of a layer in two parameters of three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.grouped_linear import ALIGNMENT, group_rows, grouped_linear
from kernels.quantize import FP8, QuantizedRows, quantize_rows
from kernels.silu_mul import silu_mul_fp8
from stem_core.activation import activation_name


def is_experts_class(kind: type[nn.Module]) -> bool:
    """Whether modules of this class are experts that transformers can run by several implementations.

    Its decorator `use_experts_implementation` gives the class a gate.
    """
    return hasattr(kind, "_apply_gate")


def find_experts(model: nn.Module) -> dict[str, Any]:
    """The modules of a model that hold experts in a way that transformers' interface for them knows, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_experts_class(type(module)) and isinstance(getattr(module, "down_proj", None), nn.Parameter)
    }


def experts_obstacle(experts: Any) -> str:
    """Why experts cannot be in fp8; empty if they can."""
    if getattr(experts, "has_post_expert_norm", False):
        return "its experts have norms of their own"
    if any(size % ALIGNMENT for name in _weights(experts) for size in getattr(experts, name).shape[1:]):
        return f"its sizes are no multiples of {ALIGNMENT}"
    return ""


class Fp8Experts(nn.Module):
    """Experts with weights in fp8, in the place of transformers'; tokens are quantised as they come, the router is not.

    entry, down: float8_e4m3fn [E, N, K], of what goes into the gate (or the activation) and what comes out of it.
    entry_scale, down_scale: float32 [E, N]. entry_bias, down_bias: [E, N] or None.
    source: the module that this one replaces, without its weights: for its gate.
    """

    entry: Tensor
    entry_scale: Tensor
    entry_bias: Tensor | None
    down: Tensor
    down_scale: Tensor
    down_bias: Tensor | None
    source: Any

    def __init__(self, source: Any, *, fast_accumulation: bool = False, device: torch.device | None = None) -> None:
        """Quantise the weights of `source`, one expert at a time, on `device` if given, and take them from it.

        Raises ValueError on GPUs without fp8, and for experts that cannot be in fp8 (`experts_obstacle`).
        """
        super().__init__()
        if obstacle := experts_obstacle(source):
            raise ValueError(f"experts cannot be quantised: {obstacle}")
        self.fast_accumulation = fast_accumulation
        for name, part in zip(_weights(source), ("entry", "down"), strict=True):
            values, scales = _quantize(getattr(source, name).detach(), bool(source.is_transposed), device)
            delattr(source, name)
            self.register_parameter(part, nn.Parameter(values, requires_grad=False))
            self.register_parameter(f"{part}_scale", nn.Parameter(scales, requires_grad=False))
            bias = getattr(source, f"{name}_bias", None) if source.has_bias else None
            if bias is not None:
                delattr(source, f"{name}_bias")
                bias = nn.Parameter(bias.detach().to(device).contiguous(), requires_grad=False)
            self.register_parameter(f"{part}_bias", bias)
        self.source = source
        self._activation = _plain_gate(source)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, D], and for each token its experts [T, n] and their shares [T, n] -> [T, D].

        Raises RuntimeError if the weights were converted to another type.
        """
        if self.entry.dtype != FP8 or self.entry_scale.dtype != torch.float32:
            raise RuntimeError(
                f"fp8 experts were converted to {self.entry.dtype}, which loses their scales: move such a model with "
                ".to(device), never .to(dtype)"
            )
        tokens, width = hidden_states.shape
        groups = group_rows(top_k_index, self.entry.shape[0])
        fast = self.fast_accumulation
        rows = quantize_rows(hidden_states)
        entered = grouped_linear(
            self.entry, self.entry_scale, rows, groups, bias=self.entry_bias, fast_accumulation=fast
        )
        out = grouped_linear(
            self.down,
            self.down_scale,
            self._gated(entered),
            groups,
            bias=self.down_bias,
            factors=top_k_weights.reshape(-1),
            fast_accumulation=fast,
        )
        return out.view(tokens, -1, width).sum(1).to(hidden_states.dtype)

    def _gated(self, entered: Tensor) -> QuantizedRows:
        if self._activation:
            gate, up = entered.chunk(2, dim=-1)
            return silu_mul_fp8(gate, up, activation=self._activation)
        if self.source.has_gate:
            return quantize_rows(self.source._apply_gate(entered))
        return quantize_rows(self.source.act_fn(entered))

    def extra_repr(self) -> str:
        E, N, K = self.entry.shape
        return f"experts={E}, entry={K} -> {N}, down={self.down.shape[2]} -> {self.down.shape[1]}"


def _weights(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _plain_gate(experts: Any) -> str:
    """The kernel's name for the activation of a gate that is act(first half) * second half; "" for any other."""
    if not experts.has_gate or type(experts)._apply_gate.__module__ != "transformers.integrations.moe":
        return ""  # a gate of the model's own (gpt-oss)
    try:
        return activation_name(experts)
    except ValueError:
        return ""


def _quantize(weight: Tensor, transposed: bool, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """weight [E, N, K], or [E, K, N] if transposed -> values [E, N, K], scales float32 [E, N]."""
    E, N, K = weight.mT.shape if transposed else weight.shape
    device = device or weight.device
    values = torch.empty(E, N, K, dtype=FP8, device=device)
    scales = torch.empty(E, N, dtype=torch.float32, device=device)
    if values.is_meta:
        return values, scales
    for expert in range(E):
        matrix = weight[expert].to(device)
        rows = quantize_rows(matrix.t().contiguous() if transposed else matrix)
        values[expert], scales[expert] = rows.values, rows.scales[:, 0]
    return values, scales
