"""Prompt lookup: what a decode step with drafts costs, and what it gives a trained model whose outputs quote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.engine import Engine, EngineConfig
from pipeline.engine.probes.timing import decode_step_ms
from pipeline.engine.run.batch import DRAFTS
from pipeline.engine.run.lookup import PAYS
from tools.benchmark.engine.agreement import MODEL, report_prompts
from tools.benchmark.engine.phases import random_prompts, run_documents

# Steps of a few tokens each: they must fit behind a document.
STEPS = 12


def step_costs(engine: Engine, lengths: Sequence[int], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Milliseconds of a plain decode step and of one with drafts, by length and number of documents that fit.

    cost: of the second over the first, which is how many tokens it must give a document to pay; gain: how many times
    as many tokens a second it gives where all drafts are right. What is accepted changes nothing of a step's time.
    """
    points = []
    for length in lengths:
        for documents in batches:
            plain = decode_step_ms(engine, [length] * documents, STEPS)
            drafts = decode_step_ms(engine, [length] * documents, STEPS, drafts=DRAFTS)
            if plain is not None and drafts is not None:
                points.append(
                    {
                        "prompt_tokens": length,
                        "documents": documents,
                        "plain_ms": plain,
                        "drafts_ms": drafts,
                        "cost": drafts / plain,
                        "gain": (1 + DRAFTS) * plain / drafts,
                    }
                )
    return points


def lookup(
    engine: Engine, config: EngineConfig, lengths: Sequence[int], batches: Sequence[int], new_tokens: int, vocab: int
) -> dict[str, Any]:
    """Costs of steps; the same random documents with and without lookup, as jobs run it; and the trained model's.

    engine: of `config`, without prompt lookup. Random weights quote nothing, unless they repeat themselves: the tokens
    of a step say so.
    """
    found: dict[str, Any] = {
        "drafts": DRAFTS,
        "pays_from": PAYS[config.torch_device().type],
        "steps": step_costs(engine, lengths, batches),
    }
    prompts = random_prompts([min(lengths)] * 2, vocab, seed=21)
    found["random"] = {"off": _decoded(engine, prompts, new_tokens)}
    with_lookup = Engine(replace(config, prompt_lookup="auto"), engine._runner)
    found["random"]["auto"] = _decoded(with_lookup, prompts, new_tokens)
    with_lookup.close()
    reports = report_prompts([8000, 5000, 2500, 1200])
    own = EngineConfig(str(MODEL), device=config.device, precision=config.precision, max_live=4, arena_tokens=32768)
    outputs = {}
    found["trained"] = {}
    for setting in ("off", "auto"):
        trained = Engine(replace(own, prompt_lookup=setting))
        run_documents(trained, reports[-1:], 8)
        found["trained"][setting], outputs[setting] = _measured(trained, reports, 64)
        trained.close()
    pairs = list(zip(outputs["off"], outputs["auto"], strict=True))
    parted = [first != second for first, second in pairs]
    tokens = sum(len(first) for first, _ in pairs)
    found["trained"]["outputs_that_part_per_1000_tokens"] = 1000 * sum(parted) / tokens
    return found


def _decoded(engine: Engine, prompts: Sequence[Any], new_tokens: int) -> dict[str, Any]:
    return _measured(engine, prompts, new_tokens)[0]


def _measured(engine: Engine, prompts: Sequence[Any], new_tokens: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Figures of a run of documents together, and their outputs."""
    seconds, done = run_documents(engine, list(prompts), new_tokens)
    steps = [completion.tokens_per_step for completion in done if completion.tokens_per_step is not None]
    figures = {
        "seconds": seconds,
        "decode_seconds": max(completion.decode_seconds for completion in done),
        "tokens_per_step": sum(steps) / max(1, len(steps)),
    }
    return figures, [completion.token_ids for completion in done]
