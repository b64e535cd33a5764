"""What precision and sparsity cost in accuracy: hidden states layer by layer and logits, against dense bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine import EngineConfig
from pipeline.engine.devices import release_memory
from pipeline.engine.kv.arena import Extent
from pipeline.engine.model.loading import load_model
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.prefill import Prefill, attention_plan
from stem_core import StemConfig
from stem_core.config import BLOCK_SIZES
from tools.benchmark.engine.agreement import MODEL

DOCUMENTS = Path(__file__).parents[3] / "examples" / "documents"
QUESTION = "List the key findings in order."
# Positions whose logits are compared, spread evenly over the prompt; the last token is one of them.
POSITIONS = 128
Variant = tuple[str, str, bool, bool]  # name, precision, sparse, fast accumulation
# The reference first.
VARIANTS: tuple[Variant, ...] = (
    ("dense bf16", "bf16", False, False),
    ("stem bf16", "bf16", True, False),
    ("dense fp8", "fp8", False, False),
    ("stem fp8", "fp8", True, False),
    ("dense fp8, fast accumulation", "fp8", False, True),
    ("stem fp8, fast accumulation", "fp8", True, True),
)


@dataclass
class Trace:
    """What one run left: squared errors and squared norms by layer, and logits at the compared positions.

    hidden: by layer its outputs [L, hidden] of each chunk, kept by the reference only. last: the final norm's.
    """

    hidden: list[list[Tensor]] = field(default_factory=list)
    squares: list[list[float]] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)


def measure_errors(
    config: EngineConfig,
    prompt: np.ndarray,
    stem: StemConfig | None,
    note: Callable[[list[dict[str, Any]]], None],
    variants: Sequence[Variant] = VARIANTS,
    positions: int = POSITIONS,
) -> None:
    """Every variant on one prompt; `note` gets the list of all results so far after each. Waits for the device."""
    device = config.torch_device()
    results: list[dict[str, Any]] = []
    wanted: Trace | None = None
    wanted_logits = torch.empty(0)
    runner: ModelRunner | None = None
    loaded = None
    for name, precision, sparse, fast in variants:
        if loaded != (precision, fast):
            runner = None
            release_memory(device)
            runner = _build(replace(config, precision=precision, fp8_fast_accumulation=fast))
            loaded = precision, fast
        assert runner is not None
        runner.attend(stem if sparse else None)
        trace, density = _run(runner, prompt, config.chunk_tokens, wanted)
        logits = _logits(runner, trace, len(prompt), positions)
        if wanted is None:
            wanted, wanted_logits = trace, logits
            continue
        errors = [(error / norm) ** 0.5 for error, norm in trace.squares]
        results.append(
            {"variant": name, "density": density, "layer_errors": errors, "last_layer_error": errors[-1]}
            | _compare_logits(logits, wanted_logits)
        )
        note(results)
    del runner, wanted
    release_memory(device)


def _build(config: EngineConfig) -> ModelRunner:
    return ModelRunner(load_model(config), None, config.fuse)


@torch.inference_mode()
def _run(runner: ModelRunner, prompt: np.ndarray, chunk_tokens: int, wanted: Trace | None) -> tuple[Trace, float]:
    trace = Trace()
    arena = runner.new_arena(len(prompt) + 64)
    # The same chunks for every variant: multiples of the largest block.
    chunk = -(-chunk_tokens // max(BLOCK_SIZES)) * max(BLOCK_SIZES)
    prefill = Prefill(runner, arena, Extent(0, len(prompt)), prompt, 1, chunk, every_row=True)
    with _tracing(runner, trace, wanted):
        while not prefill.done:
            prefill.step()
    return trace, attention_plan(runner, len(prompt)).density


@contextmanager
def _tracing(runner: ModelRunner, trace: Trace, wanted: Trace | None) -> Iterator[None]:
    """Record the output of every decoder layer, or compare it with the reference's, and the final norm's."""
    decoder: Any = runner.model.get_decoder()  # type: ignore[operator]
    trace.hidden = [[] for _ in decoder.layers]
    trace.squares = [[0.0, 0.0] for _ in decoder.layers]
    chunks = [0] * len(decoder.layers)

    def of_layer(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output)[0]
            if wanted is None:
                trace.hidden[index].append(hidden.clone())
                return
            expected = wanted.hidden[index][chunks[index]].float()
            chunks[index] += 1
            trace.squares[index][0] += float((hidden.float() - expected).double().square().sum())
            trace.squares[index][1] += float(expected.double().square().sum())

        return hook

    handles = [layer.register_forward_hook(of_layer(i)) for i, layer in enumerate(decoder.layers)]
    handles.append(decoder.norm.register_forward_hook(lambda _module, _args, output: trace.last.append(output[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _logits(runner: ModelRunner, trace: Trace, tokens: int, count: int) -> Tensor:
    """float32 [positions, V]; the final norm's outputs are let go."""
    positions = torch.linspace(0, tokens - 1, min(count, tokens)).round().long()
    rows = torch.cat(trace.last)[positions.to(trace.last[0].device)]
    trace.last = []
    return runner.model.get_output_embeddings()(rows).float()  # type: ignore[operator]


def _compare_logits(logits: Tensor, wanted: Tensor) -> dict[str, Any]:
    """KL(reference || variant) in nats, how often both prefer the same token, and how much larger (below 0: smaller)
    the variant's logits are along the reference's, both about their mean."""
    log_p, log_q = wanted.log_softmax(-1), logits.log_softmax(-1)
    about = wanted - wanted.mean(-1, keepdim=True)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {
        "kl_last_token": float(divergence[-1]),
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "logit_bias": float((logits * about).sum() / about.square().sum() - 1),
        "logit_error": float((logits - wanted).norm() / wanted.norm()),
        "same_token": float((logits.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "positions": len(wanted),
    }


def real_prompt(tokens: int) -> np.ndarray:
    """An example document as a chat prompt of the bundled model, its text cut to about `tokens` tokens."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    text = (DOCUMENTS / "report-01.txt").read_text(encoding="utf-8")
    cut = tokenizer.decode(tokenizer.encode(text)[:tokens])
    message = [{"role": "user", "content": f"{cut}\n\n{QUESTION}"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    return np.asarray(ids, dtype=np.int64)
