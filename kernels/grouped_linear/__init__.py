"""Products of fp8 rows with the weights of the expert that each of them goes to, as mixtures of experts need them."""

from kernels.grouped_linear.api import ALIGNMENT, Groups, group_rows, grouped_linear

__all__ = ["ALIGNMENT", "Groups", "group_rows", "grouped_linear"]
