"""Gated MLPs, down(act(gate(x)) * up(x)), through kernels.silu_mul."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.quantize import QuantizedRows, quantize_rows
from kernels.silu_mul import silu_mul, silu_mul_fp8
from stem_core.activation import activation_name
from stem_core.errors import first_line
from stem_core.fp8.linear import Fp8Linear
from stem_core.fuse.projections import StackedLinear, free_blocks, stackable
from stem_core.fuse.session import Session, activations_like, has_own_forward, row_error, tolerance, trial_input

KIND, GEMM_KIND = "gated_mlp", "gate_up_projection"


def fuse_mlps(model: nn.Module, session: Session, stack: bool) -> None:
    """Replace the forward of every module with gate_proj, up_proj, down_proj, or gate_up_proj, down_proj.

    stack: run gate_proj and up_proj as one GEMM.
    """
    for name, module in model.named_modules():
        if _is_gated(module):
            try:
                _fuse(model, module, name, session, stack)
            except (ValueError, TypeError, RuntimeError) as error:
                session.skipped(KIND, name, str(error) if type(error) is ValueError else first_line(error))


def _is_gated(module: Any) -> bool:
    """Whether the module has the linears of a gated MLP; stacked experts (parameters of three dimensions) do not."""
    parts = ("gate_up_proj",) if hasattr(module, "gate_up_proj") else ("gate_proj", "up_proj")
    return all(isinstance(getattr(module, part, None), nn.Module) for part in (*parts, "down_proj"))


def _fuse(model: nn.Module, module: Any, name: str, session: Session, stack: bool) -> None:
    """Raises ValueError with the reason if the MLP cannot be fused."""
    if has_own_forward(module):
        raise ValueError("its forward is replaced already")
    activation = activation_name(module)
    packed = hasattr(module, "gate_up_proj")
    entry = module.gate_up_proj if packed else module.gate_proj
    inputs = getattr(entry, "in_features", None)
    if not isinstance(inputs, int):
        raise ValueError(f"its first projection is a {type(entry).__name__}, not a linear")
    like = activations_like(model, module)
    scales = (1.0, 0.1, 10.0, 3.0) if like.dtype == torch.float16 else (1.0, 0.1, 10.0, 100.0)
    x = trial_input(8, inputs, like=like, scales=scales)
    wanted = module(x)

    mark = session.mark()
    reason = ""
    stacked: StackedLinear | None = None
    if not packed and stack:
        reason = stackable([module.gate_proj, module.up_proj])
        if not reason:
            stacked = StackedLinear([module.gate_proj, module.up_proj])
            session.on_undo(stacked.undo)
    first = module.gate_up_proj if packed else stacked
    session.replace_forward(module, partial(mlp_forward, module, first, activation, session.impl))
    try:
        error = row_error(module(x), wanted)
    except (ValueError, RuntimeError):
        session.undo_to(mark)
        raise
    if error > tolerance(x.dtype):
        session.undo_to(mark)
        raise ValueError(f"its forward is not down(act(gate) * up) (relative error {error:.1e})")
    session.fused(KIND, name)
    if stacked is not None:
        session.fused(GEMM_KIND, name)
        free_blocks(module.gate_proj)
    elif reason:
        session.skipped(GEMM_KIND, name, reason)


def takes_fp8(module: Any) -> bool:
    """Whether a fused MLP takes fp8 rows."""
    return isinstance(getattr(module, "gate_up_proj", getattr(module, "gate_proj", None)), Fp8Linear)


def mlp_forward(module: Any, gate_up: Any, activation: str, impl: str, hidden_states: Tensor | QuantizedRows) -> Tensor:
    """hidden_states [..., D], or fp8 rows for fp8 linears -> [..., D].

    gate_up: one call for both projections, gate first, or None.
    """
    if gate_up is None:
        if takes_fp8(module) and isinstance(hidden_states, Tensor):
            hidden_states = quantize_rows(hidden_states, impl=impl)
        gate, up = module.gate_proj(hidden_states), module.up_proj(hidden_states)
    else:
        gate, up = gate_up(hidden_states).chunk(2, dim=-1)
    produce = silu_mul_fp8 if isinstance(module.down_proj, Fp8Linear) else silu_mul
    return module.down_proj(produce(gate, up, activation=activation, impl=impl))
