"""The attention mass of a few rows of each query block, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stem_core.estimators.protocol import Chunk, Estimator, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.dispatch import Choice
    from stem_core.config import StemConfig


@dataclass(frozen=True)
class MassSettings:
    mass_group: int = setting(4, "queries for each row of the estimator mass", divides_block=True)
    """Queries for each row of the mass estimator; its cost is 1 / (2 * mass_group) of dense attention's flops."""
    mass_rows: str = setting(
        "mean", "a row of the estimator mass is the mean of its queries, or a sample", choices=("mean", "sample")
    )
    """A mass row is the "mean" of its queries, or a "sample": the last of them."""


class Mass(Estimator):
    """See kernels.block_scores.mass_scores; with keys in fp8 it reads those."""

    name = "mass"
    meaning = "the attention mass that a few rows give to each block"
    shares = True
    largest_block = 128
    least_fp8_head = 32  # tensor cores sum 32 products of fp8 at a time

    def cost(self, config: StemConfig) -> float:
        """One product for each pair of a row and a key; dense attention two for each pair of tokens."""
        return 1 / (2 * config.mass_group)

    def choose(self, q: Tensor, config: StemConfig) -> Choice:
        from kernels.block_scores import choose_block_scores

        return choose_block_scores(q)

    def scores(self, chunk: Chunk, config: StemConfig) -> Tensor:
        from kernels.block_scores import mass_scores

        return mass_scores(
            chunk.q,
            chunk.k if chunk.quantized is None else chunk.quantized.k[None],
            query_start=chunk.start,
            block_size=config.block_size,
            group=config.mass_group,
            rows=config.mass_rows,
            scale=chunk.scale,
            scales=None if chunk.quantized is None else chunk.quantized.scales,
            impl=chunk.impl,
        )
