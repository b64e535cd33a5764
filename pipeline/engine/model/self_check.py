"""Two short documents, read whole and alone, then in chunks and together: the model must give the same both times.
And one as jobs read it, whose last layer is run to its end for the last block alone.

And what it gives without a cache, with its own positions: some count them from another number than 0.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.kv.arena import Extent, aligned
from pipeline.engine.model.runner import ModelRunner
from stem_core.context import PrefillContext
from stem_core.patch import UnsupportedModelError
from stem_core.policy import DENSE_BLOCK_SIZE

# Model types that the tests compare with transformers' own generate, in batches and in chunks
# (tests/pipeline/test_engine_generate.py). All others are checked when they are loaded.
TESTED_TYPES = frozenset(
    {"gemma3_text", "gpt_oss", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe"}
)
# One document of two chunks, of which the second is so short that what it forgets of the first shows in the logits, and
# two documents of less than a chunk, its neighbours in turn.
LENGTHS = (DENSE_BLOCK_SIZE + 2, 70, 70)
STEPS = 3
# Largest differences of logits, as shares of their size: where the shapes of matrices differ, so that sums are rounded
# otherwise (by precision; fp8's and 16 bits' is the second), and where only the neighbour's tokens do.
ROUNDING = {"fp32": 0.01}
COARSE = 0.1
NEIGHBOUR = 0.02
# Where roundings turn over which experts a mixture takes, logits differ by more. What a rounding of the embeddings
# alone does tells by how much: differences up to twice that are no fault, up to half of the logits. Random weights take
# their experts by chance (of a Gemma 4 of the true shape, in bf16, such a rounding changes all that the logits say):
# where one changes more than half, nothing can be told of them.
CHAOS, MOST = 2.0, 0.5


def is_tested(runner: ModelRunner) -> bool:
    """Whether the model is of a tested type, and in transformers' own code."""
    model: Any = runner.model
    return model.config.model_type in TESTED_TYPES and type(model).__module__.startswith("transformers.")


@torch.inference_mode()
def self_check(runner: ModelRunner, random_weights: bool = False) -> None:
    """Raise UnsupportedModelError where logits depend on chunks, on other documents, or on who counts positions.

    random_weights: warns, and raises nothing, where roundings alone change the logits so much that nothing can be told.
    """
    trial = _Trial(runner)
    limit = ROUNDING.get(runner.precision.name, COARSE)
    alone = [trial.read_and_write([number], whole=True)[0] for number in (0, 1)]
    pair = trial.read_and_write([0, 1], whole=False)
    other = trial.read_and_write([0, 2], whole=False)[0]
    ended = trial.read_to_the_end()
    by_itself = alone[0][0] if runner.precision.fp8 else trial.uncached()

    def problem(limit: float) -> str:
        if difference(by_itself, alone[0][0]) > limit:
            return "gives other logits with a cache and positions counted from 0 than by itself"
        if any(difference(got[0], expected[0]) > limit for got, expected in zip(pair, alone, strict=True)):
            return f"gives other logits for a prompt that is read in chunks than for the whole: {_cause(runner)}"
        if difference(ended, alone[0][0]) > limit:
            return "gives other logits where its last layer is run to its end for a prompt's last block alone"
        if _usual(pair[0], other) > NEIGHBOUR or any(_usual(*both) > limit for both in zip(pair, alone, strict=True)):
            return f"gives other logits for documents together than for each alone: {_cause(runner)}"
        return ""

    if problem(limit):
        chaos = max(difference(trial.rounded(seed), alone[0][0]) for seed in range(STEPS))
        limit = max(limit, min(MOST, CHAOS * chaos))
        if random_weights and chaos > MOST:
            told = f"with these random weights roundings alone change its logits by {chaos:.0%}"
            warnings.warn(f"the model's arithmetic was not checked: {told}", RuntimeWarning, stacklevel=2)
            return
    if found := problem(limit):
        model: Any = runner.model
        name = f"{type(model).__name__} (model type {model.config.model_type})"
        raise UnsupportedModelError(f"{name} {found}; use another model")


