"""Checkpoints whose linears are fp8 already, loaded as they are through transformers' from_pretrained.

Two layouts are common: compressed-tensors ("float-quantized": weight F8_E4M3 [N, K], weight_scale [N, 1] per channel or
[1] per tensor) and the older quant_method "fp8" of AutoFP8 (weight_scale [] per tensor). Their scales for activations,
where they have static ones, are not used: rows are scaled as they come, which fits them better.
transformers' own readers of these need extra packages or dequantise, so a quantizer of our own is registered.

Others are dequantised when they are loaded, where transformers can: quant_method "fp8" with scales for blocks of
128 x 128 (weight_scale_inv; Qwen3-*-FP8, DeepSeek), and, by the package compressed-tensors, its other formats (w4a16,
w8a8) and fp8 of models with experts, which are no linears. MXFP4 (gpt-oss's experts: blocks of 32 four-bit floats with
a power of two) is, too: left to itself, transformers would do so only where it cannot fetch kernels from the hub.
"""

from __future__ import annotations

import importlib.util
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
class Storage:
    """How a checkpoint's weights are quantised.

    name: in words. fp8: they are 8-bit floats. kept: its linears stay so; otherwise all is dequantised when it loads.
    """

    name: str
    fp8: bool
    kept: bool


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
        bare = _bare(name)
        for pattern in self.ignore:
            if pattern.startswith("re:"):
                if any(re.match(pattern[3:], known) for known in (name, bare)):
                    return False
            elif f"{bare}.".startswith(f"{_bare(pattern)}."):
                return False
        return True

    def scale_shape(self, outputs: int) -> tuple[int, ...]:
        return {"channel": (outputs, 1), "tensor": (1,), "scalar": ()}[self.scale]


def _bare(name: str) -> str:
    """A module's name without where the language model lies, which transformers 5 moved (language_model.model ->
    model.language_model): checkpoints have the names of the version that wrote them.
    """
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def read_layout(quantization: dict[str, Any]) -> Fp8Layout:
    """The layout that a config's `quantization_config` describes. Raises UnsupportedCheckpointError."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(quantization)
    if method == "fp8":
        ignore = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or ["lm_head"]
        return Fp8Layout("scalar", tuple(ignore), quantization.get("activation_scheme") == "static")
    raise UnsupportedCheckpointError(
        f"weights quantised by {method!r} are not read: use the checkpoint that these were made from (its name is "
        "often this one's without the ending), with precision fp8 to make it smaller; or one of the same model in fp8, "
        "in compressed-tensors (w4a16) or as a GGUF file"
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


def storage(hf_config: Any) -> Storage | None:
    """How the checkpoint of a transformers config is quantised; None if not. Raises UnsupportedCheckpointError."""
    quantization = _quantization(hf_config)
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method == METHOD:
        return Storage("fp8", fp8=True, kept=True)
    if method == "fp8" and quantization.get("weight_block_size") is not None:
        rows, columns = quantization["weight_block_size"]
        return Storage(f"fp8 with scales for blocks of {rows} x {columns}", fp8=True, kept=False)
    if method == "mxfp4":
        return Storage("MXFP4", fp8=False, kept=False)
    if method == "compressed-tensors":
        try:
            layout = read_layout(quantization)
        except UnsupportedCheckpointError:
            return _dequantised(quantization)
        return _dequantised(quantization) if _has_experts(hf_config, layout) else Storage("fp8", fp8=True, kept=True)
    read_layout(quantization)
    return Storage("fp8", fp8=True, kept=True)


def _dequantised(quantization: dict[str, Any]) -> Storage:
    """A compressed-tensors checkpoint that its own package dequantises."""
    kinds = {
        (weights.get("num_bits"), weights.get("type"))
        for group in (quantization.get("config_groups") or {}).values()
        if isinstance(group, dict) and (weights := group.get("weights"))
    }
    bits = " and ".join(f"{bits}-bit {kind}" for bits, kind in sorted(kinds, key=str))
    name = f"compressed-tensors ({bits or quantization.get('format')})"
    if not importlib.util.find_spec("compressed_tensors"):
        raise UnsupportedCheckpointError(
            f"weights in {name} are dequantised by the package compressed-tensors, which is not installed: pip install "
            "compressed-tensors; or use the checkpoint in bf16"
        )
    return Storage(name, fp8=kinds == {(8, "float")}, kept=False)


def _quantization(hf_config: Any) -> dict[str, Any]:
    """quantization_config as a dictionary; empty if there is none."""
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else None  # of a wrapper's text part
    found = getattr(hf_config, "quantization_config", None) or getattr(text, "quantization_config", None)
    return found if isinstance(found, dict) else {} if found is None else found.to_dict()


def _has_experts(hf_config: Any, layout: Fp8Layout) -> bool:
    """Whether the layout holds weights of experts, which transformers stacks: they are no linears then.

    Of a model some of whose experts it leaves out it is taken to leave out all; scales of others would be named as
    having no place when the weights are loaded.
    """
    text = hf_config.get_text_config()
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if not any((getattr(text, name, None) or 0) > 1 for name in counts):
        return False
    experts = [
        f"model.layers.{layer}.{block}.experts.0.{linear}"
        for layer in range(text.num_hidden_layers)
        for block, linear in (("mlp", "up_proj"), ("block_sparse_moe", "w1"), ("feed_forward", "up_proj"))
    ]
    return all(map(layout.applies_to, experts))


def prepare_quantized_config(hf_config: Any) -> bool:
    """Make a transformers config of an fp8 checkpoint load with our linears; False if it has no quantisation.

    False, too, for one that is dequantised as it loads. hf_config: changed in place; pass it to from_pretrained(...,
    config=hf_config). Raises UnsupportedCheckpointError.
    """
    stored = storage(hf_config)
    if stored is None:
        return False
    quantization = _quantization(hf_config)
    if not stored.kept:
        hf_config.quantization_config = quantization | {"dequantize": True}
        return False
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
