"""How captured steps are handled, with CUDA's graphs played by a stand-in that runs steps eagerly."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import prompts, run, save_model

from pipeline.engine import Engine, EngineConfig, Request
from pipeline.engine.decode import DecodeRunner, StepKey

NEW = 9


class Cuda:
    """Stands in for the parts of torch.cuda that DecodeRunner uses; a graph replays the step that it captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: set[StepKey] | None = None) -> None:
        self.captured: list[StepKey] = []
        self.replayed: list[StepKey] = []
        self.capturing: Any = None
        self.failing = failing or set()
        cuda, step = self, DecodeRunner._step

        class Graph:
            key: StepKey
            runner: DecodeRunner

            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                assert not gc.isenabled()
                cuda.capturing = self

            def capture_end(self) -> None:
                cuda.capturing = None

            def replay(self) -> None:
                cuda.replayed.append(self.key)
                step(self.runner, self.key)

        def record(runner: DecodeRunner, key: StepKey) -> None:
            """A step inside of a capture does nothing but be remembered."""
            if cuda.capturing is None:
                step(runner, key)
                return
            if key in cuda.failing:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            cuda.capturing.key, cuda.capturing.runner = key, runner
            cuda.captured.append(key)

        monkeypatch.setattr(DecodeRunner, "_step", record)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "Stream", object)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        waiting = type("Current", (), {"wait_stream": lambda *_: None})
        monkeypatch.setattr(torch.cuda, "current_stream", waiting)


def captured_engine(folder: Path) -> Engine:
    engine = Engine(EngineConfig(str(folder), device="cpu", arena_tokens=4096, max_live=5, decode_lag=2))
    engine._decode = DecodeRunner(engine._runner, engine._arena, engine._batch, engine.max_context, use_graphs=True)
    engine._decode.prepare()
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def requests() -> list[Request]:
    return [Request(str(i), prompt, NEW + 6 * i) for i, prompt in enumerate(prompts([30, 200, 7]))]


def test_every_step_is_captured_once_and_replayed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(Engine(EngineConfig(str(folder), device="cpu", arena_tokens=4096)), requests())
    cuda = Cuda(monkeypatch)
    engine = captured_engine(folder)
    keys = [StepKey(rows, sampled) for sampled in (False, True) for rows in (5, 4, 2, 1)]
    assert cuda.captured == keys
    assert gc.isenabled()
    cuda.replayed.clear()
    done = run(engine, requests())
    assert cuda.captured == keys, "nothing is captured while documents wait"
    assert {key.rows for key in cuda.replayed} <= {1, 2, 4}
    assert len(cuda.replayed) >= NEW
    for name, completion in done.items():
        assert completion.token_ids == expected[name].token_ids


def test_a_step_that_cannot_be_captured_runs_eagerly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(Engine(EngineConfig(str(folder), device="cpu", arena_tokens=4096)), requests())
    cuda = Cuda(monkeypatch, failing={StepKey(4, False)})
    with pytest.warns(RuntimeWarning, match="not permitted"):
        engine = captured_engine(folder)
    assert "eager" in engine.describe()["decode"]
    assert "not permitted" in engine.describe()["decode"]
    cuda.replayed.clear()
    done = run(engine, requests())
    assert {key.rows for key in cuda.replayed} == {1, 2}, "the others still replay"
    for name, completion in done.items():
        assert completion.token_ids == expected[name].token_ids
