"""What is asked of a document under an arm, in portions that share a prefill, and what came of it.

A prompt's selection depends on its own tokens and on how many blocks it has, not on what follows a row. So questions of
one document whose prompts have the same number of blocks share the prefill of the tokens that they share, up to a
block's border: exactly what chunked prefill does, and as exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from jobs.evaluate.arms import Arm
from jobs.evaluate.prompts import Prompt, Reading, TokenLookup


@dataclass
class Answer:
    """What came of one prompt or lookup.

    token_ids: the greedy answer; empty for a lookup. correct: of a lookup. log_probs: float32 [steps, V] on the host,
    of the first answer tokens, kept of the dense arm only. first_kl, answer_kl: KL(dense || arm) in nats at the first
    token and mean over the first tokens of the dense answer; None without a dense run.
    mass, needles: means over sampled rows and over needles, by layer; None where nothing was probed.
    prefill_seconds: of the document under this arm, shared by all its questions.
    """

    arm: Arm
    reading: Reading
    prompt: Prompt
    lookup: TokenLookup | None = None
    token_ids: list[int] = field(default_factory=list)
    correct: bool = False
    log_probs: Tensor | None = None
    first_kl: float | None = None
    answer_kl: float | None = None
    mass: list[float] | None = None
    document_mass: list[float] | None = None
    needles: list[float] | None = None
    prefill_seconds: float = 0.0
    answer_seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """The same for the same question under every arm."""
        what = self.prompt.question.text if self.lookup is None else f"lookup {self.lookup.second[0]}"
        return self.reading.document.name, what


@dataclass
class Entry:
    """Questions of one document that share a prefill under one arm."""

    arm: Arm
    reading: Reading
    prompts: list[Prompt]
    shared: int
    lookups: tuple[TokenLookup, ...]

    @property
    def length(self) -> int:
        """The longest prompt of the entry, in tokens."""
        return max(len(prompt.ids) for prompt in self.prompts)


def entries_of(readings: Sequence[Reading], arm: Arm) -> list[Entry]:
    """The prefills that an arm needs: one for each document and number of blocks; dense needs one a document."""
    entries = []
    for reading in readings:
        by_blocks: dict[int, list[Prompt]] = {}
        for prompt in reading.prompts:
            blocks = -(-len(prompt.ids) // arm.block_size) if arm.config is not None else 0
            by_blocks.setdefault(blocks, []).append(prompt)
        shared = reading.shared // arm.block_size * arm.block_size
        for index, prompts in enumerate(by_blocks.values()):
            entries.append(Entry(arm, reading, prompts, shared, () if index else reading.lookups))
    return entries
