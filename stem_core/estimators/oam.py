"""Stem's Output-Aware Metric (arXiv 2603.06274): a mean over antidiagonal samples, and a term for large values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stem_core.estimators.protocol import Chunk, Estimator, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels.block_scores import KeySummary
    from kernels.dispatch import Choice
    from stem_core.config import StemConfig


@dataclass(frozen=True)
class OamSettings:
    stride: int = setting(16, "token stride of the sampled scores", divides_block=True)
    """Token stride of the antidiagonal sampling, and group length of the value term; divides block_size."""
    value_weight: float = setting(0.2, "weight of the value term", low=0.0, high=100.0)
    """Weight of the value term in the output-aware metric (lambda in the paper)."""


class Oam(Estimator):
    """See kernels.block_scores.oam_scores."""

    name = "oam"
    meaning = "Stem's output-aware metric: the mean logit of a pair of blocks, and a term for large values"

    def cost(self, config: StemConfig) -> float:
        """A pair of blocks takes `stride` products of summed rows; dense attention two for each pair of tokens."""
        return config.stride / (2 * config.block_size**2)

    def choose(self, q: Tensor, config: StemConfig) -> Choice:
        from kernels.block_scores import choose_block_scores

        return choose_block_scores(q)

    def new_key_state(self, config: StemConfig, k: Tensor, prompt_tokens: int, device: torch.device) -> KeySummary:
        from kernels.block_scores import KeySummary, key_sums_dtype

        return KeySummary.allocate(
            k.shape[0], k.shape[1], prompt_tokens, k.shape[3],
            block_size=config.block_size, stride=config.stride, device=device, dtype=key_sums_dtype(k),
        )  # fmt: skip

    def scores(self, chunk: Chunk, config: StemConfig) -> Tensor:
        from kernels.block_scores import KeySummary, oam_scores

        assert chunk.keys is None or isinstance(chunk.keys, KeySummary)
        return oam_scores(
            chunk.q,
            chunk.k,
            chunk.v,
            query_start=chunk.start,
            block_size=config.block_size,
            stride=config.stride,
            value_weight=config.value_weight,
            scale=chunk.scale,
            summary=chunk.keys,
            key_start=chunk.key_start,
            fill_above=False,
            impl=chunk.impl,
        )
