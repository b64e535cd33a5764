"""Loading models, dummy models, and the memory plan."""

from __future__ import annotations

import json
import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import COMMON, prompts, run, save_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from pipeline.engine import (
    Engine,
    EngineConfig,
    EngineError,
    MemoryPlan,
    ModelLoadError,
    Request,
    estimate_plan,
)
from pipeline.engine.devices import host_memory, weight_bytes
from pipeline.engine.kv.arena import Arena, LayerShape
from pipeline.engine.memory import measure as memory
from pipeline.engine.memory.measure import allocate_arena, plan_memory
from pipeline.engine.memory.plan import fit_arena
from pipeline.engine.memory.rehearsal import key_state_bytes, rehearse
from pipeline.engine.model.loading import context_limit, load_config, load_model, stop_token_ids
from pipeline.engine.model.runner import ModelRunner
from stem_core import StemConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def broken(folder: Path, target: Path, kind: str) -> str:
    if kind == "missing":
        return str(target / "nowhere")
    shutil.copytree(folder, target, dirs_exist_ok=True)
    if kind == "file":
        return str(target / "config.json")
    if kind == "no config":
        (target / "config.json").unlink()
    elif kind == "bad json":
        (target / "config.json").write_text("{")
    elif kind == "unknown type":
        (target / "config.json").write_text('{"model_type": "no_such_model"}')
    elif kind == "truncated":
        weights = target / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "no weights":
        (target / "model.safetensors").unlink()
    elif kind == "pickle only":
        (target / "model.safetensors").unlink()
        torch.save({}, target / "pytorch_model.bin")
    elif kind == "whole numbers":
        tensors = load_file(target / "model.safetensors")
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        save_file(
            tensors | {name: tensors[name].mul(127).to(torch.int8)}, target / "model.safetensors", {"format": "pt"}
        )
    elif kind == "activation":
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"hidden_act": "no_such"}))
    elif kind == "end":
        (target / "generation_config.json").write_text('{"eos_token_id": "x"}')
    return str(target)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("file", "give the folder"),
        ("no config", "no config.json"),
        ("bad json", "config.json cannot be read"),
        ("unknown type", "no_such_model"),
        ("truncated", "cannot load model"),
        ("no weights", "cannot load model"),
        ("pickle only", "30 missing"),
        ("whole numbers", r"1 of its weights are whole numbers \(I8: .*q_proj.weight\)"),
        ("activation", "its config makes no model: KeyError: 'no_such'"),
    ],
)
def test_unreadable_model_says_why(folder: Path, tmp_path: Path, kind: str, message: str) -> None:
    model = broken(folder, tmp_path, kind)
    with pytest.raises(ModelLoadError, match=message) as caught:
        Engine(EngineConfig(model, device="cpu"))
    assert model in str(caught.value)


def test_a_plan_of_a_config_that_makes_no_model_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="its config makes no model: KeyError: 'no_such'"):
        estimate_plan(EngineConfig(broken(folder, tmp_path, "activation"), device="cpu"))


def test_an_end_that_is_no_token_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"eos_token_id of the model's generation_config\.json must be a token id"):
        Engine(EngineConfig(broken(folder, tmp_path, "end"), device="cpu"))


