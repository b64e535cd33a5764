"""gpt-oss as it is published: experts in MXFP4, dequantised when they load, and that said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_models import generate, prompts, run, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.quantizers.auto import AutoHfQuantizer

from pipeline.engine import Engine, EngineConfig, Request, estimate_plan
from pipeline.engine.devices import weight_bytes
from pipeline.engine.model.loading import load_config, load_model
from stem_core.fp8 import prepare_quantized_config

# e2m1, by its four bits: sign, exponent, mantissa (OCP Microscaling Formats 1.0, table 5).
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])
GROUP = 32  # values that share a scale, 2^(byte - 127)
PROJECTIONS = ("gate_up_proj", "down_proj")
# As in config.json of openai/gpt-oss-20b.
PUBLISHED = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight [E, in, out] as blocks uint8 [E, out, in / 32, 16], scales uint8 [E, out, in / 32], and what they mean."""
    grouped = weight.mT.unflatten(-1, (-1, GROUP))
    exponent = torch.floor(torch.log2(grouped.abs().amax(-1, keepdim=True))) - 2  # 6 is 1.5 * 2^2
    codes = ((grouped / 2**exponent)[..., None] - E2M1).abs().argmin(-1)
    # The first of two values is in the low bits.
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    meant = (E2M1[codes] * 2**exponent).flatten(-2).mT
    return blocks, (exponent[..., 0] + 127).to(torch.uint8), meant


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model in the published layout, and one with the weights that it stands for."""
    packed, plain = (tmp_path_factory.mktemp(name) for name in ("packed", "plain"))
    save_model(plain, "gpt_oss")
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name in [name for name in tensors if name.endswith(PROJECTIONS)]:
        stored[f"{name}_blocks"], stored[f"{name}_scales"], tensors[name] = pack(stored.pop(name))
    config = json.loads((plain / "config.json").read_text())
    save_file({k: v.contiguous() for k, v in tensors.items()}, plain / "model.safetensors", metadata={"format": "pt"})
    save_file({k: v.contiguous() for k, v in stored.items()}, packed / "model.safetensors", metadata={"format": "pt"})
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": PUBLISHED}))
    return packed, plain


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_weights_are_those_that_the_blocks_stand_for(
    folders: tuple[Path, Path], precision: str, dtype: torch.dtype
) -> None:
    packed, plain = folders
    wanted = load_file(plain / "model.safetensors")
    model = load_model(EngineConfig(str(packed), device="cpu", precision=precision))
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    assert sum(name.endswith(PROJECTIONS) for name in found) == 6
    for name, value in found.items():
        assert value.dtype == dtype, name
        assert torch.equal(value, wanted[name].to(dtype)), name


@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_reads_as_the_plain_checkpoint_does_and_says_what_it_was(folders: tuple[Path, Path], precision: str) -> None:
    packed, plain = folders
    outputs, engines = [], []
    texts = prompts([300, 70])
    for folder in (packed, plain):
        engine = Engine(EngineConfig(str(folder), device="cpu", precision=precision, arena_tokens=4096))
        engines.append(engine.describe()["precision"])
        done = run(engine, [Request(str(i), prompt, 8) for i, prompt in enumerate(texts)])
        assert {completion.status for completion in done.values()} == {"ok"}
        outputs.append([done[str(i)].token_ids for i in range(len(texts))])
    assert outputs[0] == outputs[1]
    if precision == "auto":
        assert outputs[1] == [generate(plain, prompt, 8) for prompt in texts]
    name = "fp32" if precision == "auto" else "fp8"
    assert engines == [f"{name}, weights dequantised from MXFP4", name]


def test_the_estimate_counts_them_dequantised(folders: tuple[Path, Path]) -> None:
    packed, plain = folders
    plans = [estimate_plan(EngineConfig(str(f), device="cpu", precision="bf16", arena_tokens=512)) for f in folders]
    assert plans[0].weight_bytes == plans[1].weight_bytes
    elements = sum(value.numel() for value in load_file(plain / "model.safetensors").values())
    loaded = weight_bytes(load_model(EngineConfig(str(packed), device="cpu", precision="bf16")))
    assert [plans[0].weight_bytes, loaded] == pytest.approx([2 * elements] * 2, rel=0.01)
    told = ["dequantised from MXFP4" in "\n".join(plan.lines()) for plan in plans]
    assert told == [True, False]
    after = Engine(EngineConfig(str(packed), device="cpu", precision="bf16", arena_tokens=512)).plan()
    assert after.dequantised_from == "MXFP4"


def test_transformers_is_told_to_dequantise(folders: tuple[Path, Path]) -> None:
    """By itself it does so on a CPU; with a GPU and the package `kernels` it would fetch kernels from the hub."""
    hf_config = load_config(EngineConfig(str(folders[0]), device="cpu"))
    assert not prepare_quantized_config(hf_config)
    assert AutoHfQuantizer.from_config(hf_config.quantization_config).quantization_config.dequantize is True
