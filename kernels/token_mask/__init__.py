"""Tokens that may not come next, taken out of the logits by a mask of one bit a token."""

from kernels.token_mask.api import mask_tokens

__all__ = ["mask_tokens"]
