"""What the attention mass of a few rows could be at most, by bounds of groups of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stem_core.estimators.protocol import Chunk, Estimator, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels.bound_scores import KeyBounds
    from kernels.dispatch import Choice
    from stem_core.config import StemConfig


@dataclass(frozen=True)
class BoundSettings:
    bound_group: int = setting(2, "queries for each row of the estimator bound", divides_block=True)
    """Queries for each row of the bound estimator."""
    bound_span: int = setting(16, "keys that share a bound, in the estimator bound", divides_block=True)
    """Keys that share a bound; the estimator costs 1 / (bound_group * bound_span) of dense attention's flops."""


class Bound(Estimator):
    """See kernels.bound_scores.bound_scores."""

    name = "bound"
    meaning = "the most mass that a few rows could give to each block, by bounds of groups of keys"
    shares = True
    largest_block = 128

    def cost(self, config: StemConfig) -> float:
        """Two products for each pair of a row and a span, as dense attention takes for each pair of tokens."""
        return 1 / (config.bound_group * config.bound_span)

    def choose(self, q: Tensor, config: StemConfig) -> Choice:
        from kernels.bound_scores import choose_bound_scores

        return choose_bound_scores(q)

    def new_key_state(self, config: StemConfig, k: Tensor, prompt_tokens: int, device: torch.device) -> KeyBounds:
        from kernels.bound_scores import KeyBounds

        return KeyBounds.allocate(
            k.shape[0], k.shape[1], prompt_tokens, k.shape[3],
            block_size=config.block_size, span=config.bound_span, device=device, dtype=k.dtype,
        )  # fmt: skip

    def scores(self, chunk: Chunk, config: StemConfig) -> Tensor:
        from kernels.bound_scores import KeyBounds, bound_scores

        assert chunk.keys is None or isinstance(chunk.keys, KeyBounds)
        return bound_scores(
            chunk.q,
            chunk.k,
            query_start=chunk.start,
            block_size=config.block_size,
            group=config.bound_group,
            span=config.bound_span,
            scale=chunk.scale,
            bounds=chunk.keys,
            key_start=chunk.key_start,
            impl=chunk.impl,
        )
