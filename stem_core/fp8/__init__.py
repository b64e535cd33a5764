"""W8A8 linears: e4m3 weights with a scale per output channel, activations quantised per token as they come."""

from stem_core.fp8.checkpoint import Storage, UnsupportedCheckpointError, prepare_quantized_config, storage
from stem_core.fp8.linear import Fp8Linear, describe_fp8, quantize_linears, scaled_linear

__all__ = [
    "Fp8Linear",
    "Storage",
    "UnsupportedCheckpointError",
    "describe_fp8",
    "prepare_quantized_config",
    "quantize_linears",
    "scaled_linear",
    "storage",
]
