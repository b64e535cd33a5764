"""Causal attention over the kept key blocks only (or over all of them)."""

from kernels.block_sparse_attention.api import block_sparse_attention, choose_block_sparse_attention

__all__ = ["block_sparse_attention", "choose_block_sparse_attention"]
