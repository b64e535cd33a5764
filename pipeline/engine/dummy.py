"""Models with random weights, made on the device from the config alone: speed and memory need no others.

Each linear's values come from the seed and its name. So the weights are the same in every precision, up to rounding,
and in fp8 only one of them at a time exists in 16 bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.engine.config import EngineConfig
from pipeline.engine.precision import Precision
from stem_core.fp8 import quantize_linears


def dummy_model(config: EngineConfig, hf_config: Any, precision: Precision) -> nn.Module:
    """The architecture with its own random initialisation, buffers (rotary frequencies) included."""
    from transformers import AutoModelForCausalLM

    device = config.torch_device()
    torch.manual_seed(config.seed)
    with torch.device(device), linears_on_meta():
        model: Any = AutoModelForCausalLM.from_config(
            hf_config, dtype=precision.dtype, trust_remote_code=config.trust_remote_code
        )

    def fill(name: str, linear: nn.Linear) -> None:
        linear.to_empty(device=device)
        torch.manual_seed(config.seed + zlib.crc32(name.encode()))
        model._init_weights(linear)

    if precision.fp8:
        quantize_linears(model, fast_accumulation=config.fp8_fast_accumulation, fill=fill)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module.weight.is_meta:
            fill(name, module)
    return model


@contextmanager
def linears_on_meta() -> Iterator[None]:
    """Inside, linears are built without memory, whatever the default device."""
    init = nn.Linear.__init__

    def on_meta(self: nn.Linear, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **(kwargs | {"device": "meta"}))

    nn.Linear.__init__ = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.__init__ = init  # type: ignore[method-assign]
