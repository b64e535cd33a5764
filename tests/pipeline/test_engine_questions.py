"""Requests that share the beginning of their prompts: one reading of it, and the outputs of each request alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import generate, prompts, run, save_model

from pipeline.engine import Completion, Engine, EngineConfig, Request, SharedPrompt
from stem_core import StemConfig

NEW = 8
STEM = StemConfig(
    schedule="density", density=0.5, block_size=32, stride=8, sink_blocks=1, local_blocks=1, dense_layers=1
)
# Tails that end in a step's middle, at its end and one behind it; prefixes that do not end with a group of 16 keys.
TAILS = [5, 1, 16, 128, 129]
PREFIXES = [300, 33]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def make(folder: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"chunk_tokens": 128, "arena_tokens": 4096, "max_live": 8}
    return Engine(EngineConfig(str(folder), device="cpu", **(defaults | options)))


def shared(name: str, prefix: np.ndarray, tails: list[np.ndarray], new: int = NEW, **options: Any) -> SharedPrompt:
    return SharedPrompt(prefix, tuple(Request(f"{name}{i}", tail, new, **options) for i, tail in enumerate(tails)))


def finish(engine: Engine) -> dict[str, Completion]:
    done = {}
    while engine.has_work:
        done |= {completion.request_id: completion for completion in engine.step()}
    return done


def everything_is_free(engine: Engine) -> bool:
    states = engine._arena.states
    whole = engine._arena.extents.largest_free == engine._arena.capacity
    return whole and not engine._prefixes and (states is None or states.free == states.documents)


def alone(engine: Engine, questions: list[SharedPrompt]) -> dict[str, list[int]]:
    """Token ids of every request, each asked by itself."""
    found = {}
    for question in questions:
        for request in question.requests:
            engine.add_shared(SharedPrompt(question.prefix_ids, (request,)))
            found |= {name: done.token_ids for name, done in finish(engine).items()}
    return found


def together(engine: Engine, questions: list[SharedPrompt], others: list[Request]) -> dict[str, Completion]:
    """All at once, and other documents among them."""
    for request in others[::2]:
        engine.add(request)
    for question in questions:
        engine.add_shared(question)
    for request in others[1::2]:
        engine.add(request)
    return finish(engine)


def ask(prefixes: list[int] = PREFIXES, tails: list[int] = TAILS, **options: Any) -> list[SharedPrompt]:
    return [
        shared(f"{number}.", prefix, prompts(tails, seed=10 + number), **options)
        for number, prefix in enumerate(prompts(prefixes, seed=1))
    ]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt_oss", "qwen3_moe"])
def test_dense_is_what_transformers_says(tmp_path: Path, architecture: str) -> None:
    """Dense attention knows no difference between a prompt in two pieces and in one; windows reach over the border."""
    folder = save_model(tmp_path, architecture)
    engine = make(folder)
    questions = ask()
    done = together(engine, questions, [Request("x", prompts([150])[0], NEW)])
    for question in questions:
        for request in question.requests:
            whole = np.concatenate([question.prefix_ids, request.prompt_ids])
            assert done[request.request_id].token_ids == generate(folder, whole, NEW), request.request_id
    assert done["x"].token_ids == generate(folder, prompts([150])[0], NEW)
    assert everything_is_free(engine)


@pytest.mark.parametrize("attention", [None, STEM], ids=["dense", "stem"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_company_changes_nothing(folder: Path, attention: StemConfig | None, precision: str) -> None:
    """In chunks, with other documents, in waves of rows and of arena: the tokens of each question asked by itself."""
    options: dict[str, Any] = {"attention": attention, "precision": precision}
    questions = ask()
    expected = alone(make(folder, **options, chunk_tokens=4096), questions)
    others = [Request(f"x{i}", prompt, NEW) for i, prompt in enumerate(prompts([90, 300, 40], seed=2))]
    plain = {name: done.token_ids for name, done in run(make(folder, **options), others).items()}
    for settings in ({"max_live": 16}, {"max_live": 3, "chunk_tokens": 64}, {"arena_tokens": 640, "decode_lag": 2}):
        engine = make(folder, **(options | settings))
        done = together(engine, questions, others)
        assert {name: completion.token_ids for name, completion in done.items()} == expected | plain, settings
        assert everything_is_free(engine)


def test_prefix_is_read_once_and_paid_once(folder: Path) -> None:
    """Of what is read, everything is in somebody's figures once: tokens and seconds."""
    engine = make(folder, max_live=3, attention=STEM)
    [question] = ask(prefixes=[300])
    read: list[tuple[int, int]] = []
    prefill, behind = engine._runner.prefill, engine._runner.read_behind

    def count(ids: Any, *args: Any) -> Any:
        read.append((0, ids.shape[1]))
        return prefill(ids, *args)

    def count_behind(ids: Any, *args: Any) -> Any:
        read.append((1, ids.shape[1]))
        return behind(ids, *args)

    engine._runner.prefill, engine._runner.read_behind = count, count_behind  # type: ignore[method-assign]
    done = together(engine, [question], [])
    assert sum(tokens for kind, tokens in read if kind == 0) == 300
    assert [done[f"0.{i}"].prompt_tokens for i in range(len(TAILS))] == [300 + tail for tail in TAILS]
    paid = [completion for completion in done.values() if completion.prefix_tokens == 0]
    assert len(paid) == 1 and [c.prefix_tokens for c in done.values() if c is not paid[0]] == [300] * (len(TAILS) - 1)
    assert paid[0] is next(iter(done.values())), "the one that ends first"
    own = max(c.prefill_seconds for c in done.values() if c is not paid[0])
    assert paid[0].prefill_seconds > 0 and own < sum(c.prefill_seconds for c in done.values())
    assert all(c.attention == "stem" and c.density == paid[0].density and c.kernel for c in done.values())
    assert sum(c.prompt_tokens - c.prefix_tokens for c in done.values()) == sum(tokens for _, tokens in read)
