"""A checkpoint that lacks weights, or holds others than its model, ends the job and names them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_models import save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import summarize
from pipeline.engine import EngineConfig, ModelLoadError, estimate_plan
from pipeline.engine.model.loading import load_model
from pipeline.errors import JobError
from pipeline.job.dry_run import describe_plan
from pipeline.settings.config import JobConfig

Tensors = dict[str, Tensor]
CPU, META = torch.device("cpu"), torch.device("meta")
FP8 = torch.float8_e4m3fn
FP8_CONFIG = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
            }
        },
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    },
    "autofp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def narrow(tensors: Tensors) -> Tensors:
    name = "model.layers.1.mlp.up_proj.weight"
    return tensors | {name: tensors[name][:80].clone()}


def another_layer(tensors: Tensors) -> Tensors:
    last = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    return tensors | {name.replace(".2.", ".3."): tensor.clone() for name, tensor in last.items()}


def with_bias(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}


# What is done to a checkpoint, and what the error says. 30 weights in all, 9 a layer.
DAMAGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no head": (without("lm_head"), r"1 missing \(lm_head\.weight\)\. .*tie_word_embeddings to true"),
    "no embedding": (without("embed_tokens"), r"1 missing \(model\.embed_tokens\.weight\)"),
    "no mlp": (without("layers.1.mlp"), r"missing \(model\.layers\.1\.mlp\.down_proj\.weight, .*Use the whole"),
    "no norm": (without("model.norm"), r"1 missing \(model\.norm\.weight\)"),
    "compiled": (prefixed("_orig_mod."), r"missing .* without a place .*inside a wrapper \(_orig_mod\)"),
    "parallel": (prefixed("module."), r"missing .* without a place .*inside a wrapper \(module\)"),
    "other names": (prefixed("transformer."), r"missing .* without a place in the model \(transformer\.lm_head"),
    "shape": (narrow, r"1 of another shape \(model\.layers\.1\.mlp\.up_proj\.weight: \[80, 64\], not \[96, 64\]\)"),
    "extra layer": (another_layer, r"without a place in the model \(model\.layers\.3\.input_layernorm\.weight, "),
    "extra bias": (with_bias, r"1 without a place in the model \(model\.layers\.0\.self_attn\.q_proj\.bias\)"),
}  # fmt: skip


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def quantise(folder: Path, layout: str) -> Path:
    """Store the linears in fp8, experts included, with the scales that tools write."""

    def change(tensors: Tensors) -> Tensors:
        quantised = dict(tensors)
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                amax = tensor.abs().amax(1, keepdim=True) if layout == "compressed-tensors" else tensor.abs().amax()
                scale = (amax / 448).float()
                quantised |= {name: (tensor / scale).to(FP8), f"{name}_scale": scale}
        return quantised

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8_CONFIG[layout]}))
    return rewrite(folder, change)


# One device, several, a GPU's way (weights go straight to the device), quantised when loaded, quantised as stored.
WAYS: dict[str, tuple[tuple[torch.device, ...], str, str]] = {
    "cpu": ((CPU,), "fp32", ""),
    "device": ((META,), "bf16", ""),
    "two devices": ((CPU, META), "fp32", ""),
    "fp8": ((CPU,), "fp8", ""),
    "fp8 on two devices": ((META, CPU), "fp8", ""),
    "fp8 checkpoint": ((CPU,), "auto", "compressed-tensors"),
    "fp8 checkpoint on two devices": ((CPU, META), "auto", "autofp8"),
}


def load(folder: Path, way: str = "cpu") -> Any:
    devices, precision, _ = WAYS[way]
    return load_model(EngineConfig(str(folder), device="cpu", precision=precision), devices)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_the_models_are_named(tmp_path: Path, damage: str, way: str) -> None:
    folder = save_model(tmp_path, "llama", tie_word_embeddings=False)
    if WAYS[way][2]:
        quantise(folder, WAYS[way][2])
    change, message = DAMAGES[damage]
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(rewrite(folder, change), way)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).replace(str(folder), "a/folder")) < 450, "a worker's reason is cut at 500"


def test_no_document_is_read_with_a_model_that_lacks_weights(tmp_path: Path, model: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    rewrite(folder, without("layers.1.mlp.up_proj"))
    with pytest.raises(JobError, match=r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        summarize(["a text"], model=folder, device="cpu", max_new_tokens=2)


@pytest.mark.parametrize("way", WAYS)
def test_whole_checkpoints_load(tmp_path: Path, way: str) -> None:
    folder = save_model(tmp_path, "llama", tie_word_embeddings=False)
    if WAYS[way][2]:
        quantise(folder, WAYS[way][2])
    assert load(folder, way) is not None


def test_harmless_names_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.1.self_attn.v_proj.output_scale": torch.ones(1),
        "model.mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 4),
    }
    folder = save_model(tmp_path, "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors"), "tied: one of the two is stored"
    with caplog.at_level(logging.WARNING, "transformers"):
        load(rewrite(folder, lambda tensors: tensors | extra))
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("devices", [(CPU,), (CPU, META)])
def test_experts_in_fp8_are_refused(tmp_path: Path, devices: tuple[torch.device, ...]) -> None:
    """transformers stacks the experts' weights and leaves their scales behind; not so in test_engine_checkpoints.py."""
    folder = quantise(save_model(tmp_path, "qwen3_moe"), "autofp8")
    message = r"36 without a place in the model \(model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight_scale, .*in bf16"
    with pytest.raises(ModelLoadError, match=message):
        load_model(EngineConfig(str(folder), device="cpu"), devices)


def test_experts_in_bf16_beside_linears_in_fp8_are_read(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "qwen3_moe")
    experts = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".experts." in name}
    quantise(folder, "compressed-tensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*mlp.experts.*")
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if ".experts." not in n} | experts)
    assert load(folder, "fp8 checkpoint") is not None


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("part", ["experts.3.gate_proj", "experts.3.", "experts."])
def test_missing_experts_are_named(tmp_path: Path, part: str, quiet: bool, request: pytest.FixtureRequest) -> None:
    """Also where transformers was told to log errors alone."""
    folder = save_model(tmp_path, "qwen3_moe")
    request.addfinalizer(partial(transformers.logging.set_verbosity, transformers.logging.get_verbosity()))
    if quiet:
        transformers.logging.set_verbosity_error()
    with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.experts\."):
        load(rewrite(folder, without(f"layers.1.mlp.{part}")))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_are_not_passed_over(tmp_path: Path, file: str) -> None:
    folder = save_model(tmp_path / "model", "llama")
    (folder / file).write_text("{}")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("text")
    message = rf"it holds an adapter \({file}\).*as --adapter"
    for call in (load, lambda path: estimate_plan(EngineConfig(str(path), device="cpu"))):
        with pytest.raises(ModelLoadError, match=message):
            call(folder)
    config = JobConfig(model=str(folder), input=(str(tmp_path / "docs"),), output=str(tmp_path / "out"))
    with pytest.raises(JobError, match=message):
        list(describe_plan(config))


def test_weights_of_an_adapter_inside_the_checkpoint_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    extra = {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 64)}
    with pytest.raises(ModelLoadError, match=r"lora_A.*merge_and_unload"):
        load(rewrite(folder, lambda tensors: tensors | extra))
