"""Products of a few fp8 rows with a large fp8 weight, as decode steps need them: bound by reading the weight."""

from kernels.skinny_linear.api import MAX_ROWS, skinny_linear

__all__ = ["MAX_ROWS", "skinny_linear"]
