"""Block-sparse causal attention in plain torch: the specification, and what runs on a CPU."""

from kernels._common.attention_reference import attend_to_blocks as block_sparse_attention

__all__ = ["block_sparse_attention"]
