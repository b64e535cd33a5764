"""A model spread over devices gives what it gives on one, and no tensor is used where it is not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_models import prompts, run, save_model
from placed import Devices, chips, put
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.engine import Completion, Engine, EngineConfig, EngineError, Request, Sampling
from pipeline.engine.kv.arena import Extent
from pipeline.engine.model import dummy
from pipeline.engine.model.dummy import layers_on_devices
from pipeline.engine.model.loading import load_config, load_model, load_runner
from pipeline.engine.model.meta_model import meta_model
from pipeline.engine.model.placement import Placement, balance, connect, place, whole
from pipeline.engine.model.precision import Precision, resolve_precision
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.batch import DecodeBatch
from pipeline.engine.run.decode import DecodeRunner, StepKey
from pipeline.engine.run.prefill import Prefill
from stem_core import StemConfig
from stem_core.context import PromptGoesOn

CPU = torch.device("cpu")
SPARSE = {"schedule": "density", "density": 0.6, "dense_layers": 1, "sink_blocks": 1, "local_blocks": 1}
STEM = StemConfig(block_size=64, stride=4, dense_below=48, **SPARSE)
SAMPLE = StemConfig(block_size=64, stride=4, dense_below=48, estimator="sample", **SPARSE)
FIGURES = ("token_ids", "status", "error", "finish_reason", "attention", "density", "kernel")


def config_of(folder: Path, **changes: Any) -> EngineConfig:
    settings: dict[str, Any] = {"device": "cpu", "chunk_tokens": 64, "arena_tokens": 1024, "max_live": 3, "fuse": False}
    return EngineConfig(str(folder), **(settings | changes))


def requests() -> list[Request]:
    """Prompts of one to three chunks that decode together, one of them sampled."""
    short, middle, long = prompts([40, 100, 150])
    sampled = Sampling(temperature=0.8, top_p=0.9, seed=3)
    return [Request("long", long, 3), Request("short", short, 3), Request("sampled", middle, 3, sampled)]


def figures(done: dict[str, Completion]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(getattr(completion, key) for key in FIGURES) for name, completion in done.items()}


def spread(model: nn.Module, count: int) -> tuple[nn.Module, Placement]:
    """The model on `count` chips; call it inside Devices."""
    placement = place(model, chips(count), [1 << 30] * count)
    put(model, placement)
    connect(model, placement)
    return model, placement


@pytest.mark.parametrize("architecture", ["gemma3", "phi3_longrope"])
def test_three_devices_give_what_one_gives(architecture: str, tmp_path: Path) -> None:
    """Sliding windows, tied weights, rotary embeddings per document; prefill in chunks, decoding in company."""
    config = config_of(save_model(tmp_path, architecture), precision="fp32", attention=STEM)
    expected = figures(run(Engine(config), requests()))
    model = load_model(config)
    with Devices(), torch.inference_mode():
        model, placement = spread(model, 3)
        runner = ModelRunner(model, config.attention, fuse=False)
        assert runner.devices == tuple(chips(3)) == placement.devices
        assert list(runner.layer_devices.values()) == chips(3)
        engine = Engine(config, runner)
        assert {tensor.device for tensor in engine._arena.tensors()} == set(chips(3))
        assert engine._batch.ints.device == chips(1)[0]
        assert engine.describe()["decode"] == "eager"
        assert engine.describe()["device"] == "meta:0, meta:1, meta:2"
        assert figures(run(engine, requests())) == expected
    assert {status for _, status, *_ in expected.values()} == {"ok"}


def test_fp8_on_three_devices(tmp_path: Path) -> None:
    """Scales, the arena in fp8 and scores by fp8 keys, each on its layer's device."""
    config = config_of(save_model(tmp_path, "llama", head_dim=32), precision="fp8", attention=SAMPLE)
    expected = figures(run(Engine(config), requests()))
    model = load_model(config)
    with Devices(), torch.inference_mode():
        runner = ModelRunner(spread(model, 3)[0], config.attention, fuse=False)
        assert [scales.k.device for scales in runner.calibration.scales.values()] == chips(3)
        assert figures(run(Engine(config, runner), requests())) == expected


def hand_overs(runner: ModelRunner, config: EngineConfig) -> tuple[dict[tuple[int, int], int], ...]:
    """Copies between chips in a chunk that the prompt goes on behind, in a last chunk, and in a decode step."""
    arena = runner.new_arena(512)
    prefill = Prefill(runner, arena, Extent(0, 128), prompts([100])[0], 8, 64)
    batch = DecodeBatch(2, runner.device, runner.vocabulary)
    decode = DecodeRunner(runner, arena, batch, 512, use_graphs=False)
    found = []
    for step in (prefill.step, prefill.step, lambda: decode.run(StepKey(2, sampled=False))):
        Devices.copies.clear()
        step()
        found.append(dict(Devices.copies))
    assert prefill.done
    return tuple(found)