def test_models_that_cannot_run_are_named(tmp_path: Path) -> None:
    capped = save_model(tmp_path / "gemma2", "gemma2")
    for call in (Engine, estimate_plan):
        with pytest.raises(EngineError, match=r"cannot run here: .* uses logit soft-capping"):
            call(EngineConfig(str(capped), device="cpu"))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(EngineError, match="dynamic"):
        Engine(EngineConfig(str(save_model(tmp_path / "dynamic", "llama", rope_parameters=dynamic)), device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_loading_a_whole_model_says_nothing_of_layers_that_are_not_sharded(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers.distributed.tensor_parallel")
    logger.addHandler(caplog.handler)
    try:
        load_model(EngineConfig(str(folder), device="cpu"))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_missing_gpu_is_an_error(folder: Path) -> None:
    with pytest.raises(EngineError, match="no CUDA device"):
        Engine(EngineConfig(str(folder), device="cuda"))


def test_unknown_device_is_an_error(folder: Path) -> None:
    with pytest.raises(EngineError, match="not a device of torch"):
        Engine(EngineConfig(str(folder), device="gpu"))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3_longrope"])
def test_dummy_model_has_valid_buffers(tmp_path: Path, architecture: str) -> None:
    """Rotary frequencies are computed, not stored: a dummy model must rotate as a loaded one does."""
    folder = save_model(tmp_path / "model", architecture)
    loaded = load_model(EngineConfig(str(folder), device="cpu"))
    (folder / "model.safetensors").unlink()
    dummy = load_model(EngineConfig(str(folder), device="cpu", load_format="dummy", precision="bf16"))
    buffers = {name: buffer for name, buffer in dummy.named_buffers() if "inv_freq" in name}
    assert buffers
    for name, buffer in loaded.named_buffers():
        if name not in buffers:
            continue
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, buffers[name]), name
    assert {p.dtype for p in dummy.parameters()} == {torch.bfloat16}
    assert not any(p.isnan().any() or p.is_meta for p in dummy.parameters())
    weight = dict(dummy.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    assert 0.2 < weight.float().std() < 0.4, "the config's initializer_range is 0.3"


class ScaledLinear(nn.Linear):
    """A linear with a parameter and a buffer of its own; device and dtype by position."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, False, None, None)
        self.scale = nn.Parameter(torch.full((outputs,), 2.0))
        self.register_buffer("offset", torch.full((outputs,), 0.5))


class WithSubclass(Qwen3MLP):
    """An MLP with such a linear."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.down_proj = ScaledLinear(self.intermediate_size, self.hidden_size)


class WithDerived(WithSubclass):
    """One that makes a parameter and a buffer out of a linear's weight."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shadow = nn.Parameter(torch.ones_like(self.up_proj.weight))
        self.register_buffer("mask", torch.ones_like(self.up_proj.weight, dtype=torch.bool))


@pytest.mark.parametrize("mlp", [WithSubclass, WithDerived])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_dummy_models_have_all_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, mlp: type
) -> None:
    monkeypatch.setattr(modeling_qwen3, "Qwen3MLP", mlp)
    folder = save_model(tmp_path / "model", "qwen3")
    (folder / "model.safetensors").unlink()
    config = EngineConfig(str(folder), device="cpu", load_format="dummy", precision=precision, seed=4)
    model, again = load_model(config), load_model(config)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert not [name for name, tensor in tensors.items() if tensor.is_meta]
    assert len(tensors) == len(dict([*again.named_parameters(), *again.named_buffers()]))
    for name, tensor in (*again.named_parameters(), *again.named_buffers()):
        assert torch.equal(tensor, tensors[name]), name
    custom = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(custom, ScaledLinear)
    assert custom.scale.eq(2.0).all()
    assert custom.offset.eq(0.5).all()
    assert 0.2 < custom.weight.float().std() < 0.4, "the config's initializer_range is 0.3"
    if mlp is WithDerived:
        assert tensors["model.layers.1.mlp.shadow"].eq(1.0).all()
        assert tensors["model.layers.1.mlp.mask"].all()


def test_a_dummy_model_that_asks_for_meta_itself_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnMeta(Qwen3MLP):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.extra = nn.Parameter(torch.empty(3, device="meta"))

    folder = save_model(tmp_path / "model", "qwen3")
    monkeypatch.setattr(modeling_qwen3, "Qwen3MLP", OnMeta)
    with pytest.raises(ModelLoadError, match=r"model\.layers\.0\.mlp\.extra, .* built without values"):
        load_model(EngineConfig(str(folder), device="cpu", load_format="dummy"))


def test_dummy_engine_needs_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(COMMON | {"model_type": "llama", "eos_token_id": None}))
    config = EngineConfig(str(tmp_path), device="cpu", load_format="dummy", seed=3, arena_tokens=1024)
    request = Request("a", prompts([50])[0], 8)
    tokens = run(Engine(config), [request])["a"].token_ids
    assert len(tokens) == 8
    assert run(Engine(config), [request])["a"].token_ids == tokens


def test_stop_tokens(folder: Path, tmp_path: Path) -> None:
    assert stop_token_ids(load_model(EngineConfig(str(folder), device="cpu"))) == (2,)
    several = save_model(tmp_path, "llama", eos_token_id=[7, 5])
    assert stop_token_ids(load_model(EngineConfig(str(several), device="cpu"))) == (5, 7)


def test_context_limit_counts_rope_scaling(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048}
    save_model(tmp_path, "qwen3", rope_parameters=yarn)
    assert context_limit(load_config(EngineConfig(str(tmp_path)))) == 8192


def test_estimate_agrees_with_the_engine(folder: Path) -> None:
    config = EngineConfig(str(folder), device="cpu", arena_tokens=1000)
    engine = Engine(config)
    plan, estimate = engine.plan(), estimate_plan(config)
    assert (estimate.bytes_per_token, estimate.arena_tokens, estimate.max_context) == (
        plan.bytes_per_token,
        plan.arena_tokens,
        plan.max_context,
    )
    assert plan.bytes_per_token == 3 * 2 * 16 * 2 * 4
    assert plan.arena_tokens == 1024
    assert estimate.weight_bytes == plan.weight_bytes == weight_bytes(engine._runner.model)
    assert engine._arena.nbytes == (plan.arena_tokens + 64) * plan.bytes_per_token


def test_plan_of_an_8b_model_on_80_gb(tmp_path: Path) -> None:
    """The arithmetic for the shape and card of the project's targets: three documents of 128K beside 15 GiB."""
    shape = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "max_position_embeddings": 262_144,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = EngineConfig(str(tmp_path), precision="bf16", device="cpu", load_format="dummy")
    # Sizes are asked for a GPU of 78 GiB; nothing is allocated.
    plan = estimate_plan(config, total_bytes=int(78 * 2**30 / 0.4))
    frequencies = 2 * 64 * 4  # of the rotary embedding, as they are and as the config has them
    assert plan.weight_bytes == 2 * 8_030_261_248 + frequencies
    assert plan.bytes_per_token == 131_072
    assert plan.documents(131_072 + 256) >= 3
    assert any(line.endswith("weights  14.96 GiB") for line in plan.lines())


def test_plan_counts_documents() -> None:
    plan = MemoryPlan("cuda:0", 80 << 30, 15 << 30, 2 << 30, 131_072, 400_000, 140_000, max_live=8)
    assert plan.documents(131_328) == 3
    assert plan.documents(32_768) == 8, "max_live bounds it"
    assert plan.documents(140_001) == 0
    assert plan.arena_bytes == 400_000 * 131_072


def test_arena_that_does_not_fit_is_refused_with_sizes() -> None:
    config = EngineConfig("model", arena_tokens=10_000)
    assert fit_arena(config, 2 << 30, 131_072, 1000) == 10_048
    with pytest.raises(EngineError, match=r"arena_tokens=10000 need 1\.23 GiB, but 1\.00 GiB"):
        fit_arena(config, 1 << 30, 131_072, 1000)
    with pytest.raises(EngineError, match="too little"):
        fit_arena(EngineConfig("model"), 1 << 20, 131_072, 1000)
    assert fit_arena(EngineConfig("model", max_live=2), 1 << 40, 1, 1000) == 2 * 1024, "no more than can be used"


def test_probe_sees_what_layers_cache(folder: Path) -> None:
    runner = ModelRunner(load_model(EngineConfig(str(folder), device="cpu")), None)
    assert runner.shapes == dict.fromkeys(range(3), LayerShape(kv_heads=2, head_dim=16, value_dim=16))


def test_host_memory_is_sane() -> None:
    available, total = host_memory()
    assert 0 < available <= total


@pytest.mark.parametrize(
    "wrong",
    [
        {"precision": "int8"},
        {"load_format": "pickle"},
        {"chunk_tokens": 0},
        {"max_live": 0},
        {"arena_tokens": 1},
        {"decode_lag": -1},
    ],
)
def test_config_is_validated(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EngineConfig("model", **wrong)  # type: ignore[arg-type]


def test_close_gives_the_arena_back(folder: Path) -> None:
    engine = Engine(EngineConfig(str(folder), device="cpu", arena_tokens=512))
    run(engine, [Request("a", np.array([3, 4, 5]), 2)])
    arena, weights = weakref.ref(engine._arena), weakref.ref(engine._runner.model)
    engine.close()
    assert not engine.has_work
    assert arena() is None
    assert weights() is None


@pytest.mark.parametrize("tokens", [640, 700])
def test_rehearsal_runs_the_last_chunk(folder: Path, tokens: int) -> None:
    """On a GPU it proves that the arena leaves room; what it prepares must be what the attention expects."""
    stem = StemConfig(schedule="density", density=0.4, block_size=16, stride=8, dense_layers=1)
    config = EngineConfig(str(folder), device="cpu", attention=stem, arena_tokens=704, max_context=tokens)
    runner = ModelRunner(load_model(config), stem)
    plan = plan_memory(runner, config, 128)
    arena, same = allocate_arena(runner, config, plan, 128)
    assert same == plan
    for tensor in arena.tensors():
        tensor.zero_()
    rehearse(runner, arena, plan.max_context, 128)
    # Two sparse layers of 2 KV heads: 44 (40) blocks of 8 float32 sums of 16, and 2 float32 norms.
    assert key_state_bytes(runner, tokens) == 2 * 2 * -(-tokens // 16) * (8 * 16 + 2) * 4
    assert key_state_bytes(ModelRunner(load_model(config), None), tokens) == 0


def test_arena_shrinks_until_the_rehearsal_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(str(folder), device="cpu", max_live=4)
    runner = ModelRunner(load_model(config), None)
    plan = plan_memory(runner, config, 128)
    assert plan.arena_tokens == 4 * 2048
    fits = int(0.91 * plan.arena_tokens)

    def allocate(tokens: int, documents: int) -> Arena:
        if tokens > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Arena(runner.shapes, tokens, runner.dtype, runner.layer_devices)

    monkeypatch.setattr(runner, "new_arena", allocate)
    arena, smaller = memory.allocate_arena(runner, config, plan, 128)
    assert arena.capacity == smaller.arena_tokens <= fits
    assert smaller.arena_tokens > 0.85 * plan.arena_tokens
    assert smaller.arena_bytes + smaller.reserve_bytes == plan.arena_bytes + plan.reserve_bytes
    fits = 0
    with pytest.raises(EngineError, match="do not fit"):
        memory.allocate_arena(runner, config, plan, 128)
