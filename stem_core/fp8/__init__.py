"""W8A8 linears and experts: e4m3 weights, a scale per output channel, activations quantised per token as they come."""

from stem_core.fp8.checkpoint import Storage, UnsupportedCheckpointError, prepare_quantized_config, storage
from stem_core.fp8.experts import Fp8Experts, experts_obstacle, find_experts, is_experts_class
from stem_core.fp8.linear import Fp8Linear, scaled_linear
from stem_core.fp8.model import describe_fp8, quantize_linears, sensitive_linears

__all__ = [
    "Fp8Experts",
    "Fp8Linear",
    "Storage",
    "UnsupportedCheckpointError",
    "describe_fp8",
    "experts_obstacle",
    "find_experts",
    "is_experts_class",
    "prepare_quantized_config",
    "quantize_linears",
    "scaled_linear",
    "sensitive_linears",
    "storage",
]
