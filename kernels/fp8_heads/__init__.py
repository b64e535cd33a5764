"""What the fp8 attention operations share: static scales per head, the storage order of values, which GPUs can."""

from kernels._common.rows import FP8, FP8_MAX
from kernels.fp8_heads.api import (
    KEY_GROUP,
    HeadScales,
    append_kv,
    choose_fp8_heads,
    fp8_obstacle,
    quantize_heads,
    write_kv,
)

__all__ = [
    "FP8",
    "FP8_MAX",
    "KEY_GROUP",
    "HeadScales",
    "append_kv",
    "choose_fp8_heads",
    "fp8_obstacle",
    "quantize_heads",
    "write_kv",
]
