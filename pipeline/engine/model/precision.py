"""One setting, and what it means for weights, activations, keys and values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernels.fp8_heads import FP8, fp8_obstacle
from pipeline.engine.config import EngineError, ModelRefusedError
from pipeline.engine.kv.arena import LayerShape
from stem_core.config import StemConfig
from stem_core.estimators import ESTIMATORS
from stem_core.fp8 import Fp8Linear, UnsupportedCheckpointError, storage
from stem_core.kv_scales import MOST_FP8_HEAD, WIDE_ERROR, Calibration

# Share of a model's layers that may be wide (stem_core.kv_scales) in fp8.
MOST_WIDE = 1 / 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """name: bf16, fp16, fp32 or fp8. dtype: of activations, and of all that is not in fp8."""

    name: str
    dtype: torch.dtype

    @property
    def fp8(self) -> bool:
        """Whether linears, attention and KV are in fp8."""
        return self.name == "fp8"

    @property
    def kv_dtype(self) -> torch.dtype:
        """The type of keys and values in the arena, those of wide layers (stem_core.kv_scales) excepted."""
        return FP8 if self.fp8 else self.dtype

    @property
    def dtype_name(self) -> str:
        """bf16, say: of what is not in fp8."""
        return _name(self.dtype)


def model_precision(model: nn.Module) -> Precision:
    """What a model was loaded in: fp8 if any of its linears is, else its embedding's dtype."""
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        return Precision("fp8", dtype)
    return Precision(_name(dtype), dtype)


def _name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def resolve_precision(asked: str, device: torch.device, hf_config: Any) -> Precision:
    """What `asked` (one of PRECISIONS) is on `device` for a checkpoint with this transformers config.

    A checkpoint in fp8 whose linears are kept as they are is in fp8 everywhere. One that is dequantised when it loads
    can be in any: "auto" quantises it again on GPUs that have fp8, if it was in fp8.
    Raises EngineError where the device has no fp8 and where a checkpoint in fp8 is asked for in another precision,
    ModelRefusedError for a quantisation that is not read.
    """
    try:
        stored = storage(hf_config)
    except UnsupportedCheckpointError as error:
        raise ModelRefusedError(str(error)) from error
    name = asked
    if asked == "auto":
        name = "fp32" if device.type == "cpu" else "bf16"
        if stored is not None and stored.fp8 and (stored.kept or (device.type != "cpu" and not fp8_obstacle(device))):
            name = "fp8"
    if name != "fp8":
        if stored is not None and stored.kept:
            raise EngineError(
                f"precision {name!r} does not go with this checkpoint, whose weights are quantised already: use fp8 "
                "(or auto), or the checkpoint in bf16 that it was made of"
            )
        return Precision(name, DTYPES[name])
    obstacle = fp8_obstacle(device)
    if obstacle:
        gpu = torch.cuda.get_device_name(device)
        raise EngineError(f"precision 'fp8' cannot run on {device} ({gpu}): {obstacle}")
    return Precision("fp8", torch.float32 if device.type == "cpu" else torch.bfloat16)


def check_fp8_attention(
    shapes: Mapping[int, LayerShape], attention: StemConfig | None, borrowing: Collection[int] = ()
) -> None:
    """Raise ModelRefusedError for layers, heads or blocks that the fp8 kernels cannot take, naming what to change.

    shapes: by layer. borrowing: layers that read the keys and values of others.
    """
    if borrowing:
        raise ModelRefusedError(
            "precision 'fp8' does not take layers that read the keys and values of others (shared KV), as layer "
            f"{min(borrowing)} of this model does: use bf16"
        )
    least = 1 if attention is None else ESTIMATORS[attention.estimator].least_fp8_head
    for layer, shape in shapes.items():
        if shape.head_dim != shape.value_dim:
            raise ModelRefusedError(
                f"precision 'fp8' needs keys and values of one size, but layer {layer} has heads of {shape.head_dim} "
                f"and {shape.value_dim}: use bf16"
            )
        if attention is not None and shape.head_dim < least:
            others = [name for name, known in ESTIMATORS.items() if known.least_fp8_head <= shape.head_dim]
            raise ModelRefusedError(
                f"precision 'fp8' takes estimator {attention.estimator!r} with heads of at least {least}, this model "
                f"has heads of {shape.head_dim}: use bf16 or estimator {' or '.join(others)}"
            )
    obstacle = "" if attention is None else attention.fp8_obstacle()
    if obstacle:
        raise ModelRefusedError(f"precision 'fp8': {obstacle}; change it or use another precision")


def check_wide_layers(calibration: Calibration, precision: Precision) -> None:
    """Raise EngineError for a model of whose layers fp8 would harm more than MOST_WIDE."""
    harmed, layers = calibration.harmed, len(calibration.scales)
    if len(harmed) > MOST_WIDE * layers:
        raise EngineError(
            f"precision 'fp8' would change the output of the attention of {len(harmed)} of this model's {layers} "
            f"layers by more than {WIDE_ERROR:.0%} (up to {max(harmed.values()):.0%}): use {precision.dtype_name}"
        )


def _named(layers: Collection[int]) -> str:
    """ "layers 0 and 1"; empty if there is none."""
    names = list(map(str, layers))
    if len(names) < 2:
        return "".join(f"layer {name}" for name in names)
    return f"layers {', '.join(names[:-1])} and {names[-1]}"


def describe_precision(precision: Precision, calibration: Calibration) -> str:
    """ "bf16", "fp8" or "fp8, layers 0 and 1 in bf16"."""
    wide = _named(calibration.wide)
    return f"{precision.name}, {wide} in {precision.dtype_name}" if wide else precision.name


def wide_notes(precision: Precision, calibration: Calibration) -> list[str]:
    """Sentences that say which layers are wide, and why; none if none is."""
    harmed = calibration.harmed
    large = [layer for layer in calibration.wide if layer not in harmed]
    notes = []
    if harmed:
        errors = " and ".join(f"{error:.0%}" for error in harmed.values())
        others = max(error for layer, error in calibration.errors.items() if layer not in harmed)
        notes.append(
            f"fp8: attention and KV of {_named(harmed)} stay in {precision.dtype_name}, since e4m3 would change the "
            f"attention's output by {errors} there (limit {WIDE_ERROR:.0%}, the largest other {others:.1%})"
        )
    if large:
        notes.append(
            f"fp8: attention and KV of {_named(large)} stay in {precision.dtype_name}, since their heads are larger "
            f"than {MOST_FP8_HEAD}, the most that the fp8 kernels hold"
        )
    return notes
