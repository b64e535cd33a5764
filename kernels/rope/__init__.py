"""Rotary position embedding of queries and keys in one pass (rotate-half pairing)."""

from kernels.rope.api import apply_rope

__all__ = ["apply_rope"]
