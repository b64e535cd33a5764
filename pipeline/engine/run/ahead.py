"""The kernels of a start, compiled side by side before the first of them is needed."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import nn

from kernels.ahead import compiling_ahead
from kernels.fp8_heads import HeadScales
from pipeline.engine.kv.arena import Extent
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.batch import DecodeBatch
from pipeline.engine.run.decode import DecodeRunner
from pipeline.engine.run.prefill import Prefill
from stem_core.errors import first_line
from stem_core.fp8 import Fp8Experts, is_experts_class
from stem_core.kv_scales import Calibration, recording

# Tokens of a prompt that is read without a cache, as those are that give the scales of fp8.
PROMPT_TOKENS = 512


def compile_kernels(runner: ModelRunner, chunk_tokens: int, rows: int, lookup: bool) -> None:
    """Compile the kernels of calibration, of a prefill chunk and of decode steps of up to `rows` documents, together.

    lookup: whether steps with drafts may come. What is missed compiles when it is first launched. The model runs on
    values that no kernel wrote; experts are chosen, and states kept, by such values, so models with any are left alone.
    """
    if runner.states or any(map(_holds_experts, runner.model.modules())):
        return
    try:
        with torch.inference_mode(), compiling_ahead():
            _launch(runner, chunk_tokens, rows, lookup)
    except Exception as error:  # a model that takes such values amiss
        warnings.warn(f"kernels compile one after the other: {first_line(error)}", RuntimeWarning, stacklevel=2)
    finally:
        runner.calibration = Calibration()


def _launch(runner: ModelRunner, chunk_tokens: int, rows: int, lookup: bool) -> None:
    if runner.precision.fp8:
        with recording() as peaks:
            runner.uncached(torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64, device=runner.device))
        # Any scales do.
        scales = {layer: HeadScales(*map(torch.ones_like, found)) for layer, found in peaks.items()}
        runner.calibration = Calibration(scales)
    arena = runner.new_arena(chunk_tokens, rows)
    Prefill(runner, arena, Extent(0, chunk_tokens), np.zeros(chunk_tokens, dtype=np.int64), 0, chunk_tokens).step()
    batch = DecodeBatch(rows, runner.device, runner.vocabulary)
    DecodeRunner(runner, arena, batch, chunk_tokens, use_graphs=False, lookup=lookup).launch_kernels()


def _holds_experts(module: nn.Module) -> bool:
    return isinstance(module, Fp8Experts) or is_experts_class(type(module))
