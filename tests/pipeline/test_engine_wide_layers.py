"""fp8 in a model whose first layer e4m3 would ruin: a few channels of its keys dwarf all others, as Qwen2's do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import TINY_READER, last_logits, prompts, run, save_model
from graph_devices import GraphDevices
from placed import Devices, chips, put
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.engine import Engine, EngineConfig, EngineError, Request, Sampling, estimate_plan
from pipeline.engine.kv.arena import ALIGNMENT, Extent, Fp8Arena, LayerShape
from pipeline.engine.model.loading import load_model, load_runner
from pipeline.engine.model.placement import connect, place
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.decode import DecodeRunner
from stem_core import StemConfig, kv_scales
from stem_core.kv_scales import HeadScales

STEM = StemConfig(
    schedule="density", density=0.5, block_size=32, stride=8, sink_blocks=1, local_blocks=2, dense_layers=0
)
SAMPLE = STEM.replace(estimator="sample", sample_rows=4)
SHAPE: dict[str, Any] = {"initializer_range": 0.05, "head_dim": 32, "eos_token_id": None}


def biased_model(folder: Path, layers: tuple[int, ...] = (0,), **changes: Any) -> Path:
    """A random Qwen2 whose key biases in `layers` are +-300 in four channels of each head.

    The first layer's attention weighs much, as it does in trained models: its output is what tokens differ in.
    """
    save_model(folder, "qwen2", **(SHAPE | changes))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"].mul_(4)
    tensors["model.layers.0.self_attn.o_proj.weight"].mul_(4)
    for layer in layers:
        tensors[f"model.layers.{layer}.self_attn.v_proj.bias"].zero_()
        bias = tensors[f"model.layers.{layer}.self_attn.k_proj.bias"].view(2, -1)
        half = bias.shape[1] // 2
        bias[:, [half // 4, half - 2, half + half // 2, 2 * half - 1]] = torch.tensor([300.0, -300.0, 300.0, 300.0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return biased_model(tmp_path_factory.mktemp("model"))


def make(folder: Path, **options: Any) -> Engine:
    defaults = {"device": "cpu", "precision": "fp8", "chunk_tokens": 128, "arena_tokens": 4096}
    return Engine(EngineConfig(str(folder), **(defaults | options)))


def error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("attention", [None, STEM], ids=["dense", "stem"])
def test_logits_are_those_of_float32_only_with_the_layer_wide(
    folder: Path, monkeypatch: pytest.MonkeyPatch, attention: StemConfig | None
) -> None:
    prompt = prompts([300])[0]
    exact = last_logits(make(folder, precision="fp32", attention=attention), prompt)
    engine = make(folder, attention=attention)
    assert list(engine._runner.calibration.wide) == [0]
    got = error(last_logits(engine, prompt), exact)
    monkeypatch.setattr(kv_scales, "WIDE_ERROR", float("inf"))
    engine = make(folder, attention=attention)
    assert not engine._runner.calibration.wide
    ruined = error(last_logits(engine, prompt), exact)
    print(got, ruined)
    assert got < 0.1
    assert ruined > 0.3


@pytest.mark.parametrize("attention", [None, STEM, SAMPLE], ids=["dense", "oam", "sample"])
def test_results_do_not_depend_on_chunks_or_neighbours(folder: Path, attention: StemConfig | None) -> None:
    texts = prompts([700, 333, 90, 1])
    results = []
    for chunk_tokens, documents in ((64, 4), (160, 4), (4096, 4), (64, 1)):
        engine = make(folder, attention=attention, chunk_tokens=chunk_tokens)
        done = run(engine, [Request(str(i), prompt, 10) for i, prompt in enumerate(texts[:documents])])
        assert {completion.status for completion in done.values()} == {"ok"}
        results.append([done[str(i)].token_ids for i in range(documents)])
    assert results[0] == results[1] == results[2]
    assert results[0][:1] == results[3]


@pytest.mark.parametrize("tokens", [127, 128, 129])
def test_decoding_continues_what_prefill_wrote(folder: Path, tokens: int) -> None:
    """One token more by prefill, or by a decode step: the wide layer's keys and values are the same."""
    text = prompts([tokens])[0]
    short, long = make(folder, decode_lag=0, prompt_lookup="off"), make(folder)
    seen: list[Tensor] = []
    logits = short._runner.logits
    short._runner.logits = lambda *args: (seen.append(logits(*args)), seen[-1])[1]  # type: ignore[method-assign]
    written = run(short, [Request("a", text, 2)])["a"].token_ids
    expected = last_logits(long, [*text.tolist(), written[0]])  # type: ignore[arg-type]
    assert error(seen[-1][:1].double(), expected) < 0.1
    for engine in (short, long):
        assert isinstance(engine._arena, Fp8Arena)
        assert (sorted(engine._arena.k), list(engine._arena.v), list(engine._arena.vt)) == ([0, 1, 2], [0], [1, 2])
    for name in ("k", "v"):
        got, wanted = (getattr(engine._arena, name)[0][:, : tokens + 1] for engine in (short, long))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_captured_steps_give_what_eager_ones_give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds on to addresses: the wide layer's arena has to stay where it was when the step was captured."""
    requests = [Request(str(i), prompt, 9) for i, prompt in enumerate(prompts([200, 60, 129]))]
    expected = run(make(folder, max_live=4), requests)
    engine = make(folder, max_live=4)
    before = [tensor.data_ptr() for tensor in engine._arena.tensors()]
    step = DecodeRunner._step
    devices = GraphDevices(monkeypatch)
    played: list[Any] = []

    class Graph:
        def capture_begin(self, *args: Any, **kwargs: Any) -> None:
            played.append(self)

        def capture_end(self) -> None:
            played.append(None)

        def replay(self) -> None:
            step(*self.call)

    def record(runner: DecodeRunner, key: Any) -> None:
        if played and played[-1] is not None:
            played[-1].call = (runner, key)
        else:
            step(runner, key)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(DecodeRunner, "_step", record)
    engine._decode = DecodeRunner(engine._runner, engine._arena, engine._batch, engine.max_context, use_graphs=True)
    engine._decode.prepare()
    done = run(engine, requests)
    assert played
    assert devices.log is not None
    assert [tensor.data_ptr() for tensor in engine._arena.tensors()] == before
    assert {key: one.token_ids for key, one in done.items()} == {key: one.token_ids for key, one in expected.items()}


