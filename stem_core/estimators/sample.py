"""The attention of single queries, a sample of each query block's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stem_core.estimators.protocol import Chunk, Estimator, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.dispatch import Choice
    from stem_core.config import StemConfig


@dataclass(frozen=True)
class SampleSettings:
    sample_rows: int = setting(
        16,
        "queries of each block that the estimator sample looks at",
        more="evenly spread; with blocks of 128 tokens 16 cost a 16th of dense attention's flops",
        divides_block=True,
    )


class Sample(Estimator):
    """See kernels.sample_scores.sample_scores; with keys in fp8 it reads those. Heads share the blocks of a row."""

    name = "sample"
    meaning = "the largest share of attention that any sampled query gives to each block"
    shares = True
    largest_block = 128
    least_fp8_head = 32  # tensor cores sum 32 products of fp8 at a time

    def cost(self, config: StemConfig) -> float:
        """One product for each pair of a sampled query and a key; dense attention two for each pair of tokens."""
        return config.sample_rows / (2 * config.block_size)

    def choose(self, q: Tensor, config: StemConfig) -> Choice:
        from kernels.sample_scores import choose_sample_scores

        return choose_sample_scores(q, config.block_size, config.block_size // config.sample_rows)

    def scores(self, chunk: Chunk, config: StemConfig) -> Tensor:
        from kernels.sample_scores import sample_scores

        return sample_scores(
            chunk.q,
            chunk.k if chunk.quantized is None else chunk.quantized.k[None],
            query_start=chunk.start,
            block_size=config.block_size,
            every=config.block_size // config.sample_rows,
            scale=chunk.scale,
            scales=None if chunk.quantized is None else chunk.quantized.scales,
            impl=chunk.impl,
        )

    def rule(self, config: StemConfig) -> str:
        return "heads"
