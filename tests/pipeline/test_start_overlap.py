"""What a worker does at once when it starts, and what it leaves for later."""

from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_models import prompts, run, save_model

from kernels.compile_ahead import Compiled
from pipeline.engine import Engine, EngineConfig, Request
from pipeline.engine.memory import measure, rehearsal
from pipeline.engine.model import runner as runners
from pipeline.engine.model.loading import load_model, load_runner
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.decode import DecodeRunner
from pipeline.engine.run.lookup import DRAFTS
from pipeline.workers import gpu, worker
from pipeline.workers.threads import ReadingThreads
from stem_core import StemConfig
from stem_core.kv_scales import Calibration
from tests.patience import patient

STEM = StemConfig(
    schedule="density", density=0.5, block_size=32, stride=8, sink_blocks=1, local_blocks=2, dense_layers=0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def config(folder: Path, **options: Any) -> EngineConfig:
    defaults = {"device": "cpu", "precision": "fp8", "attention": STEM, "chunk_tokens": 128, "arena_tokens": 4096}
    return EngineConfig(str(folder), **(defaults | options))


@pytest.mark.parametrize(("made", "expected"), [(1, ["kernels", "scales"]), (0, ["scales"])])
def test_kernels_compile_before_the_scales_need_them_unless_they_are_there(
    made: int, expected: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def counting() -> Any:
        count = Compiled()
        yield count
        count.made = made

    monkeypatch.setattr(runners.compile_ahead, "counting", counting)
    monkeypatch.setattr(runners, "calibrate", lambda *_, **__: events.append("scales") or Calibration())
    runner = load_runner(config(folder), compile_kernels=lambda runner: events.append("kernels"))
    assert events == expected
    assert ("kernels" in runner.laps.seconds) == bool(made)


def test_what_compiles_ahead_reaches_all_steps_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything runs here, by references, instead of compiling."""
    monkeypatch.setattr(rehearsal, "compiling_ahead", nullcontext)
    launched: list[Any] = []
    for name in ("prefill", "decode", "verify", "uncached", "read_behind"):
        real = getattr(ModelRunner, name)

        def note(self: Any, tokens: Any, *args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            launched.append((name, *tokens.shape))
            return real(self, tokens, *args, **kwargs)

        monkeypatch.setattr(ModelRunner, name, note)
    given = config(folder, max_live=5)
    runner = load_runner(given)
    found = dict(runner.calibration.scales)
    launched.clear()
    rehearsal.compile_kernels(runner, 300, 128, rows=5, lookup=True)
    steps = [step for rows in (1, 5) for step in (("decode", rows), ("verify", rows, 1 + DRAFTS))]
    prompts_read = [("prefill", 1, tokens) for tokens in (128, 12, *[32] * 4, 64)]
    tails = [("read_behind", 1, tokens) for tokens in (1, 2, 4, 8, 15, 16, 31, 32, 63, 64, 127, 128)]
    assert launched == [("uncached", 1, 512), *prompts_read, *tails, *steps]
    assert not runner.calibration.scales, "scales of ones are no calibration"
    runner.calibration = Calibration(found)
    requests = [Request(str(i), prompt, 6) for i, prompt in enumerate(prompts([300, 40]))]
    done, expected = run(Engine(given, runner), requests), run(Engine(given), requests)
    assert {key: one.token_ids for key, one in done.items()} == {key: one.token_ids for key, one in expected.items()}


def test_models_that_go_by_what_kernels_compute_compile_as_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "compiling_ahead", lambda: pytest.fail("values that nobody wrote choose experts"))
    runner = ModelRunner(load_model(EngineConfig(str(save_model(tmp_path, "qwen3_moe")), device="cpu")), None)
    rehearsal.compile_kernels(runner, 300, 128, rows=2, lookup=False)
    read: list[int] = []
    real = ModelRunner.read_behind
    monkeypatch.setattr(
        ModelRunner, "read_behind", lambda self, ids, *more: read.append(ids.shape[1]) or real(self, ids, *more)
    )
    arena = runner.new_arena(1024)
    for tensor in arena.tensors():
        tensor.zero_()
    rehearsal.rehearse(runner, arena, 300, 128)
    assert read == rehearsal.TAILS


def test_a_pass_that_fails_costs_time_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "compiling_ahead", nullcontext)
    monkeypatch.setattr(DecodeRunner, "launch_kernels", lambda self: 1 // 0)
    runner = load_runner(config(folder))
    with pytest.warns(RuntimeWarning, match="one after the other: .*division"):
        rehearsal.compile_kernels(runner, 300, 128, rows=2, lookup=False)


def test_rehearsals_of_shorter_documents_read_a_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(folder, precision="auto", max_context=700)
    runner = load_runner(given)
    plan = measure.plan_memory(runner, given, 128)
    arena = runner.new_arena(plan.arena_tokens)
    for tensor in arena.tensors():
        tensor.zero_()
    read: list[tuple[int, int]] = []
    prefill = ModelRunner.prefill

    def note(self: Any, ids: Any, arena: Any, extent: Any, context: Any, *more: Any) -> Any:
        read.append((context.start, context.start + ids.shape[1]))
        return prefill(self, ids, arena, extent, context, *more)

    monkeypatch.setattr(ModelRunner, "prefill", note)
    rehearsal.rehearse(runner, arena, plan.max_context, 128)
    assert read == [(640, 700), (0, 32), (32, 64), (96, 128), (224, 256), (480, 512)]


def test_the_gpu_opens_while_python_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()

    class ImportedError(Exception):
        pass

    def import_engine() -> None:
        assert opened.wait(patient(20)), "nobody opens the GPU before the imports are done"
        raise ImportedError

    monkeypatch.setattr(worker, "warm_up", opened.set)
    monkeypatch.setattr(worker, "_import_engine", import_engine)
    starting: Any = SimpleNamespace(
        _config=SimpleNamespace(engine=SimpleNamespace(device="cuda")), _threads=ReadingThreads()
    )
    with pytest.raises(ImportedError):
        asyncio.run(worker.Worker.load(starting))


@pytest.mark.parametrize(
    ("results", "expected"),
    [((0, 0, 0), ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]), ((100, 0, 0), ["cuInit"])],
)
def test_what_is_asked_of_the_driver(
    results: tuple[int, ...], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    answers = iter(results)

    class Driver:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: called.append(name) or next(answers)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    gpu.open_gpu()
    assert called == expected


def test_triton_reads_itself_without_torch() -> None:
    code = "import sys; from pipeline.workers.gpu import key_compiler; key_compiler()"
    code += (
        "; from triton.runtime.cache import triton_key as key; print(key.cache_info().currsize, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patient(60))
    assert done.stdout.split() == ["1", "False"], done.stderr


def test_without_a_driver_torch_is_left_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    gpu.open_gpu()