def test_three_devices_give_what_one_gives(folder: Path) -> None:
    """Errors are measured, and the arena's parts lie, on each layer's device."""
    config = EngineConfig(
        str(folder), device="cpu", precision="fp8", attention=SAMPLE, chunk_tokens=64, arena_tokens=1024, max_live=3,
        fuse=False,
    )  # fmt: skip
    short, middle, long = prompts([40, 100, 150])
    sampled = Sampling(temperature=0.8, top_p=0.9, seed=3)
    requests = [Request("long", long, 3), Request("short", short, 3), Request("sampled", middle, 3, sampled)]
    expected = run(Engine(config), requests)
    model = load_model(config)
    with Devices(), torch.inference_mode():
        placement = place(model, chips(3), [1 << 30] * 3)
        put(model, placement)
        connect(model, placement)
        runner = ModelRunner(model, config.attention, fuse=False)
        assert list(runner.calibration.wide) == [0]
        assert [runner.bytes_per_token(chip) for chip in chips(3)] == [2 * 2 * 32 * 4, 2 * 2 * 32, 2 * 2 * 32]
        engine = Engine(config, runner)
        assert [part.bytes_per_token for part in engine.plan().devices] == [512, 128, 128]
        done = run(engine, requests)
    for name, completion in done.items():
        assert (completion.token_ids, completion.kernel) == (expected[name].token_ids, expected[name].kernel)


def test_memory_is_planned_by_the_layer(folder: Path) -> None:
    config = EngineConfig(str(folder), device="cpu", precision="fp8", arena_tokens=1000)
    engine = Engine(config)
    plan, estimate = engine.plan(), estimate_plan(config)
    assert plan.bytes_per_token == 2 * 2 * 32 * (4 + 1 + 1)
    assert engine._arena.nbytes == (plan.arena_tokens + ALIGNMENT) * plan.bytes_per_token
    assert estimate.bytes_per_token == 2 * 2 * 32 * 3
    assert any("those that it would harm" in line for line in estimate.lines())
    assert not any("those that it would harm" in line for line in plan.lines())


def test_wide_layers_are_named(folder: Path) -> None:
    engine = make(folder, attention=SAMPLE)
    about = engine.describe()
    assert about["precision"] == "fp8, layer 0 in fp32"
    assert about["fp8"]["wide_layers"] == [0]
    first, *others = about["fp8"]["attention_errors"]
    assert max(others) < 0.05 < kv_scales.WIDE_ERROR < first
    (note,) = about["notes"]
    assert note.startswith("fp8: attention and KV of layer 0 stay in fp32, since e4m3 would change the attention's out")
    assert f"by {first:.0%} there (limit 25%, the largest other {max(others):.1%})" in note
    kernel = run(engine, [Request("a", prompts([300])[0], 2)])["a"].kernel
    assert "prefill: fp8 reference + fp32 reference" in kernel
    assert "decode: fp8 reference + fp32 reference" in kernel
    assert json.dumps(about)


