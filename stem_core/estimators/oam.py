"""Stem's Output-Aware Metric (arXiv 2603.06274): a mean over antidiagonal samples, and a term for large values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stem_core.estimators.protocol import Chunk, Estimator, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels.dispatch import Choice
    from kernels.oam_scores import KeySummary
    from stem_core.config import StemConfig


@dataclass(frozen=True)
class OamSettings:
    stride: int = setting(
        16,
        "tokens between the antidiagonal samples of the estimator oam, and in a group of its value term",
        divides_block=True,
    )
    value_weight: float = setting(
        0.2,
        "weight of the value term in the estimator oam",
        more="lambda in the paper's output-aware metric",
        low=0,
        high=100,
    )


class Oam(Estimator):
    """See kernels.oam_scores.oam_scores."""

    name = "oam"
    meaning = "Stem's output-aware metric: the mean logit of a pair of blocks, and a term for large values"

    def cost(self, config: StemConfig) -> float:
        """A pair of blocks takes `stride` products of summed rows; dense attention two for each pair of tokens."""
        return config.stride / (2 * config.block_size**2)

    def choose(self, q: Tensor, config: StemConfig) -> Choice:
        from kernels.oam_scores import choose_oam_scores

        return choose_oam_scores(q)

    def new_key_state(self, config: StemConfig, k: Tensor, prompt_tokens: int, device: torch.device) -> KeySummary:
        from kernels.oam_scores import KeySummary, key_sums_dtype

        return KeySummary.allocate(
            k.shape[0], k.shape[1], prompt_tokens, k.shape[3],
            block_size=config.block_size, stride=config.stride, device=device, dtype=key_sums_dtype(k),
        )  # fmt: skip

    def scores(self, chunk: Chunk, config: StemConfig) -> Tensor:
        from kernels.oam_scores import KeySummary, oam_scores

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
