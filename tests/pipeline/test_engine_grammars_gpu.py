"""Outputs that follow a grammar, on a GPU: captured steps in two parts, masks behind them, nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import TINY_READER, run
from schemas import SCHEMAS, tokens
from test_engine_grammars import WARM, prompt, request

from pipeline.answers.schema import AnswerError, compile_schema
from pipeline.engine import Engine, EngineConfig, Request, Sampling
from pipeline.engine.run.lookup import LookupPolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make(**options: Any) -> Engine:
    defaults: dict[str, Any] = {"device": "cuda", "precision": "fp32", "arena_tokens": 16_384, "grammars": True}
    return Engine(EngineConfig(str(TINY_READER), **(defaults | options)))


def found(engine: Engine, asked: list[Request]) -> dict[str, list[int]]:
    done = run(engine, asked)
    assert {each.status for each in done.values()} == {"ok"}, done
    engine.close()
    torch.cuda.empty_cache()
    return {name: each.token_ids for name, each in done.items()}


def asked() -> list[Request]:
    """With a grammar and without, greedy and sampled, so that every kind of step comes."""
    held = [request(i, name, s) for i, s in ((0, WARM), (1, Sampling()), (2, WARM)) for name in SCHEMAS]
    free = [Request(f"free-{i}", prompt(i), 40, s) for i, s in ((3, WARM), (4, Sampling()), (5, Sampling()))]
    return [*held[:7], *free[:2], *held[7:], *free[2:]]


def test_captured_steps_equal_eager_ones_and_neighbours_keep_their_tokens() -> None:
    captured = make()
    assert captured.describe()["decode"] == "cuda graphs"
    outputs = found(captured, asked())
    assert outputs == found(make(cuda_graphs=False), asked())
    assert outputs == found(make(decode_lag=0), asked())
    assert outputs == found(make(decode_lag=5, max_live=3), asked())
    alone = [each for each in asked() if each.grammar is None]
    assert {name: outputs[name] for name in outputs if name.startswith("free")} == found(make(grammars=False), alone)
    for name, ids in outputs.items():
        if not name.startswith("free"):
            text = tokens().decode(list(ids))
            assert not isinstance(compile_schema(SCHEMAS[name.partition("-")[2]]).parse(text), AnswerError), text


def test_captured_steps_with_drafts_equal_eager_ones() -> None:
    """In three parts: drafts, the model, masks and tokens."""
    options: dict[str, Any] = {"prompt_lookup": "auto", "max_live": 3}
    engines = [make(**options), make(**options, cuda_graphs=False)]
    for engine in engines:
        engine._lookup = LookupPolicy(pays=0.0)  # every step verifies drafts
    captured, eager = (found(engine, asked()) for engine in engines)
    assert captured == eager
    for name, ids in captured.items():
        if not name.startswith("free"):
            text = tokens().decode(list(ids))
            assert not isinstance(compile_schema(SCHEMAS[name.partition("-")[2]]).parse(text), AnswerError), text


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_answers_in_16_bits_are_valid(precision: str) -> None:
    outputs = found(make(precision=precision, max_live=16), [request(i, name) for i in range(20) for name in SCHEMAS])
    for name, ids in outputs.items():
        text = tokens().decode(list(ids))
        assert not isinstance(compile_schema(SCHEMAS[name.partition("-")[2]]).parse(text), AnswerError), text


def test_the_models_part_is_launched_before_the_token_that_masks_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host computes masks while the device runs: forward first, then the token before, masks, sampling."""
    engine = make()
    for i in range(3):
        engine.add(request(i, "nested"))
    while engine.live < 3:
        engine.step()
    log: list[str] = []
    for owner, name in ((engine._decode, "forward"), (engine._masks, "send"), (engine._decode, "sample")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name: (log.append(name), real(*a))[1])
    pop = engine._readback.pop
    monkeypatch.setattr(engine._readback, "pop", lambda: (log.append("token"), pop())[1])
    engine.step()
    engine.step()
    assert log == ["forward", "send", "sample", "forward", "token", "send", "sample"]
    engine.close()