def test_heads_that_the_fp8_kernels_do_not_hold_stay_wide(tmp_path: Path) -> None:
    """Whatever their error; all layers, too."""
    engine = make(save_model(tmp_path, "qwen2", **(SHAPE | {"head_dim": 288, "num_hidden_layers": 2})))
    assert not engine._runner.calibration.harmed
    about = engine.describe()
    assert about["precision"] == "fp8, layers 0 and 1 in fp32"
    assert about["notes"] == [
        "fp8: attention and KV of layers 0 and 1 stay in fp32, since their heads are larger than 256, the most that "
        "the fp8 kernels hold"
    ]
    plan, estimate = engine.plan(), estimate_plan(engine.config)
    assert plan.bytes_per_token == estimate.bytes_per_token == 2 * 2 * 2 * 288 * 4
    assert run(engine, [Request("a", prompts([300])[0], 2)])["a"].kernel.startswith("prefill: fp32 reference, ")


def test_models_without_such_layers_are_as_they_were(tmp_path: Path) -> None:
    for folder in (TINY_READER, save_model(tmp_path, "qwen2", **SHAPE)):
        engine = make(folder)
        assert max(engine._runner.calibration.errors.values()) < 0.1
        assert not engine._runner.calibration.wide
        assert (engine.describe()["precision"], engine.describe()["notes"]) == ("fp8", [])
        assert {tensor.dtype for tensor in engine._arena.tensors()} == {torch.float8_e4m3fn}
        assert run(engine, [Request("a", prompts([300])[0], 2)])["a"].kernel.startswith("prefill: fp8 reference, ")
    assert make(folder, precision="fp32").describe()["fp8"] is None


def test_fp8_is_refused_where_it_would_harm_most_of_a_model(tmp_path: Path) -> None:
    folder = biased_model(tmp_path, layers=(0, 1))
    with pytest.raises(EngineError, match=r"attention of 2 of this model's 3 layers by more than 25%.*: use fp32"):
        load_runner(EngineConfig(str(folder), device="cpu", precision="fp8"))
    assert load_runner(EngineConfig(str(folder), device="cpu", precision="fp32")).calibration.scales == {}


def test_arena_holds_both_kinds() -> None:
    """Poisoned: neither kind writes where the other, or another document, lies."""
    shapes = {0: LayerShape(2, 16, 16), 1: LayerShape(2, 16, 16)}
    scales = {0: None, 1: HeadScales(torch.ones(4), torch.ones(2), torch.ones(2))}
    made = Fp8Arena(shapes, 256, scales, torch.bfloat16, dict.fromkeys(shapes, torch.device("cpu")))
    for tensor in made.tensors():
        tensor.view(torch.uint8).fill_(0xFF)  # NaN
    assert made.nbytes == (256 + ALIGNMENT) * (2 * 32 * 2 + 2 * 32)
    extent = Extent(64, 64)
    k, v = torch.randn(2, 1, 2, 37, 16).to(torch.bfloat16)
    for layer in shapes:
        given = made.write(layer, k, v, extent, 0)
        assert torch.equal(given[0], k)
        assert torch.equal(given[1], v)
    got, _ = made.write(0, k[:, :, :5], v[:, :, :5], extent, 37)
    assert torch.equal(got, torch.cat([k, k[:, :, :5]], dim=2)), "the document so far"
    assert list(made.quantized(extent)) == list(made.quantized()) == [1]
    token = torch.randn(2, 1, 2, 1, 16).to(torch.bfloat16)
    whole, _ = made.append(0, token[0], token[1], torch.tensor([64 + 42]))
    assert whole.shape == (1, 2, 256 + ALIGNMENT, 16)
    assert torch.equal(whole[0, :, 106], token[0, 0, :, 0])
    for tensor in (made.k[0], made.v[0], made.k[1]):
        assert bool(tensor[:, :64].isnan().all())
        assert bool(tensor[:, 128:].isnan().all())
    made.fill(Extent(0, 64))
    assert not any(made.k[layer][:, :64].float().isnan().any() for layer in shapes)
