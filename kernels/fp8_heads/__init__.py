"""What the fp8 attention operations share: static scales per head, the storage order of values, which GPUs can.

Keys are kept as rows [T, D], values transposed [D, T], because Hopper's fp8 matrix instruction wants both of its
operands contiguous along the summed dimension. Within each group of 16 keys the values are also permuted: stored
position 4t + 2j + e holds key 8j + 2t + e (j, e < 2; t < 4). The 4 probabilities that a thread of the tensor core
holds after Q K^T, keys {2t, 2t + 1, 8 + 2t, 9 + 2t}, are then the 4 that it must bring along for P V: no shuffles.

Scales are static, one for each head, from a calibration (`stem_core.kv_scales`): a power of two with headroom. No pass
for the maximum is needed, no rescaling of earlier tokens, and results do not depend on how a prompt was cut into
chunks. e4m3 is a floating format: its relative error does not depend on the scale while values stay within 2^-6 .. 448.
Relative error of attention's output by quantisation in %, for three synthetic kinds of q, k and v and for the bundled
trained model (4096 tokens, dense; `python -m tests.kernels.fp8_scales`):

                          gaussian  outlier channels       heavy tails       tiny-reader
    per token                 7.92              8.80              4.18              3.79
    per block of 128          8.13             12.33              5.54              4.24
    per token, 2^n            8.41             17.54             10.34              4.07
    per head                  7.89             17.85             10.01              4.17
    static 2^n, x1            8.41             17.54             47.87              4.07
    static 2^n, x4            8.41             17.54             13.82              4.07
    static 2^n, x8 .. x16     8.41             17.54             10.35              4.07
    static 2^n, x64           8.41             17.54             10.43              4.07
    static 2^n, x256          8.41             17.54             13.12              4.06

(xN: headroom over the largest value of another sample or document.) So range is no problem: x16 keeps what outliers
need and is far from losing small values. What scales per token gain is something else: each token's largest value
becomes 448, which e4m3 holds exactly. That counts where one channel dominates a head's scores, and is gone with powers
of two. Values past the calibrated range saturate at 448 * scale.
"""

from kernels._common.fp8 import (
    BIAS_KEYS,
    BIAS_PARTS,
    BIAS_WEIGHTS,
    FP8,
    FP8_MAX,
    KEY_GROUP,
    HeadScales,
    bias_shape,
    fp8_obstacle,
    join_bias,
)
from kernels.fp8_heads.api import append_kv, choose_fp8_heads, key_bias, quantize_heads, write_kv

__all__ = [
    "BIAS_KEYS",
    "BIAS_PARTS",
    "BIAS_WEIGHTS",
    "FP8",
    "FP8_MAX",
    "KEY_GROUP",
    "HeadScales",
    "append_kv",
    "bias_shape",
    "choose_fp8_heads",
    "fp8_obstacle",
    "join_bias",
    "key_bias",
    "quantize_heads",
    "write_kv",
]
