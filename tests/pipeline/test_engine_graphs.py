"""How captured steps are handled, with CUDA's graphs played by a stand-in that runs steps eagerly."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import TINY_READER, prompts, run, save_model
from graph_devices import GraphDevices
from test_engine_grammars import request

from pipeline.engine import Engine, EngineConfig, Request
from pipeline.engine.run.decode import DecodeRunner, StepKey
from pipeline.engine.run.graphs import Graphs
from pipeline.engine.run.lookup import DRAFTS

NEW = 9


class Cuda:
    """Stands in for the parts of torch.cuda that graphs use; a graph replays the step that it captured."""

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
        GraphDevices(monkeypatch)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)


def captured_engine(folder: Path, lookup: str = "off") -> Engine:
    options = {"arena_tokens": 4096, "max_live": 5, "decode_lag": 2, "prompt_lookup": lookup}
    engine = Engine(EngineConfig(str(folder), device="cpu", **options))
    parts = engine._runner, engine._arena, engine._batch, engine.max_context
    engine._decode = DecodeRunner(*parts, use_graphs=True, lookup=lookup == "auto")
    engine._decode.prepare()
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def requests() -> list[Request]:
    return [Request(str(i), prompt, NEW + 6 * i) for i, prompt in enumerate(prompts([30, 200, 7]))]


def test_steps_are_captured_when_they_come_once_and_replayed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(Engine(EngineConfig(str(folder), device="cpu", arena_tokens=4096)), requests())
    cuda = Cuda(monkeypatch)
    engine = captured_engine(folder)
    largest = [StepKey(5, True)]
    assert cuda.captured == largest, "the first token waits for no other"
    assert gc.isenabled()
    cuda.replayed.clear()
    done = run(engine, requests())
    assert set(cuda.captured) == {*largest, *(StepKey(rows, False) for rows in (4, 2, 1))}
    assert len(cuda.captured) == 4, "each once"
    assert {key.rows for key in cuda.replayed} <= {1, 2, 4}
    assert len(cuda.replayed) >= NEW
    for name, completion in done.items():
        assert completion.token_ids == expected[name].token_ids


def test_steps_with_drafts_are_captured_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(Engine(EngineConfig(str(folder), device="cpu", arena_tokens=4096)), requests())
    cuda = Cuda(monkeypatch)
    engine = captured_engine(folder, lookup="auto")
    assert cuda.captured == [StepKey(5, True), StepKey(5, False, drafts=DRAFTS)]
    cuda.replayed.clear()
    done = run(engine, requests())
    assert len(cuda.captured) == len(set(cuda.captured)), "each once"
    assert {key.drafts for key in cuda.replayed} == {0, DRAFTS}
    for name, completion in done.items():
        assert completion.token_ids == expected[name].token_ids


def test_a_step_that_cannot_be_captured_runs_eagerly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(Engine(EngineConfig(str(folder), device="cpu", arena_tokens=4096)), requests())
    cuda = Cuda(monkeypatch, failing={StepKey(4, False)})
    engine = captured_engine(folder)
    cuda.replayed.clear()
    with pytest.warns(RuntimeWarning, match="not permitted"):
        done = run(engine, requests())
    assert "eager" in engine.describe()["decode"]
    assert "not permitted" in engine.describe()["decode"]
    assert {key.rows for key in cuda.replayed} == {1, 2}, "the others still replay"
    for name, completion in done.items():
        assert completion.token_ids == expected[name].token_ids


def test_masked_steps_are_captured_in_two_parts_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside whole steps, which batches without a grammar keep. A part inside of a capture is only remembered."""

    def asked() -> list[Request]:
        held = [request(i, name) for i, name in ((0, "nested"), (1, "list"), (2, "flat"))]
        return [*held, request(4, None, new=60)]

    expected = run(Engine(EngineConfig(str(TINY_READER), device="cpu", arena_tokens=8192, grammars=True)), asked())
    cuda = Cuda(monkeypatch)
    remembered: list[tuple[Any, ...]] = []
    replayed: list[str] = []
    for name in ("_forward", "_sample"):
        real = getattr(DecodeRunner, name)

        def part(runner: DecodeRunner, key: Any, real: Any = real, name: str = name) -> None:
            if cuda.capturing is None:
                real(runner, key)
                return
            remembered.append((name, key))
            cuda.capturing.replay = lambda: (replayed.append(name), real(runner, key))

        monkeypatch.setattr(DecodeRunner, name, part)
    options: dict[str, Any] = {"decode_lag": 2, "grammars": True, "prompt_lookup": "off"}  # three parts with drafts
    engine = Engine(EngineConfig(str(TINY_READER), device="cpu", arena_tokens=8192, **options))
    masks = engine._masks
    assert masks is not None
    runner, arena, batch = engine._runner, engine._arena, engine._batch
    engine._decode = DecodeRunner(runner, arena, batch, engine.max_context, use_graphs=True, masks=masks.device)
    engine._decode.prepare()
    assert remembered == [("_forward", StepKey(8, True)), ("_sample", StepKey(8, True))]
    cuda.replayed.clear()
    replayed.clear()
    done = run(engine, asked())
    assert len(remembered) == len(set(remembered)) > 2, "each once"
    assert replayed.count("_forward") == replayed.count("_sample") > 20
    assert replayed[::2] == ["_forward"] * (len(replayed) // 2)
    for name, completion in done.items():
        assert completion.token_ids == expected[name].token_ids
    before, _ = len(replayed), cuda.replayed.clear()
    assert run(engine, [request(4, None, new=60)])["4-None"].token_ids == expected["4-None"].token_ids
    assert cuda.replayed, "a batch without a grammar runs whole steps"
    assert len(replayed) == before


def test_a_part_that_cannot_be_captured_takes_the_other_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a model's part that runs eagerly are new ones each time: a graph would read old ones."""
    decode = DecodeRunner.__new__(DecodeRunner)
    decode._graphs, eager = {("forward", StepKey(4, False)): None}, []
    monkeypatch.setattr(decode, "_sample", eager.append)
    monkeypatch.setattr(decode, "_launch", lambda *_: pytest.fail("it was to run eagerly"))
    decode.sample(StepKey(4, False))
    assert eager == [StepKey(4, False)]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> GraphDevices:
    found = GraphDevices(monkeypatch)
    found.device = "A"
    return found


def test_a_capture_holds_the_work_of_all_devices(devices: GraphDevices) -> None:
    """The second one's stream belongs to it from its begin to its end; a replay waits for both, and both for it."""
    graphs = Graphs(["A", "B"])  # type: ignore[list-item]

    def work() -> None:
        assert [devices.current[device].name for device in ("A", "B")] == ["side A", "side B"]
        assert devices.device == "A"
        devices.log.append("work")

    graph = graphs.capture(work)
    assert devices.log == [
        "begin",
        "side B waits for side A",
        "B takes from its pool",
        "work",
        "side A waits for side B",
        "B takes from anywhere",
        "end",
        "default A waits for side A",
        "default B waits for side B",
    ]
    assert [devices.current[device].name for device in ("A", "B")] == ["default A", "default B"]
    devices.log.clear()
    graphs.replay(graph)
    assert devices.log == ["default A waits for default B", "replay", "default B waits for default A"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=["memory", "interrupt"])
@pytest.mark.parametrize("spoiled", [False, True], ids=["sound", "spoiled"])
def test_a_failed_capture_tells_why_and_leaves_nothing_behind(
    devices: GraphDevices, error: BaseException, spoiled: bool
) -> None:
    """spoiled: what failed also made the capture invalid, so that to end it fails too."""
    graphs = Graphs(["A", "B"])  # type: ignore[list-item]

    def work() -> None:
        devices.device = "B"  # a part that is interrupted leaves its own GPU current
        if spoiled:
            devices.forked.add(object())  # type: ignore[arg-type]
        raise error

    with pytest.raises(type(error)) as caught:
        graphs.capture(work)
    assert caught.value is error
    assert (devices.directed, devices.device, gc.isenabled()) == (None, "A", True)
    assert [devices.current[device].name for device in ("A", "B")] == ["default A", "default B"]
    graphs.replay(graphs.capture(lambda: None))
    assert devices.log[-2] == "replay"
    assert devices.used[0] != devices.used[1], "torch drops a pool with its last graph"
