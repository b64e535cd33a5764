"""Prompt lookup on a GPU: captured steps with drafts, kernels in each KV precision, and no waiting on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import prompts, run, save_model
from test_engine_gpu import GENTLE, PRECISIONS
from test_engine_lookup import distinct, knowing, steps_of, tokens_of

from pipeline.engine import Engine, EngineConfig, Request, Sampling
from pipeline.engine.run.lookup import LookupPolicy
from tools.benchmark.engine.agreement import MODEL, report_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NEW = 40


@pytest.fixture(scope="module")
def gentle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gentle"), "llama", **GENTLE)


def make(folder: Path, lookup: str = "auto", **options: Any) -> Engine:
    defaults: dict[str, Any] = {"chunk_tokens": 1024, "arena_tokens": 32_768, "max_live": 8, "prompt_lookup": lookup}
    engine = Engine(EngineConfig(str(folder), device="cuda", **(defaults | options)))
    if engine._lookup is not None:
        engine._lookup = LookupPolicy(pays=0.0)  # every step verifies drafts
    return engine


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_right_and_wrong_drafts_change_nothing(gentle: Path, sampled: bool) -> None:
    """In float32, where products of other shapes hardly ever turn a choice. The oracle asks the host: no graphs."""
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=5) if sampled else Sampling()
    requests = [
        Request(str(i), prompt, NEW + 3 * i, sampling) for i, prompt in enumerate(distinct([30, 2000, 7, 127, 64]))
    ]
    options: dict[str, Any] = {"precision": "fp32", "cuda_graphs": False}
    expected = tokens_of(run(make(gentle, "off", **options), requests))
    said = {
        (int(request.prompt_ids[0]),): [*map(int, request.prompt_ids), *expected[request.request_id]]
        for request in requests
    }
    with knowing(said):
        done = run(make(gentle, **options), requests)
    same = [tokens == expected[name] for name, tokens in tokens_of(done).items()]
    assert sum(same) >= len(same) - 1
    assert steps_of(done) > 1.5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_with_graphs_and_without(precision: str) -> None:
    """The trained model quotes its reports; twice, so that steps are captured the first time and replayed."""
    requests = [Request(str(i), ids, 64) for i, ids in enumerate(report_prompts([5000, 2500, 1200]))]
    eager = tokens_of(run(make(MODEL, precision=precision, cuda_graphs=False), requests))
    engine = make(MODEL, precision=precision)
    for _ in range(2):
        done = run(engine, requests)
        assert tokens_of(done) == eager
    assert engine.describe()["decode"] == "cuda graphs"
    assert steps_of(done) > 1.2
    plain = tokens_of(run(make(MODEL, "off", precision=precision), requests))
    common = [
        next((i for i, pair in enumerate(zip(plain[name], eager[name], strict=False)) if pair[0] != pair[1]), 64)
        for name in plain
    ]
    assert max(common) >= 32, "near-ties may fall the other way, not all of them at once"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_decoding_waits_for_nothing(gentle: Path, precision: str) -> None:
    engine = make(gentle, precision=precision, decode_lag=2)
    requests = [Request(str(i), prompt, 200) for i, prompt in enumerate(prompts([2000, 900, 30]))]
    run(engine, requests)
    for request in requests:
        engine.add(request)
    while len(engine._live) < len(requests):
        engine.step()
    for _ in range(4):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine._decode.run(next(key for key in engine._decode._graphs if key.drafts and key.rows == 4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
