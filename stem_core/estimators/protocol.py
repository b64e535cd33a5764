"""What an estimator is: how it scores key blocks, what it keeps for that, where it cannot run, what it costs.

Neither this file nor an estimator's imports torch before something is computed: a command line asks for their settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from stem_core.settings import setting

__all__ = ["Chunk", "Estimator", "KeyState", "setting"]

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels.dispatch import Choice
    from stem_core.config import StemConfig
    from stem_core.context import QuantizedKV


class KeyState(Protocol):
    """What an estimator keeps of one layer's keys between the chunks of a prompt; its sizes are the whole prompt's.

    blocks: complete blocks that it holds so far. tensors: all that was allocated.
    """

    blocks: int

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Chunk:
    """One layer's part of a prompt to score: the queries [start, start + Lq) over the keys up to their end.

    q: [N, H, Lq, D]. k, v: [N, Hkv, Lk, D], at least the tokens [0, start + Lq); with `quantized` this chunk's alone.
    start: a multiple of the block size. scale: None for 1 / sqrt(D).
    keys: of Estimator.new_key_state, holds the earlier chunks' and is extended by this one's; None for a prompt in one
        piece. quantized: the keys and values in fp8, this chunk's included; then N is 1. impl: as for the kernels.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    start: int = 0
    scale: float | None = None
    keys: KeyState | None = None
    quantized: QuantizedKV | None = None
    impl: str = "auto"

    @property
    def key_start(self) -> int:
        """First token of k and v."""
        return 0 if self.quantized is None else self.start


class Estimator(ABC):
    """One way to score key blocks; an instance of each is in stem_core.estimators.ESTIMATORS.

    name: in StemConfig.estimator. meaning: what the scores are, in a line of the docs.
    shares: scores are shares of attention in [0, 1], so that they compare across heads and rows.
    largest_block: most tokens in a block. least_fp8_head: smallest head size with keys in fp8.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    shares: ClassVar[bool] = False
    largest_block: ClassVar[int] = 256
    least_fp8_head: ClassVar[int] = 1

    def check(self, config: StemConfig) -> None:
        """Raise ValueError for a config that chooses this estimator and that it cannot serve."""
        if config.block_size > self.largest_block:
            raise ValueError(
                f"estimator {self.name!r} takes blocks of up to {self.largest_block} tokens, got "
                f"block_size={config.block_size}"
            )

    @abstractmethod
    def cost(self, config: StemConfig) -> float:
        """Flops of the scores of a long prompt, as a share of dense attention's."""

    @abstractmethod
    def choose(self, q: Tensor, config: StemConfig) -> Choice:
        """The implementation that scores queries like `q`."""

    def new_key_state(self, config: StemConfig, k: Tensor, prompt_tokens: int, device: torch.device) -> KeyState | None:
        """Room on `device` for what is kept of a whole prompt's keys; None: the keys themselves are read.

        k: [N, Hkv, any, D], of the prompt's keys' shape, type and device.
        """
        return None

    @abstractmethod
    def scores(self, chunk: Chunk, config: StemConfig) -> Tensor:
        """float32 [N, H, rows, n_keys], rows = ceil(Lq / block_size), n_keys those up to the chunk's end.

        The higher, the sooner a block is kept. Entries above the diagonal are undefined.
        """

    def rule(self, config: StemConfig) -> str:
        """Which of stem_core.selection.RULES makes kept blocks of the scores."""
        return "rows"