def _cause(runner: ModelRunner) -> str:
    if runner.states:
        return "its recurrent layers, as transformers computes them, do not go on from the state of an earlier chunk"
    return "it keeps more of a document than keys and values"


def _usual(got: list[Tensor], expected: list[Tensor]) -> float:
    """The median over tokens: a mixture of experts may take another expert for one of them where two are as good."""
    return float(np.median([difference(*both) for both in zip(got[1:], expected[1:], strict=True)]))


def difference(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference of logits, as a share of the norm of the expected ones about their mean."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / (expected - expected.mean()).norm())


class _Trial:
    """The documents, whose outputs are given, too, in an arena of their own."""

    def __init__(self, runner: ModelRunner) -> None:
        generator = np.random.default_rng(0)
        # Ordinary tokens: special ones stand at either end of a vocabulary.
        low, high = runner.vocabulary // 8, max(runner.vocabulary // 2, 2)
        ids = [generator.integers(low, high, size=length + STEPS) for length in LENGTHS]
        self._runner = runner
        self._ids = [torch.as_tensor(row, device=runner.device) for row in ids]
        size = aligned(LENGTHS[0] + STEPS)
        self._extents = [Extent(0, size), Extent(size, size), Extent(size, size)]
        self._arena = runner.new_arena(2 * size, documents=2)

    def read_and_write(self, numbers: list[int], whole: bool) -> list[list[Tensor]]:
        """Logits [V] of each document behind its prompt, read whole or in chunks, and behind each token of its output.

        numbers: of the documents, which are read one after the other and write together.
        """
        logits = [[self._prefill(n, LENGTHS[n] if whole else DENSE_BLOCK_SIZE)] for n in numbers]
        for step in range(STEPS):
            for row, found in zip(self._decode(numbers, step), logits, strict=True):
                found.append(row)
        return logits

    def rounded(self, seed: int) -> Tensor:
        """As the first logits of the first document, read whole, of embeddings of which half are off by a rounding."""
        generator = torch.Generator().manual_seed(seed)

        def off(module: Any, inputs: Any, out: Tensor) -> Tensor:
            coins = torch.randint(0, 2, out.shape, generator=generator).to(out)
            return out * (1 + torch.finfo(out.dtype).eps * coins)

        hook = self._runner.model.get_input_embeddings().register_forward_hook(off)  # type: ignore[operator]
        try:
            return self._prefill(0, LENGTHS[0])
        finally:
            hook.remove()

    def read_to_the_end(self) -> Tensor:
        """As the first logits of the first document, read whole, but as a job reads it (last_layer.py)."""
        return self._prefill(0, LENGTHS[0], self._runner.last_layer)

    def uncached(self) -> Tensor:
        """Logits [V] behind the first document's prompt, without a cache."""
        return self._runner.uncached(self._ids[0][None, : LENGTHS[0]])[0]

    def _prefill(self, number: int, chunk: int, last_layer: int | None = None) -> Tensor:
        extent, length = self._extents[number], LENGTHS[number]
        context = PrefillContext(
            prompt_length=length, quantized=self._arena.quantized(extent), last_layer=last_layer, dense=True
        )
        for start in range(0, length, chunk):
            context.start, end = start, min(start + chunk, length)
            logits = self._runner.prefill(
                self._ids[number][None, start:end], self._arena, extent, context, self._bounds(1)
            )
        return logits[0]

    def _decode(self, numbers: list[int], step: int) -> Tensor:
        """[documents, V] behind token number `step` of the outputs."""
        device = self._runner.device
        lengths = torch.tensor([LENGTHS[n] + step + 1 for n in numbers], device=device)
        starts = torch.tensor([self._extents[n].start for n in numbers], device=device)
        tokens = torch.stack([self._ids[n][LENGTHS[n] + step] for n in numbers])
        bounds = self._bounds(len(numbers))
        return self._runner.decode(tokens, starts, lengths, bounds, self._arena, max_length=LENGTHS[0] + STEPS)

    def _bounds(self, rows: int) -> Tensor:
        return torch.full((rows,), LENGTHS[0] + STEPS, device=self._runner.device)
