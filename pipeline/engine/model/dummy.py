"""Models with random weights, made on the device from the config alone: speed and memory need no others.

The values of each linear, and of the experts of each layer, come from the seed and their name. So the weights are the
same in every precision, up to rounding, and in fp8 only one linear, or one layer's experts, exists in 16 bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.engine.config import EngineConfig
from pipeline.engine.model.placement import Placement
from pipeline.engine.model.precision import Precision
from pipeline.engine.model.text_part import model_class
from stem_core.fp8 import is_experts_class, quantize_linears, sensitive_linears


def dummy_model(
    config: EngineConfig,
    hf_config: Any,
    precision: Precision,
    placement: Placement,
) -> nn.Module:
    """The architecture with its own random initialisation, buffers (rotary frequencies) included.

    placement: where linears and layers go; what else there is goes to the first of its devices.
    Raises ValueError for a model that builds parts of itself on the device "meta".
    """
    model = _build(config, hf_config, precision, placement, lean=True)
    if _without_values(model, apart_from=_filled_later):
        # Something was made from a linear's weight, which had no values: now they are there from the beginning.
        model = _build(config, hf_config, precision, placement, lean=False)

    def fill(name: str, module: nn.Module) -> None:
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=placement.device_of(name), recurse=False)
            torch.manual_seed(config.seed + zlib.crc32(name.encode()))
            model._init_weights(module)

    if precision.fp8:
        quantize_linears(model, sensitive_linears(model), fast_accumulation=config.fp8_fast_accumulation, fill=fill)
    for name, module in list(model.named_modules()):
        if _filled_later(module):
            fill(name, module)
    missing = _without_values(model)
    if missing:
        raise ValueError(f"{', '.join(missing[:3])} are built without values (on the device meta)")
    return model


def _build(
    config: EngineConfig,
    hf_config: Any,
    precision: Precision,
    placement: Placement,
    lean: bool,
) -> Any:
    """The model as its class makes it; lean: its linears and experts without memory."""
    torch.manual_seed(config.seed)
    with ExitStack() as stack:
        stack.enter_context(placement.devices[0])
        if lean:
            stack.enter_context(linears_on_meta())
            stack.enter_context(experts_on_meta())
        stack.enter_context(layers_on_devices(placement))
        return model_class(hf_config, config.trust_remote_code).from_config(
            hf_config, dtype=precision.dtype, trust_remote_code=config.trust_remote_code
        )


@contextmanager
def layers_on_devices(placement: Placement) -> Iterator[None]:
    """Inside, the model's layers are built on their devices, one after the other, whatever the default device.

    A layer may hold more than linears (stacked experts do), and the first device has no room for that of all layers.
    """
    layer_type = placement.layer_type
    if layer_type is None:  # all of the model is on one
        yield
        return
    init, devices = layer_type.__init__, iter(placement.layer_devices)

    def on_its_device(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with next(devices, placement.devices[-1]):
            init(self, *args, **kwargs)

    layer_type.__init__ = on_its_device  # type: ignore[method-assign]
    try:
        yield
    finally:
        layer_type.__init__ = init  # type: ignore[method-assign]


def _filled_later(module: nn.Module) -> bool:
    """Whether a module is built without memory, and filled when it is its turn."""
    return type(module) is nn.Linear or is_experts_class(type(module))


def _without_values(model: nn.Module, apart_from: Callable[[nn.Module], bool] | None = None) -> list[str]:
    """Names of parameters and buffers on the device "meta", those of modules that are `apart_from` left out.

    Tied ones count wherever they are.
    """
    return [
        f"{place}.{name}"
        for place, module in model.named_modules()
        if apart_from is None or not apart_from(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and tensor.is_meta
    ]


@contextmanager
def linears_on_meta() -> Iterator[None]:
    """Inside, linears are built without memory, whatever the default device; those of subclasses are built as ever.

    A subclass may have more to it than a weight and a bias, and nobody but its constructor knows the values of that.
    """
    init = nn.Linear.__init__

    def on_meta(
        self: nn.Linear, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        init(self, in_features, out_features, bias, "meta" if type(self) is nn.Linear else device, dtype)

    nn.Linear.__init__ = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.__init__ = init  # type: ignore[method-assign]


@contextmanager
def experts_on_meta() -> Iterator[None]:
    """Inside, the weights of experts lose their memory as soon as their module takes them, before they have values."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and is_experts_class(type(self)):
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