def test_tensors_are_handed_to_the_neighbour_once(tmp_path: Path) -> None:
    """Not once for every layer; and never past a device, whose work the first one would wait for."""
    config = config_of(save_model(tmp_path, "llama", num_hidden_layers=6), precision="fp32")
    model = load_model(config)
    with Devices(), torch.inference_mode():
        chunk, last, decode = hand_overs(ModelRunner(spread(model, 3)[0], None, fuse=False), config)
    # Hidden states, cosines and sines, positions.
    assert chunk == {(0, 1): 4, (1, 2): 4}, "a chunk that the prompt goes on behind ends in its last layer"
    assert last == chunk | {(2, 0): 1}, "one token of the last hidden states goes to the output head"
    # Starts, lengths and slots of the documents too.
    assert decode == {(0, 1): 7, (1, 2): 7, (2, 0): 1}


def test_a_parts_gpu_is_current_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the one before it afterwards, also when the part raises."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: current.__setitem__(0, getattr(device, "index", device))
    )
    seen: list[int] = []

    class Part(nn.Module):
        def forward(self, fails: bool) -> None:
            seen.append(current[0])
            if fails:
                raise PromptGoesOn

    part = Part()
    placement = SimpleNamespace(device_map=lambda: {"0": torch.device("cuda", 1)})
    connect(nn.Sequential(part), placement)  # type: ignore[arg-type]
    part(fails=False)
    assert (seen, current) == ([1], [0])
    with pytest.raises(PromptGoesOn):
        part(fails=True)
    assert (seen, current) == ([1, 1], [0])


@pytest.mark.parametrize("part", ["model.layers.1", "model.layers.2", "lm_head"])
def test_a_tensor_that_was_not_handed_over_is_noticed(part: str, tmp_path: Path) -> None:
    """What the tests above are worth."""
    config = config_of(save_model(tmp_path, "llama"), precision="fp32")
    model = load_model(config)
    with Devices(), torch.inference_mode():
        spread(model, 3)
        model.get_submodule(part)._forward_pre_hooks.clear()
        with pytest.raises(AssertionError, match="works across"):
            ModelRunner(model, None, fuse=False)


@pytest.mark.parametrize(("architecture", "precision"), [("qwen3_moe", "fp32"), ("gemma3", "fp8"), ("olmo2", "fp32")])
def test_stages_on_one_cpu_give_what_one_stage_gives(architecture: str, precision: str, tmp_path: Path) -> None:
    """The way of a real job: files, fused modules, hooks; all stages are on one device, so that nothing is moved."""
    config = config_of(
        save_model(tmp_path, architecture, head_dim=32), precision=precision, attention=SAMPLE, fuse=True
    )
    expected = Engine(config)
    runner = load_runner(config, [CPU, CPU, CPU])
    engine = Engine(config, runner)
    assert runner.devices == (CPU,)
    about, wanted = engine.describe(), expected.describe()
    assert {**about, "start_seconds": None} == {**wanted, "start_seconds": None}
    assert engine.plan().devices == ()
    assert sum(len(module._forward_pre_hooks) for module in runner.model.modules()) > 3
    assert figures(run(engine, requests())) == figures(run(expected, requests()))


def test_one_device_has_no_hooks(tmp_path: Path) -> None:
    model = load_model(config_of(save_model(tmp_path, "llama")))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


META = torch.device("meta")


