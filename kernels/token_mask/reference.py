"""Masked logits in plain torch: the specification. The layout of masks is llguidance's and xgrammar's."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 32


def mask_tokens(logits: Tensor, masks: Tensor, masked: Tensor) -> None:
    """logits [S, V], masks int32 [S, W], masked int32 [S]; in place."""
    token = torch.arange(logits.shape[1], device=logits.device)
    allowed = (masks[:, token // BITS] >> (token % BITS).to(torch.int32)) & 1
    logits.masked_fill_((allowed == 0) & (masked != 0)[:, None], float("-inf"))
