"""Experts in fp8: exact against their own definition, close to those they replace, of every layout in transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kernels.quantize import quantize_rows
from stem_core.fp8 import Fp8Experts, describe_fp8, experts_obstacle, find_experts, quantize_linears
from stem_core.fuse import fuse_model
from tests.stem_core.test_fp8 import relative
from tests.stem_core.test_fuse import LAYERS, SMALL, prompt, tiny

OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40, "intermediate_size": 48}
# type -> its config; stacked as [N, K], as [K, N] with a bias and halves that alternate, in a gelu.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "gpt_oss": OSS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe-gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "qwen3_moe-relu": {"hidden_act": "relu"},
}


def model_of(family: str) -> nn.Module:
    name = family.partition("-")[0]
    return tiny(name, **FAMILIES[family]) if name in ("qwen3_moe", "mixtral") else build(name, FAMILIES[family])


def build(name: str, changes: dict[str, Any]) -> nn.Module:
    """A model of a type that test_fuse has none of, biases not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL | changes), dtype=torch.float32).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


def fake(rows: Tensor) -> Tensor:
    """Rounded to fp8 by the row, in float64."""
    quantised = quantize_rows(rows)
    return quantised.values.double() * quantised.scales


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_experts_equal_their_definition(family: str) -> None:
    """In float64, of weights and activations rounded to fp8, expert by expert, with transformers' own gate."""
    (name, *_), (experts, *_) = zip(*find_experts(model_of(family)).items(), strict=True)
    assert name == "model.layers.0.mlp.experts"
    original = copy.deepcopy(experts)
    quantised = Fp8Experts(experts)
    entry = original.gate_up_proj.mT.contiguous() if original.is_transposed else original.gate_up_proj
    down = original.down_proj.mT.contiguous() if original.is_transposed else original.down_proj
    torch.manual_seed(1)
    x = torch.randn(23, quantised.entry.shape[2])
    ids = torch.rand(23, 4).argsort(-1)[:, :2]
    shares = torch.rand(23, 2)
    expected = torch.zeros(23, down.shape[1], dtype=torch.float64)
    for token in range(23):
        for expert, share in zip(ids[token].tolist(), shares[token].double(), strict=True):
            inner = fake(x[token]) @ fake(entry[expert]).t()
            inner += original.gate_up_proj_bias[expert].double() if original.has_bias else 0
            gated = original._apply_gate(inner.float()[None])[0]
            out = fake(gated) @ fake(down[expert]).t()
            out += original.down_proj_bias[expert].double() if original.has_bias else 0
            expected[token] += share * out
    got = quantised(x, ids, shares)
    assert got.dtype == x.dtype
    # A sum in another order may round to the neighbour in fp8.
    assert relative(got, expected) < 5e-3
    assert relative(got, original(x, ids, shares)) < 0.1


def median(got: Tensor, wanted: Tensor) -> float:
    """Over the tokens: one of them may go to another expert where two are as good."""
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_with_experts_stays_close_and_fuses(family: str) -> None:
    model = model_of(family)
    ids = prompt()
    original = model(ids).logits
    quantize_linears(model)
    described = describe_fp8(model)
    assert described["experts"] == LAYERS
    assert not find_experts(model)
    alone = model(ids).logits
    assert 0 < median(alone, original) < 0.25
    assert median(fuse_model(model)(ids).logits, alone) < 0.03
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert tokens.shape == (2, ids.shape[1] + 4)


@pytest.mark.parametrize(("family", "kernel"), [("qwen3_moe", "silu"), ("qwen3_moe-gelu", "gelu_tanh"),
                                                ("qwen3_moe-relu", ""), ("gpt_oss", "")])  # fmt: skip
def test_the_kernel_takes_the_gates_that_it_computes(family: str, kernel: str) -> None:
    assert Fp8Experts(next(iter(find_experts(model_of(family)).values())))._activation == kernel


@torch.no_grad()
def test_memory_is_a_byte_a_weight_and_the_router_stays() -> None:
    model = tiny("qwen3_moe")
    sizes = {name: (m.gate_up_proj.numel(), m.down_proj.numel()) for name, m in find_experts(model).items()}
    quantize_linears(model)
    for name, (entry, down) in sizes.items():
        experts = model.get_submodule(name)
        assert isinstance(experts, Fp8Experts)
        assert (experts.entry.nbytes, experts.down.nbytes) == (entry, down)
        assert not list(experts.source.parameters())
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.float32


@torch.no_grad()
def test_experts_without_a_gate() -> None:
    """Nemotron-H has them: one product before the activation."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = NemotronHConfig(
        hidden_size=64, moe_intermediate_size=48, n_routed_experts=4, num_experts_per_tok=2, moe_latent_size=None
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    experts = NemotronHExperts(config)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    x, ids, shares = torch.randn(9, 64), torch.rand(9, 4).argsort(-1)[:, :2], torch.rand(9, 2)
    wanted = experts(x, ids, shares)
    assert relative(Fp8Experts(experts)(x, ids, shares), wanted) < 0.1


def test_experts_that_stay_are_counted_with_the_reason() -> None:
    odd = tiny("qwen3_moe", moe_intermediate_size=40)
    experts = next(iter(find_experts(odd).values()))
    assert "multiples of 16" in experts_obstacle(experts)
    with pytest.raises(ValueError, match="cannot be quantised: its sizes are no multiples of 16"):
        Fp8Experts(experts)
    assert describe_fp8(quantize_linears(odd))["kept"]["its sizes are no multiples of 16"] == LAYERS
    named = quantize_linears(tiny("qwen3_moe"), skip=("lm_head", "experts"))
    assert describe_fp8(named) | {"kept": {"skipped": 1 + LAYERS}, "experts": 0} == describe_fp8(named)
    experts.has_post_expert_norm = True
    assert experts_obstacle(experts) == "its experts have norms of their own"


def test_a_converted_model_is_named() -> None:
    model = quantize_linears(tiny("qwen3_moe"))
    next(module for module in model.modules() if isinstance(module, Fp8Experts)).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"never \.to\(dtype\)"):
        model(prompt())
