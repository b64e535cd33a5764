"""Products of fp8 rows with their experts' weights in plain torch: the specification.

Source: the experts of transformers' mixtures (`integrations/moe.py`), their products as those of
`stem_core.fp8.scaled_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.rows import QuantizedRows, scaled_product
from kernels.grouped_linear.api import Groups


def grouped_linear(
    weight: Tensor,
    scale: Tensor,
    rows: QuantizedRows,
    groups: Groups,
    bias: Tensor | None,
    factors: Tensor | None,
    fast_accumulation: bool,
) -> Tensor:
    """See kernels.grouped_linear.grouped_linear; sums are in float32 whatever `fast_accumulation` says."""
    ids = groups.ids
    repeat = len(ids) // max(1, len(rows.values))
    out = torch.empty(len(ids), weight.shape[1], dtype=rows.dtype, device=weight.device)
    for expert in range(groups.experts):
        mine = (ids == expert).nonzero()[:, 0]
        source = mine // max(1, repeat)
        own = QuantizedRows(rows.values[source], rows.scales[source], rows.dtype)
        y = scaled_product(own, weight[expert], scale[expert])
        y = y if bias is None else y + bias[expert].float()
        y = y if factors is None else y * factors[mine, None].float()
        out[mine] = y.to(out.dtype)
    return out
