"""Checkpoints whose linears are fp8 already, loaded as they are through transformers' from_pretrained.

Two layouts are common: compressed-tensors ("float-quantized": weight F8_E4M3 [N, K], weight_scale [N, 1] per channel or
[1] per tensor) and the older quant_method "fp8" of AutoFP8 (weight_scale [] per tensor). Their scales for activations,
where they have static ones, are not used: rows are scaled as they come, which fits them better.
transformers' own readers of these need extra packages or dequantise, so a quantizer of our own is registered.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kernels.quantize import FP8
from stem_core.fp8.linear import Fp8Linear

METHOD = "stemline_fp8"


class UnsupportedCheckpointError(ValueError):
    """The checkpoint's quantisation is none that Stemline reads."""


@dataclass(frozen=True)
class Fp8Layout:
    """How a checkpoint stores its fp8 linears.

    scale: "channel" (weight_scale [N, 1]), "tensor" ([1]) or "scalar" ([]).
    ignore: module names that are not quantised; "re:" marks a regular expression.
    static_activations: whether input_scale tensors are there, to be read over.
    """

    scale: str
    ignore: tuple[str, ...]
    static_activations: bool

    def applies_to(self, name: str) -> bool:
        """Whether the linear called `name` is stored in fp8."""
        for pattern in self.ignore:
            if pattern.startswith("re:"):
                if re.match(pattern[3:], name):
                    return False
            elif name == pattern or name.startswith(pattern + "."):
                return False
        return True

    def scale_shape(self, outputs: int) -> tuple[int, ...]:
        return {"channel": (outputs, 1), "tensor": (1,), "scalar": ()}[self.scale]


def read_layout(quantization: dict[str, Any]) -> Fp8Layout:
    """The layout that a config's `quantization_config` describes. Raises UnsupportedCheckpointError."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(quantization)
    if method == "fp8":
        if quantization.get("weight_block_size") is not None:
            raise UnsupportedCheckpointError(
                f"fp8 checkpoints with block scales (weight_block_size={quantization['weight_block_size']}) are not "
                "supported: use the bf16 checkpoint, or one with scales per channel or per tensor"
            )
        ignore = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or ["lm_head"]
        return Fp8Layout("scalar", tuple(ignore), quantization.get("activation_scheme") == "static")
    raise UnsupportedCheckpointError(
        f"quantisation {method!r} is not supported: use the bf16 checkpoint, or an fp8 one (compressed-tensors "
        "float-quantized, or AutoFP8)"
    )


def _compressed_tensors(quantization: dict[str, Any]) -> Fp8Layout:
    groups = list((quantization.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise UnsupportedCheckpointError(f"compressed-tensors with {len(groups)} config groups; one is supported")
    weights, activations = groups[0].get("weights") or {}, groups[0].get("input_activations") or {}
    targets = groups[0].get("targets") or []
    if weights.get("type") != "float" or weights.get("num_bits") != 8:
        raise UnsupportedCheckpointError(
            f"compressed-tensors with {weights.get('num_bits')}-bit {weights.get('type')} weights; fp8 is supported"
        )
    if weights.get("strategy") not in ("channel", "tensor") or not weights.get("symmetric", True):
        raise UnsupportedCheckpointError(
            f"compressed-tensors with weight strategy {weights.get('strategy')!r}, symmetric="
            f"{weights.get('symmetric', True)}; symmetric channel and tensor scales are supported"
        )
    if targets != ["Linear"]:
        raise UnsupportedCheckpointError(f"compressed-tensors with targets {targets}; ['Linear'] is supported")
    static = bool(activations) and not activations.get("dynamic", False)
    return Fp8Layout(weights["strategy"], tuple(quantization.get("ignore") or ()), static)


def prepare_quantized_config(hf_config: Any) -> bool:
    """Make a transformers config of an fp8 checkpoint load with our linears; False if it has no quantisation.

    hf_config: changed in place; pass it to from_pretrained(..., config=hf_config). Raises UnsupportedCheckpointError.
    """
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization is None:
        return False
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if quantization.get("quant_method") == METHOD:
        return True
    layout = read_layout(quantization)
    _register()
    hf_config.quantization_config = {"quant_method": METHOD, **asdict(layout)}
    return True


def replace_linears(model: nn.Module, layout: Fp8Layout) -> None:
    """Put empty fp8 linears where the checkpoint has them, on the device of the linears (meta while loading).

    Scales have the checkpoint's shape until `finish_linears`.
    """
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or not layout.applies_to(name):
            continue
        device = linear.weight.device
        replacement = Fp8Linear(
            torch.empty(linear.weight.shape, dtype=FP8, device=device),
            torch.empty(layout.scale_shape(linear.out_features), dtype=torch.float32, device=device),
            None if linear.bias is None else linear.bias.detach(),
        )
        if layout.static_activations:
            shape = () if layout.scale == "scalar" else (1,)
            replacement.input_scale = nn.Parameter(torch.empty(shape, device=device), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)


def finish_linears(model: nn.Module) -> None:
    """Bring the loaded scales to [1, N] and drop those of static activations."""
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            scale: Tensor = module.weight_scale.detach().float().reshape(1, -1)
            module.weight_scale = nn.Parameter(scale.expand(1, module.out_features).contiguous(), requires_grad=False)
            if hasattr(module, "input_scale"):
                del module.input_scale


@lru_cache(maxsize=1)
def _register() -> None:
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class StemlineFp8Config(QuantizationConfigMixin):
        def __init__(
            self, scale: str, ignore: tuple[str, ...], static_activations: bool, quant_method: str = METHOD, **_: Any
        ) -> None:
            self.quant_method = quant_method  # type: ignore[assignment]
            self.scale, self.ignore, self.static_activations = scale, list(ignore), static_activations

        @property
        def layout(self) -> Fp8Layout:
            return Fp8Layout(self.scale, tuple(self.ignore), self.static_activations)

    @register_quantizer(METHOD)
    class StemlineFp8Quantizer(HfQuantizer):
        requires_calibration = True

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
            replace_linears(model, self.quantization_config.layout)  # type: ignore[attr-defined]

        def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
            finish_linears(model)
            return model

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False
