"""Causal attention over the kept key blocks with queries, keys, values and probabilities in fp8."""

from kernels.block_sparse_attention_fp8.api import (
    BLOCK_SIZES,
    block_sparse_attention_fp8,
    choose_block_sparse_attention_fp8,
)

__all__ = ["BLOCK_SIZES", "block_sparse_attention_fp8", "choose_block_sparse_attention_fp8"]
