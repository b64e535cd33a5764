"""Prompt lookup: what a decode step with drafts costs, and what it gives a trained model whose outputs quote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.engine import Engine, EngineConfig
from pipeline.engine.probes.timing import decode_step_ms
from pipeline.engine.run.lookup import DRAFTS, PAYS, LookupPolicy
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
    engine: Engine, lengths: Sequence[int], batches: Sequence[int], new_tokens: int, vocab: int
) -> dict[str, Any]:
    """Costs of steps, and the same random documents without and with lookup, by the policy that jobs have.

    Random weights quote nothing, unless they repeat themselves: the tokens of a step say so.
    """
    pays = PAYS["cuda" if engine.describe()["device"].startswith("cuda") else "cpu"]
    found: dict[str, Any] = {"drafts": DRAFTS, "pays_from": pays, "steps": step_costs(engine, lengths, batches)}
    prompts = random_prompts([min(lengths)] * min(2, max(batches)), vocab, seed=21)
    own = engine._lookup
    try:
        found["random"] = {}
        for setting, policy in (("off", None), ("auto", LookupPolicy(pays))):
            engine._lookup = policy
            run_documents(
                engine, random_prompts([min(lengths) // 2] * len(prompts), vocab, seed=22), 4
            )  # steps are captured
            found["random"][setting], _ = _measured(engine, prompts, new_tokens)
    finally:
        engine._lookup = own
    return found


def lookup_of_trained(device: str, precision: str) -> dict[str, Any]:
    """The trained model on reports of its kind, without and with lookup, and how often outputs part."""
    reports = report_prompts([8000, 5000, 2500, 1200])
    config = EngineConfig(str(MODEL), device=device, precision=precision, max_live=4, arena_tokens=32768)
    found: dict[str, Any] = {}
    outputs = {}
    for setting in ("off", "auto"):
        engine = Engine(replace(config, prompt_lookup=setting))
        run_documents(engine, reports, 8)
        found[setting], outputs[setting] = _measured(engine, reports, 64)
        engine.close()
    pairs = list(zip(outputs["off"], outputs["auto"], strict=True))
    parted = sum(first != second for first, second in pairs)
    found["outputs_that_part_per_1000_tokens"] = 1000 * parted / sum(len(first) for first, _ in pairs)
    return found


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
