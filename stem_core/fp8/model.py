"""The switch of a model's linears and experts to fp8."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kernels.quantize import choose_row_kernel
from stem_core.fp8.experts import Fp8Experts, experts_obstacle, find_experts
from stem_core.fp8.linear import Fp8Linear

Model = TypeVar("Model", bound=nn.Module)

# Linears that every layer keeps in 16 bits in a model that is to be as exact as it is fast (see sensitive_linears).
SENSITIVE = ("lm_head", "k_proj", "v_proj")

# What the fp8 GEMM asks of inputs and outputs.
ALIGNMENT = 16

# Linears and experts that kept their dtype, with the reason, by model.
_kept: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def quantize_linears(
    model: Model,
    skip: Sequence[str] = ("lm_head",),
    *,
    fast_accumulation: bool = False,
    device: torch.device | str | Callable[[str], torch.device] | None = None,
    fill: Callable[[str, nn.Module], None] | None = None,
) -> Model:
    """Replace the model's linears and experts by fp8 ones, one at a time, freeing each weight. Changes it in place.

    skip: names that stay, full ("model.layers.0.mlp.down_proj") or last part ("lm_head").
    device: where the fp8 weights go, or a function that says it of a linear's name; None leaves them where the weights
        are. With a model in host memory and a GPU as device, only one weight at a time is there in its old dtype; the
        rest of the model follows with .to(device).
    fill: called with the name of each linear (or module of experts), and the module, before its weights are read: it
        can give memory and values to one that was built on the device "meta". What stays is not filled.
    Linears that share their weight, or whose sizes are no multiples of 16, stay, and experts that transformers'
    interface for them does not know; see `describe_fp8`. Call it before `fuse_model`. Raises ValueError on GPUs without
    fp8, and for a model that has nothing to quantise.
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
    for name, experts in find_experts(model).items():
        reason = "skipped" if _skipped(name, skip) else experts_obstacle(experts)
        if reason:
            kept[name] = reason
            continue
        if fill is not None:
            fill(name, experts)
        quantised = Fp8Experts(experts, fast_accumulation=fast_accumulation, device=_target(name, device))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantised)
    if not any(isinstance(module, Fp8Linear | Fp8Experts) for module in model.modules()):
        raise ValueError(f"no linear to quantise: {kept or 'the model has none'}")
    _kept[model] = kept
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what the old weights took
    return model


def sensitive_linears(model: nn.Module) -> tuple[str, ...]:
    """What to skip where a rounding costs most and 16 bits cost little, by names for `quantize_linears`.

    Keys and values, which every later token reads: 1.5 to 6% of the linears' weights with grouped queries. And the last
    layer's linears (not its experts, which are most of a layer that has them): no layer evens its errors out, and of a
    prompt it writes keys and values, and runs to its end for the last block alone. Together a quarter to a third of
    what rounding all linears costs (KL; docs/quality.md).
    """
    linears = (name for name, module in model.named_modules() if type(module) is nn.Linear)
    layers = {name: int(found[1]) for name in linears if (found := re.search(r"\.(\d+)\.", name))}
    last = max(layers.values(), default=0)
    return (*SENSITIVE, *(name for name, layer in layers.items() if layer == last > 0))


def _target(name: str, device: torch.device | str | Callable[[str], torch.device] | None) -> torch.device | None:
    if device is None or isinstance(device, torch.device):
        return device
    return torch.device(device) if isinstance(device, str) else device(name)


def _parameters_with_repeats(model: nn.Module) -> list[Tensor]:
    return [p for module in model.modules() for p in module._parameters.values() if p is not None]


def _memory(parameter: Tensor) -> int:
    """What parameters that share their values have in common, those without memory (meta) included."""
    return parameter.data_ptr() or id(parameter)


def _skipped(name: str, skip: Sequence[str]) -> bool:
    return name in skip or name.rpartition(".")[2] in skip


def _reason_to_keep(name: str, linear: nn.Linear, skip: Sequence[str], owners: Counter[int]) -> str:
    if _skipped(name, skip):
        return "skipped"
    if owners[_memory(linear.weight)] > 1:
        return "shares its weight"
    if linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT:
        return f"its sizes are no multiples of {ALIGNMENT}"
    return ""


def describe_fp8(model: nn.Module) -> dict[str, Any]:
    """{"linears": in fp8, "experts": modules of them in fp8, "kept": {reason: number}, "fast_accumulation": bool}."""
    linears = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    experts = [module for module in model.modules() if isinstance(module, Fp8Experts)]
    return {
        "linears": len(linears),
        "experts": len(experts),
        "kept": dict(Counter(_kept.get(model, {}).values())),
        "fast_accumulation": any(module.fast_accumulation for module in (*linears, *experts)),
    }
