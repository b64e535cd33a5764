"""Which activation a module of transformers has, by the kernels' name for it."""

from __future__ import annotations

from typing import Any

import torch

from kernels.silu_mul import ACTIVATIONS, silu_mul


def activation_name(module: Any) -> str:
    """The kernel's name for the activation of a gated MLP or of experts. Raises ValueError if it is another one."""
    function = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not callable(function):
        raise ValueError("it has no act_fn or activation_fn")
    x = torch.linspace(-12, 12, 4097, device="cpu")  # also where the model is built on another device
    got = function(x)
    for name in ACTIVATIONS:
        if torch.allclose(got, silu_mul(x[None], torch.ones_like(x)[None], activation=name)[0], rtol=1e-5, atol=1e-6):
            return name
    raise ValueError(f"its activation {type(function).__name__} is neither SiLU nor GELU in the tanh form")
