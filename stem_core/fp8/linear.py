"""The fp8 linear, and the switch of a model's linears to it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kernels.quantize import FP8, QuantizedRows, choose_row_kernel, quantize_rows

Model = TypeVar("Model", bound=nn.Module)

# What the fp8 GEMM asks of inputs and outputs.
ALIGNMENT = 16

# Linears that kept their dtype, with the reason, by model.
_kept: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


def scaled_linear(
    rows: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, fast_accumulation: bool = False
) -> Tensor:
    """rows @ weight.T, both in fp8, the scales applied to the sums.

    rows: values [..., K]. weight: float8_e4m3fn [N, K], contiguous. scale: float32 [1, N]. bias: [N] or None.
    fast_accumulation: Hopper sums in its tensor cores' reduced precision instead of promoting to float32 as it goes.
    Returns [..., N] in rows.dtype; on a GPU that must be bfloat16. Raises ValueError otherwise.
    """
    if rows.values.is_cuda and rows.dtype != torch.bfloat16:
        raise ValueError(f"fp8 linears on a GPU need a bfloat16 model, got {rows.dtype}")
    K = rows.values.shape[-1]
    if not rows.values.is_cuda:
        # A float32 product of the same values: `torch._scaled_mm` depends on the CPU's instructions (with AMX one call
        # took seconds), and some builds (torch 2.11) scale whole tensors only.
        sums = rows.values.view(-1, K).float() @ weight.float().t()
        product = sums * rows.scales.view(-1, 1) * scale
        product = (product if bias is None else product + bias.float()).to(rows.dtype)
        return product.view(*rows.values.shape[:-1], weight.shape[0])
    out = torch._scaled_mm(
        rows.values.view(-1, K),
        weight.t(),
        scale_a=rows.scales.view(-1, 1),
        scale_b=scale,
        bias=bias,
        out_dtype=rows.dtype,
        use_fast_accum=fast_accumulation,
    )
    return out.view(*rows.values.shape[:-1], weight.shape[0])


class Fp8Linear(nn.Module):
    """y = x @ W.T + b with W in fp8.

    weight: float8_e4m3fn [N, K]; weight_scale: float32 [1, N], W = weight * weight_scale.T; bias: [N] or None.
    Takes activations, which it quantises per row, or rows that are quantised already.
    """

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, fast_accumulation: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.fast_accumulation = fast_accumulation
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, fast_accumulation: bool = False, device: torch.device | None = None
    ) -> Fp8Linear:
        """Quantise a linear's weight, on `device` if given. Raises ValueError on GPUs without fp8."""
        rows = quantize_rows(linear.weight.detach().to(device))
        bias = None if linear.bias is None else linear.bias.detach().to(device)
        return cls(rows.values, rows.scales.view(1, -1), bias, fast_accumulation=fast_accumulation)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype. Raises RuntimeError if the weight was converted to another type."""
        if self.weight.dtype != FP8 or self.weight_scale.dtype != torch.float32:
            raise RuntimeError(
                f"an fp8 linear was converted to {self.weight.dtype}, which loses its scale: move such a model with "
                ".to(device), never .to(dtype)"
            )
        rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
        return scaled_linear(rows, self.weight, self.weight_scale, self.bias, fast_accumulation=self.fast_accumulation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"fast_accumulation={self.fast_accumulation}"
        )


@torch.no_grad()
def quantize_linears(
    model: Model,
    skip: Sequence[str] = ("lm_head",),
    *,
    fast_accumulation: bool = False,
    device: torch.device | str | Callable[[str], torch.device] | None = None,
    fill: Callable[[str, nn.Linear], None] | None = None,
) -> Model:
    """Replace the model's linears by fp8 ones, one at a time, freeing each weight. Changes the model in place.

    skip: names that stay, full ("model.layers.0.mlp.down_proj") or last part ("lm_head").
    device: where the fp8 weights go, or a function that says it of a linear's name; None leaves them where the weights
        are. With a model in host memory and a GPU as device, only one weight at a time is there in its old dtype; the
        rest of the model follows with .to(device).
    fill: called with the name of each linear, and the linear, before its weight is read: it can give memory and values
        to one that was built on the device "meta". Linears that stay are not filled.
    Linears that share their weight, or whose sizes are no multiples of 16, stay; see `describe_fp8`. Call it before
    `fuse_model`. Raises ValueError on GPUs without fp8, and for a model that has nothing to quantise.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if any("forward" in vars(module) for module in linears.values()):
        raise ValueError("a linear's forward is replaced already: call quantize_linears before fuse_model")
    targets = {name: _target(name, device) for name in linears}
    for target in {targets[name] or linear.weight.device for name, linear in linears.items()}:
        choose_row_kernel("quantize_linears", target, fp8=True)
    owners = Counter(map(_memory, _parameters_with_repeats(model)))
    kept: dict[str, str] = {}
    for name, linear in linears.items():
        reason = _reason_to_keep(name, linear, skip, owners)
        if reason:
            kept[name] = reason
            continue
        if fill is not None:
            fill(name, linear)
        parent, _, child = name.rpartition(".")
        replacement = Fp8Linear.from_linear(linear, fast_accumulation=fast_accumulation, device=targets[name])
        setattr(model.get_submodule(parent), child, replacement)
        del linear.weight
    if len(kept) == len(linears):
        raise ValueError(f"no linear to quantise: {kept or 'the model has none'}")
    _kept[model] = kept
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what the old weights took
    return model


def _target(name: str, device: torch.device | str | Callable[[str], torch.device] | None) -> torch.device | None:
    if device is None or isinstance(device, torch.device):
        return device
    return torch.device(device) if isinstance(device, str) else device(name)


def _parameters_with_repeats(model: nn.Module) -> list[Tensor]:
    return [p for module in model.modules() for p in module._parameters.values() if p is not None]


def _memory(parameter: Tensor) -> int:
    """What parameters that share their values have in common, those without memory (meta) included."""
    return parameter.data_ptr() or id(parameter)


def _reason_to_keep(name: str, linear: nn.Linear, skip: Sequence[str], owners: Counter[int]) -> str:
    if name in skip or name.rpartition(".")[2] in skip:
        return "asked for"
    if owners[_memory(linear.weight)] > 1:
        return "shares its weight"
    if linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT:
        return f"its sizes are no multiples of {ALIGNMENT}"
    return ""


def describe_fp8(model: nn.Module) -> dict[str, Any]:
    """{"linears": number in fp8, "kept": {reason: number}, "fast_accumulation": bool}."""
    linears = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    return {
        "linears": len(linears),
        "kept": dict(Counter(_kept.get(model, {}).values())),
        "fast_accumulation": any(linear.fast_accumulation for linear in linears),
    }
