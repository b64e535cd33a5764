"""fuse_model on every family: the same logits, everything fused that should be, and everything undone again."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from stem_core import StemConfig, patch_model, unpatch_model
from stem_core.fp8 import quantize_linears
from stem_core.fuse import describe_fusion, fuse_model, fusions, unfuse_model

VOCAB, LAYERS = 97, 2
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NORMS, HEAD_NORMS = 2 * LAYERS + 1, 2 * LAYERS
DENSE = {"gated_mlp": LAYERS, "gate_up_projection": LAYERS, "qkv_projection": LAYERS, "rope": LAYERS}
# family: (config, how often each kind is fused)
FAMILIES = {
    "llama": ({}, {"rms_norm": NORMS, **DENSE}),
    "llama-bias": ({"attention_bias": True, "mlp_bias": True}, {"rms_norm": NORMS, **DENSE}),
    "qwen2": ({}, {"rms_norm": NORMS, **DENSE}),
    "qwen3": ({}, {"rms_norm": NORMS + HEAD_NORMS, **DENSE}),
    "mistral": ({"sliding_window": 20}, {"rms_norm": NORMS, **DENSE}),
    "phi3": ({"sliding_window": None}, {"rms_norm": NORMS, "gated_mlp": LAYERS, "rope": LAYERS}),
    "gemma": ({}, {"rms_norm": NORMS, **DENSE}),
    "gemma2": ({"sliding_window": 20}, {"rms_norm": 2 * NORMS - 1, **DENSE}),
    "gemma3_text": (
        {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
        {"rms_norm": 2 * NORMS - 1 + HEAD_NORMS, **DENSE},
    ),
    "olmo2": ({}, {"rms_norm": NORMS + HEAD_NORMS, **DENSE}),
    "granite": ({"attention_multiplier": 0.2, "residual_multiplier": 0.7}, {"rms_norm": NORMS, **DENSE}),
    "qwen3_moe": (EXPERTS, {"rms_norm": NORMS + HEAD_NORMS, "qkv_projection": LAYERS, "rope": LAYERS}),
    "qwen3_moe-mixed": (
        EXPERTS | {"mlp_only_layers": [0]},
        {
            "rms_norm": NORMS + HEAD_NORMS,
            "gated_mlp": 1,
            "gate_up_projection": 1,
            "qkv_projection": LAYERS,
            "rope": LAYERS,
        },
    ),
    # pairs neighbouring dimensions
    "glm": ({}, {"rms_norm": NORMS, "gated_mlp": LAYERS, "qkv_projection": LAYERS}),
    "mixtral": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"rms_norm": NORMS, "qkv_projection": LAYERS, "rope": LAYERS},
    ),
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split("-")[0], **(SMALL | FAMILIES[family][0] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            # Not all ones and zeros, as they are at first.
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


def prompt(length: int = 50, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def fused_kinds(model: nn.Module) -> Counter[str]:
    return Counter(fusion.kind for fusion in fusions(model) if not fusion.reason)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_stay_and_unfuse_restores(family):
    model = tiny(family)
    ids = prompt()
    own, state = model(ids).logits, copy.deepcopy(model.state_dict())
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)

    fuse_model(model)
    assert dict(fused_kinds(model)) == FAMILIES[family][1]
    torch.testing.assert_close(model(ids).logits, own, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), tokens)
    assert describe_fusion(model)["unfused_calls"] == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name

    unfuse_model(model)
    assert torch.equal(model(ids).logits, own)
    assert not any("forward" in vars(module) for module in model.modules())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert describe_fusion(model)["fused"] == {}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "olmo2"])
@torch.no_grad()
def test_bfloat16_is_rounded_alike(family):
    model = tiny(family, torch.bfloat16)
    ids = prompt()
    own = model(ids).logits
    fuse_model(model)
    assert dict(fused_kinds(model)) == FAMILIES[family][1]
    # The references round where transformers rounds: what may differ is the order of sums in stacked GEMMs.
    assert (model(ids).logits.float() - own.float()).norm() <= 0.01 * own.float().norm()


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
@torch.no_grad()
def test_goes_with_stem_attention_in_either_order(family):
    ids = prompt(200, 1)
    everything = StemConfig(schedule="density", density=0.999999, block_size=16, dense_layers=0, local_blocks=4096)
    model = tiny(family)
    own = model(ids).logits
    for first, second in (
        (fuse_model, lambda m: patch_model(m, everything)),
        (lambda m: patch_model(m, None), fuse_model),
    ):
        first(model)
        second(model)
        torch.testing.assert_close(model(ids).logits, own, atol=2e-4, rtol=2e-4)
        unpatch_model(unfuse_model(model))


@torch.no_grad()
def test_one_model_is_fused_not_its_family():
    fused, other = tiny("llama"), tiny("llama")
    function = modeling_llama.apply_rotary_pos_emb
    fuse_model(fused)
    assert modeling_llama.apply_rotary_pos_emb is function
    assert not any("forward" in vars(module) for module in other.modules())
    ids = prompt()
    torch.testing.assert_close(other(ids).logits, fused(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_stacked_weights_take_no_second_copy_and_follow_updates():
    model = tiny("llama")
    before = sum(p.numel() for p in model.parameters())
    fuse_model(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == 4 * before
    ids, was = prompt(), model(prompt()).logits
    model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.model.layers[1].self_attn.k_proj.weight.mul_(2)
    changed = model(ids).logits
    assert (changed - was).abs().max() > 1e-2
    torch.testing.assert_close(unfuse_model(model)(ids).logits, changed, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_weights_replaced_behind_its_back_are_noticed():
    model = fuse_model(tiny("llama"))
    model.model.layers[0].self_attn.k_proj.weight.data = model.model.layers[0].self_attn.k_proj.weight.data.clone()
    with pytest.raises(RuntimeError, match="call unfuse_model before"):
        model(prompt())


@torch.no_grad()
def test_without_projections_no_weight_moves():
    model = tiny("llama")
    pointers = [p.data_ptr() for p in model.parameters()]
    fuse_model(model, projections=False)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert dict(fused_kinds(model)) == {"rms_norm": NORMS, "gated_mlp": LAYERS, "rope": LAYERS}


@torch.no_grad()
def test_norms_kept_in_float32_stay():
    """transformers then multiplies into float32, which the kernel does not imitate."""
    model = tiny("llama", torch.bfloat16)
    model.model.layers[0].input_layernorm.float()
    fuse_model(model)
    (skipped,) = [fusion for fusion in fusions(model) if fusion.reason]
    assert skipped.module == "model.layers.0.input_layernorm"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_on_a_gpu_eager_and_captured(family, fp8):
    model = tiny(family, torch.bfloat16).cuda()
    if fp8:
        quantize_linears(model)
    ids = prompt().cuda()
    own = model(ids).logits.float()
    fuse_model(model)
    found = fused_kinds(model)
    assert dict(found) == FAMILIES[family][1] | ({"fp8_norm": found["fp8_norm"]} if found["fp8_norm"] else {})
    fused = model(ids).logits.float()
    assert (fused - own).norm() <= (0.05 if fp8 else 0.02) * own.norm()
    if "moe" in family or family == "mixtral":
        return  # transformers' experts wait for the device
    one = torch.tensor([[5], [6]], device="cuda")
    mask = torch.ones(2, 1, 1, 1, dtype=torch.bool, device="cuda")
    masks = dict.fromkeys(set(getattr(model.config, "layer_types", None) or []), mask)
    options = {"attention_mask": masks if "sliding_attention" in masks else mask, "use_cache": False}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        eager = model(one, **options).logits
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(one, **options).logits
    one.fill_(7)
    graph.replay()
    assert torch.equal(captured, model(one, **options).logits)
    assert not torch.equal(captured, eager)


class OddNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states).clamp(max=2.0)


class ClampedMLP(modeling_llama.LlamaMLP):
    """As some families do: no difference on ordinary activations."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class ExactGeluMLP(modeling_llama.LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.act_fn = nn.GELU()


