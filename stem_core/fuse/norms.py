"""RMSNorm modules through kernels.rms_norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.rms_norm import QuantizedRows, rms_norm, rms_norm_fp8
from stem_core.errors import first_line
from stem_core.fuse.session import Session, activations_like, has_own_forward, row_error, tolerance, trial_input

KIND = "rms_norm"


@dataclass(frozen=True)
class NormStyle:
    """How a family writes RMSNorm; see kernels.rms_norm."""

    eps: float
    weight_offset: float
    round_before_weight: bool


# (weight_offset, round_before_weight): llama, olmo2, gemma, and a gemma that rounds early.
VARIANTS = ((0.0, True), (0.0, False), (1.0, False), (1.0, True))


def fuse_norms(model: nn.Module, session: Session) -> None:
    """Replace the forward of every module whose class is named ...RMSNorm."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            try:
                style = norm_style(module, activations_like(model, module), session.impl)
            except (ValueError, TypeError, RuntimeError) as error:
                session.skipped(KIND, name, str(error) if type(error) is ValueError else first_line(error))
                continue
            session.replace_forward(module, partial(norm_forward, module, style, session.impl, False))
            session.fused(KIND, name)
            session.norms[name] = style


def norm_style(module: Any, like: Tensor, impl: str) -> NormStyle:
    """The style in which the kernel equals module.forward on activations like `like`.

    Raises ValueError that says why there is none.
    """
    if has_own_forward(module):
        raise ValueError("its forward is replaced already")
    parameters = dict(module.named_parameters())
    weight = parameters.pop("weight", None)
    if parameters or not isinstance(weight, Tensor) or weight.ndim != 1:
        raise ValueError("it has other parameters than a weight of one dimension")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(like.dtype).eps if eps is None else float(eps)
    # The weights at hand may all be one; random ones tell the variants apart. Small rows bring out epsilon.
    w = trial_input(weight.numel(), like=weight, seed=1)
    x = trial_input(8, weight.numel(), like=like, scales=(1.0, 30.0, eps**0.5, 0.1))
    wanted = torch.func.functional_call(module, {"weight": w}, (x,))
    errors = {}
    for offset, early in VARIANTS:
        style = NormStyle(eps, offset, early)
        errors[style] = row_error(
            rms_norm(x, w, eps, weight_offset=offset, round_before_weight=early, impl=impl), wanted
        )
    best = min(errors, key=lambda style: errors[style])
    if errors[best] > tolerance(like.dtype):
        raise ValueError(f"no known form of RMSNorm equals its forward (relative error {errors[best]:.1e})")
    return best


def norm_forward(
    module: Any, style: NormStyle, impl: str, quantize: bool, hidden_states: Tensor
) -> Tensor | QuantizedRows:
    """hidden_states [..., D] -> normalised, in fp8 rows if `quantize`."""
    operation = rms_norm_fp8 if quantize else rms_norm
    return operation(
        hidden_states,
        module.weight,
        style.eps,
        weight_offset=style.weight_offset,
        round_before_weight=style.round_before_weight,
        impl=impl,
    )
