"""Requests that share a prefix, on a GPU: captured steps, kernels in each KV precision, and no waiting on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import prompts, save_model
from test_engine_gpu import GENTLE, PRECISIONS, STEM
from test_engine_questions import alone, everything_is_free, finish, shared, together

from pipeline.engine import Engine, EngineConfig, Request
from tools.benchmark.engine.agreement import check_agreement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NEW = 16
TAILS = [5, 1, 128, 129, 64, 17]


@pytest.fixture(scope="module")
def gentle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gentle"), "llama", **GENTLE)


def make(folder: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"chunk_tokens": 1024, "arena_tokens": 32_768, "max_live": 16}
    return Engine(EngineConfig(str(folder), device="cuda", **(defaults | options)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outputs_are_those_of_generate(precision: str) -> None:
    found = check_agreement("cuda", precision, [1200, 2500], 32, shared=True)
    assert found["ok"], found["partings"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("attention", [None, STEM], ids=["dense", "stem"])
def test_the_same_with_graphs_and_without(gentle: Path, precision: str, attention: Any) -> None:
    """Both run the same kernels on the same rows; twice, so that steps are captured the first time and replayed."""
    options: dict[str, Any] = {"precision": precision, "attention": attention}
    questions = [shared(f"{n}.", ids, prompts(TAILS, seed=n), NEW) for n, ids in enumerate(prompts([3000, 700]))]
    others = [Request("x", prompts([900], seed=5)[0], NEW)]
    eager = {n: c.token_ids for n, c in together(make(gentle, **options, cuda_graphs=False), questions, others).items()}
    engine = make(gentle, **options)
    for _ in range(2):
        done = together(engine, questions, others)
        assert {name: completion.token_ids for name, completion in done.items()} == eager
        assert everything_is_free(engine)
    assert engine.describe()["decode"] == "cuda graphs"
    assert any(key.shared for key in engine._decode._graphs)


def test_most_tokens_are_those_of_each_alone(gentle: Path) -> None:
    """Tiles of other heights and products of other shapes round otherwise: in float32 outputs hardly ever part."""
    questions = [shared(f"{n}.", ids, prompts(TAILS, seed=n), NEW) for n, ids in enumerate(prompts([3000, 700]))]
    engine = make(gentle, precision="fp32")
    expected = alone(engine, questions)
    done = together(engine, questions, [])
    same = [done[name].token_ids == tokens for name, tokens in expected.items()]
    assert sum(same) >= len(same) - 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_decoding_waits_for_nothing(gentle: Path, precision: str) -> None:
    engine = make(gentle, precision=precision, decode_lag=2)
    question = shared("", prompts([2000])[0], prompts(TAILS), 64)
    engine.add_shared(question)
    finish(engine)
    engine.add_shared(question)
    while len(engine._live) < len(TAILS):
        engine.step()
    for _ in range(4):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine._decode.run(next(key for key in engine._decode._graphs if key.shared == 8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
