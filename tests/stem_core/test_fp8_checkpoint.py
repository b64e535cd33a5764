"""fp8 checkpoints in the two common layouts, written here the way their tools write them, load as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stem_core.fp8 import Fp8Linear, UnsupportedCheckpointError, describe_fp8, prepare_quantized_config
from stem_core.fp8.checkpoint import METHOD, Fp8Layout, read_layout
from stem_core.fuse import describe_fusion, fuse_model
from tests.stem_core.test_fuse import LAYERS, prompt, tiny

FP8 = torch.float8_e4m3fn


def compressed_tensors(strategy: str, dynamic: bool = True, **changes) -> dict:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    activations = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
    }
    group = {"targets": ["Linear"], "weights": weights | changes, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*layers.1.mlp.down_proj"],
        "quantization_status": "compressed",
    }


AUTO_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
# name: (quantization_config, shape of weight_scale, its dtype, linears left in bf16)
LAYOUTS = {
    "channel": (compressed_tensors("channel"), lambda n: (n, 1), torch.bfloat16, 1),
    "tensor": (compressed_tensors("tensor", dynamic=False), lambda n: (1,), torch.float32, 1),
    "autofp8": (AUTO_FP8, lambda n: (), torch.float32, 0),
}


def write(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """A tiny llama in bf16 with fp8 linears; returns the weights that its linears stand for, by module name."""
    quantization, scale_shape, scale_dtype, _ = LAYOUTS[layout]
    model = tiny("llama-bias", torch.bfloat16)
    tensors, meant = {}, {}
    for name, module in model.named_modules():
        for part, value in module._parameters.items():
            if value is not None:
                tensors[f"{name}.{part}"] = value.detach().clone()
        kept = name == "lm_head" or (layout != "autofp8" and name.endswith("layers.1.mlp.down_proj"))
        if type(module) is not nn.Linear or kept:
            continue
        weight, shape = module.weight.detach().float(), scale_shape(module.out_features)
        amax = weight.abs().amax(1) if len(shape) == 2 else weight.abs().amax()
        scale = (amax / 448).reshape(shape).to(scale_dtype)
        wide = scale.float() if scale.ndim == 2 else scale.float().reshape(1, 1)
        values = (weight / wide).clamp(-448, 448).to(FP8)
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = values, scale
        if layout != "channel":
            tensors[f"{name}.input_scale"] = torch.full(shape, 0.5)
        meant[name] = values.double() * wide.double()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return meant


def load(folder: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    assert prepare_quantized_config(config)
    assert prepare_quantized_config(config)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_weights_are_those_of_the_checkpoint(layout, tmp_path):
    meant = write(tmp_path, layout)
    model = load(tmp_path)
    loaded = {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert loaded.keys() == meant.keys()
    assert len(loaded) == 7 * LAYERS - LAYOUTS[layout][3]
    for name, linear in loaded.items():
        assert linear.weight.dtype == FP8
        assert linear.weight_scale.shape == (1, linear.out_features)
        assert torch.equal(linear.weight.double() * linear.weight_scale.double().t(), meant[name]), name
        assert set(linear._parameters) == {"weight", "weight_scale", "bias"}
    assert model.lm_head.weight.dtype == torch.bfloat16

    # The same model with the weights that the checkpoint stands for, in bf16, differs by quantised activations only.
    plain = tiny("llama-bias", torch.bfloat16)
    for name, weight in meant.items():
        plain.get_submodule(name).weight.copy_(weight)
    ids = prompt()
    wanted, got = plain(ids).logits.float(), model(ids).logits.float()
    assert (got - wanted).norm() < 0.15 * wanted.norm()
    fuse_model(model)
    assert describe_fusion(model)["fused"]["fp8_norm"] == 2 * LAYERS
    assert (model(ids).logits.float() - got).norm() < 0.05 * got.norm()
    assert describe_fp8(model)["linears"] == len(meant)


def test_a_config_without_quantisation_is_left_alone():
    config = AutoConfig.for_model("llama")
    assert prepare_quantized_config(config) is False
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantised by 'awq' are not read.*without the ending"),
        (compressed_tensors("channel", num_bits=4), "4-bit float weights"),
        (compressed_tensors("channel", type="int"), "8-bit int weights"),
        (compressed_tensors("group"), "weight strategy 'group'"),
        (compressed_tensors("channel") | {"config_groups": {}}, "0 config groups"),
    ],
)
def test_other_quantisations_are_refused_by_name(quantization, message):
    with pytest.raises(UnsupportedCheckpointError, match=message):
        read_layout(quantization)


def test_layouts_ignore_names_prefixes_and_patterns():
    layout = read_layout(AUTO_FP8 | {"ignored_layers": ["lm_head", "model.layers.3", r"re:.*\.experts\..*"]})
    assert layout.applies_to("model.layers.30.mlp.up_proj")
    assert not layout.applies_to("model.layers.3.mlp.up_proj")
    assert not layout.applies_to("model.layers.5.mlp.experts.0.up_proj")
    assert not layout.applies_to("lm_head")
    # As older versions of transformers name what lies in a model that sees, too.
    older = Fp8Layout(
        "channel",
        ("language_model.lm_head", "language_model.model.layers.3", "multi_modal_projector.linear_1", "re:projector.*"),
        False,
    )
    assert older.applies_to("model.language_model.layers.30.mlp.up_proj")
    for name in ("lm_head", "model.language_model.layers.3.mlp.up_proj", "model.multi_modal_projector.linear_1"):
        assert not older.applies_to(name)
    assert not older.applies_to("model.projector.linear_2")
    assert METHOD not in ("fp8", "compressed-tensors")