@pytest.mark.parametrize(("devices", "precision"), [((CPU, META), "fp32"), ((CPU, META), "fp8"), ((META, CPU), "fp32")])
def test_weights_from_files_go_to_their_devices(
    devices: tuple[torch.device, ...], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device on which weights have no values: what is on the other one is there and whole."""
    # Both are of this host, whose free memory changes between two looks at it.
    monkeypatch.setattr("pipeline.engine.devices.host_memory", lambda: (1 << 30, 1 << 30))
    config = config_of(save_model(tmp_path, "qwen3_moe", tie_word_embeddings=True), precision=precision)
    whole = load_model(config).state_dict()
    found = load_model(config, devices).state_dict()
    first = {name for name, tensor in found.items() if tensor.device == devices[0]}
    assert first == {name for name in found if "layers" not in name and "norm" not in name} | {
        name for name in found if name.startswith("model.layers.0.")
    }
    assert list(found) == list(whole)
    for name, tensor in found.items():
        if tensor.device == CPU:
            assert torch.equal(tensor.view(torch.uint8), whole[name].view(torch.uint8)), name
    if devices[0] == CPU:
        assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr(), "tied as before"


def test_a_model_loaded_onto_two_devices_has_our_hooks_alone(tmp_path: Path) -> None:
    """transformers would have accelerate replace every module's forward."""
    config = config_of(save_model(tmp_path, "llama"), precision="fp32")
    model = load_model(config, [META, CPU])
    assert not any("forward" in vars(module) or hasattr(module, "_hf_hook") for module in model.modules())
    with_hooks = {name for name, module in model.named_modules() if module._forward_pre_hooks}
    parts = {"model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"}
    assert with_hooks == {"", *parts, *(f"model.layers.{i}" for i in range(3))}


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_random_weights_are_made_on_their_devices(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(save_model(tmp_path, "llama"), precision=precision, load_format="dummy")
    asked: dict[int, tuple[torch.device, nn.Linear]] = {}
    to_empty = nn.Linear.to_empty

    def spy(self: nn.Linear, *, device: Any, recurse: bool = True) -> nn.Linear:
        asked[id(self)] = device, self
        return to_empty(self, device=CPU, recurse=recurse)

    monkeypatch.setattr(nn.Linear, "to_empty", spy)
    hf_config = load_config(config)
    resolved = resolve_precision(precision, CPU, hf_config)
    placement = place(meta_model(config, hf_config, resolved), [CPU, META], [1 << 30] * 2)
    with monkeypatch.context() as patch:
        patch.setattr(dummy, "layers_on_devices", lambda placement: nullcontext())
        model = dummy.dummy_model(config, hf_config, resolved, placement)
    assert [device for device, _ in asked.values()].count(CPU) == 7 * placement.counts[0] + 1
    assert [device for device, _ in asked.values()].count(META) == 7 * placement.counts[1]
    expected = dummy.dummy_model(config, hf_config, resolved, whole(CPU)).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_layers_are_built_on_their_devices(tmp_path: Path) -> None:
    """Experts are no linears, and the first device has no room for those of all layers."""
    config = config_of(save_model(tmp_path, "qwen3_moe"))
    hf_config = load_config(config)
    placement = place(meta_model(config, hf_config, Precision("fp32", torch.float32)), [CPU, META], [1 << 30] * 2)
    assert placement.layer_type is not None
    before = placement.layer_type.__init__
    with layers_on_devices(placement):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    assert placement.layer_type.__init__ is before
    layers = [{p.device for p in layer.parameters()} for layer in model.model.layers]
    assert layers == [{CPU}, {META}, {META}] == [{device} for device in placement.layer_devices]
    assert {p.device for name, p in model.named_parameters() if ".layers." not in name} == {CPU}


@pytest.mark.parametrize(
    ("sizes", "rooms", "counts"),
    [
        ([10] * 8, [100, 100], [4, 4]),
        ([10] * 7, [100, 100], [3, 4]),
        ([10] * 8, [60, 100], [3, 5]),
        ([10] * 9, [100, 100, 100], [3, 3, 3]),
        ([40, 10, 10, 10, 10], [100, 100], [2, 3]),
        ([10] * 3, [1, 1, 1], [1, 1, 1]),
        ([1] * 80, [10**6, 10**9], [1, 79]),
    ],
)
def test_what_is_left_for_a_layers_kv_is_balanced(sizes: list[int], rooms: list[int], counts: list[int]) -> None:
    assert balance(sizes, rooms) == counts


@pytest.mark.parametrize(
    ("architecture", "count", "message"),
    [("llama", 4, "a model of 3 layers cannot be spread over 4 GPUs: use fewer")],
)
def test_what_cannot_be_spread_is_said(architecture: str, count: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=message):
        load_runner(config_of(save_model(tmp_path, architecture)), [CPU] * count)


def test_layers_that_share_keys_are_not_spread(tmp_path: Path) -> None:
    model = load_model(config_of(save_model(tmp_path, "llama")))
    model.model.layers[1].self_attn.is_kv_shared_layer = True  # type: ignore[union-attr, index]
    with pytest.raises(EngineError, match="keys and values from one another"):
        place(model, [CPU, CPU], [1 << 30] * 2)


def test_weights_shared_between_stages_are_refused(tmp_path: Path) -> None:
    model = load_model(config_of(save_model(tmp_path, "llama")))
    layers = model.model.layers  # type: ignore[union-attr]
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight  # type: ignore[union-attr, index]
    with pytest.raises(EngineError, match=r"layers.0.mlp.up_proj.weight and model.layers.2.* are one weight"):
        place(model, [CPU, CPU], [1 << 30] * 2)
