"""The selections that the engine's own prefill makes of a document, taken down as it makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from jobs.inspect.cells import Grid, LayerCells
from kernels.block_selection import BlockSelection
from pipeline.engine.config import EngineConfig
from pipeline.engine.describe import describe_kernels
from pipeline.engine.kv.arena import ALIGNMENT, Extent
from pipeline.engine.model.loading import context_limit, load_model
from pipeline.engine.model.precision import describe_precision
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.prefix import Prefix
from pipeline.engine.run.prefill import Prefill, attention_plan, chunk_size
from pipeline.errors import DocumentError, JobError
from pipeline.job.configs import make_engine_config
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.tokens import Tokens, load_tokens
from pipeline.settings.config import JobConfig
from pipeline.settings.questions import first_task
from stem_core.config import StemConfig
from stem_core.policy import LayerPolicy, cutting_window
from stem_core.selection import stem_selection

Note = Callable[[int, int, BlockSelection], None]


@dataclass(frozen=True)
class Capture:
    """What was seen. densities: of every layer, as the engine counts them. dense: layers that drop nothing, and why."""

    stem: StemConfig
    prompt: np.ndarray
    tokens: Tokens
    grid: Grid
    layers: dict[int, LayerCells]
    densities: list[float]
    density: float
    dense: dict[int, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def text(self, block: int) -> str:
        """The tokens of a block, as text."""
        size = self.grid.block_size
        return self.tokens.decode(self.prompt[block * size : (block + 1) * size].tolist())


def capture(job: JobConfig, text: str) -> Capture:
    """Prefill `text` as the job would, up to its question, with its attention, and note what every layer keeps.

    What stands behind a document, the question, is read densely by all jobs.

    Raises JobError if the model cannot run here, if the prompt does not fit its context, or runs dense.
    """
    stem = job.stem()
    if stem is None:
        raise JobError("--attention dense keeps every block; there is nothing to see")
    config = make_engine_config(job, job.device)
    runner = ModelRunner(load_model(config), stem, config.fuse)
    tokens = load_tokens(config.model, config.revision, config.trust_remote_code)
    prompt = _prompt(job, tokens, text, context_limit(runner.model.config))
    plan = attention_plan(runner, len(prompt))
    if plan.attention != "stem":
        raise JobError(
            f"this prompt of {len(prompt):,} tokens runs dense, nothing is left out: {plan.attention_reason}; take a "
            "longer document, or smaller blocks and a budget: --block-size 16 --budget 0.3 --dense-below 0"
        )
    kinds = {policy.layer: policy.budget(len(prompt), window) for policy, window in runner.layers}
    sparse = sorted(layer for layer, budget in kinds.items() if budget.budgets is not None)
    grid = Grid.of(stem, kinds[sparse[0]])
    heads = runner.model.config.get_text_config().num_attention_heads  # type: ignore[union-attr, operator]
    layers = {layer: LayerCells.of(grid, heads) for layer in sparse}
    prefill(runner, config, prompt, lambda layer, row, selection: layers[layer].add(selection, row))
    for layer, cells in layers.items():
        assert cells.rows_seen == grid.blocks, f"layer {layer}: {cells.rows_seen} of {grid.blocks} query blocks seen"
    dense = {
        policy.layer: _why_dense(policy, cutting_window(len(prompt), window))
        for policy, window in runner.layers
        if policy.layer not in sparse
    }
    return Capture(
        stem, prompt, tokens, grid, layers,
        [policy.density(len(prompt), window) for policy, window in runner.layers], plan.density,
        dense,
        {
            "kernels": describe_kernels(runner, len(prompt)),
            "precision": describe_precision(runner.precision, runner.calibration), "device": str(runner.device),
        },
    )  # fmt: skip


def prefill(runner: ModelRunner, config: EngineConfig, prompt: np.ndarray, note: Note) -> None:
    """The engine's prefill of a prompt; `note` gets layer, first query block and selection of each layer and chunk."""

    def noting(layer: int, *args: Any, **kwargs: Any) -> BlockSelection:
        selection = stem_selection(*args, **kwargs)
        note(layer, kwargs["start"] // args[3].block_size, selection)
        return selection

    chunk = chunk_size(config.chunk_tokens, config.attention)
    arena = runner.new_arena(len(prompt) + ALIGNMENT)
    # The last layer, too, runs on every chunk: its earlier rows are of interest here, and of none to the engine.
    steps = Prefill(runner, arena, Extent(0, len(prompt)), prompt, 1, chunk, every_row=True, select=noting)
    with torch.inference_mode():
        while not steps.done:
            steps.step()


def _prompt(job: JobConfig, tokens: Tokens, text: str, context: int) -> np.ndarray:
    builder = PromptBuilder(tokens, first_task(job), job.chat_template_args, job.today(), job.thinking)
    limit = min(context, job.max_context or context) - job.max_new_tokens
    try:
        read = builder.build(text, limit, truncate=job.too_long == "truncate").prefix.astype(np.int64)
        return Prefix.of(read, None, 1, states=False).ids  # the rest of it is read with the question
    except DocumentError as error:
        raise JobError(f"{error}; --too-long truncate cuts its middle") from None


def _why_dense(policy: LayerPolicy, window: int | None) -> str:
    if window is not None:
        return f"sliding window of {window:,} tokens"
    return "leading layer, dense by --dense-layers" if policy.leading else "dense"