@pytest.mark.parametrize(
    ("path", "name", "kind", "replacement", "reason"),
    [
        ("model", "norm", "rms_norm", lambda config: _named("OddRMSNorm", OddNorm)(64), "no known form of RMSNorm"),
        ("model.layers.0", "mlp", "gated_mlp", ClampedMLP, "is not down"),
        ("model.layers.0", "mlp", "gated_mlp", ExactGeluMLP, "activation GELU is neither"),
    ],
)
@torch.no_grad()
def test_what_differs_keeps_its_own_forward_and_says_why(path, name, kind, replacement, reason):
    model = tiny("llama")
    module = replacement(model.config).eval()
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    setattr(model.get_submodule(path), name, module)
    own = model(prompt()).logits
    fuse_model(model)
    (skipped,) = [fusion for fusion in fusions(model) if fusion.reason]
    assert (skipped.kind, skipped.module) == (kind, f"{path}.{name}")
    assert reason in skipped.reason
    assert describe_fusion(model)["skipped"] == {kind: {skipped.reason: 1}}
    torch.testing.assert_close(model(prompt()).logits, own, atol=1e-4, rtol=1e-4)


def test_a_norm_without_weights_keeps_its_own_forward():
    model = tiny("llama")
    model.model.norm = _named("BareRMSNorm", nn.RMSNorm)(64, elementwise_affine=False)
    fuse_model(model)
    (skipped,) = [fusion for fusion in fusions(model) if fusion.reason]
    assert (skipped.module, skipped.reason) == ("model.norm", "it has other parameters than a weight of one dimension")


def _named(name: str, base: type) -> type:
    return type(name, (base,), {})


@torch.no_grad()
def test_a_rope_that_pairs_neighbours_is_left_alone():
    model = fuse_model(tiny("glm"))
    reasons = {fusion.reason for fusion in fusions(model) if fusion.kind == "rope"}
    assert len(reasons) == 1
    assert "not rotate-half" in reasons.pop()


@torch.no_grad()
def test_partial_rotary_dimensions_are_fused():
    model = tiny("phi3", partial_rotary_factor=0.5)
    assert model.model.rotary_emb.inv_freq.numel() == 4
    own = model(prompt()).logits
    fuse_model(model)
    assert fused_kinds(model)["rope"] == LAYERS
    torch.testing.assert_close(model(prompt()).logits, own, atol=1e-4, rtol=1e-4)
    assert describe_fusion(model)["unfused_calls"] == 0


def test_refused_with_a_reason():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        fuse_model(model.train())
    fuse_model(model.eval())
    with pytest.raises(ValueError, match="fused already"):
        fuse_model(model)
