"""fp8 linears: exact against their own definition, close to the model they replace, fused without a change."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from kernels.quantize import quantize_rows
from kernels.skinny_linear import MAX_ROWS
from stem_core.fp8 import Fp8Linear, describe_fp8, quantize_linears, scaled_linear, sensitive_linears
from stem_core.fuse import fuse_model, fusions, unfuse_model
from tests.stem_core.test_fuse import LAYERS, prompt, tiny

LINEARS = 7 * LAYERS


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_linear_equals_its_dequantised_product(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias, dtype=dtype)
    x = torch.randn(2, 5, 64, dtype=dtype)
    fp8 = Fp8Linear.from_linear(linear)
    weight = fp8.weight.double() * fp8.weight_scale.double().t()
    # one step of e4m3 is 1/8 of a number, rounding at most half of it
    assert ((weight - linear.weight.double()).abs() <= weight.abs() / 15 + fp8.weight_scale.double().t() / 512).all()
    rows = quantize_rows(x)
    exact = rows.values.double() * rows.scales.double() @ weight.t() + (linear.bias.double() if bias else 0)
    got = fp8(x)
    assert got.dtype == dtype
    assert relative(got, exact) < max(torch.finfo(dtype).eps / 2, 1e-6)
    assert torch.equal(fp8(rows), got)
    assert relative(got, linear(x)) < 0.06


@torch.no_grad()
def test_on_a_cpu_no_product_depends_on_its_instructions(monkeypatch):
    """`torch._scaled_mm` takes other paths, one of them seconds long, on CPUs with AMX."""

    def refused(*args, **kwargs):
        raise AssertionError("torch._scaled_mm on a CPU")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    model = quantize_linears(tiny("llama"))
    assert model(prompt()).logits.isfinite().all()


# family: (linears in fp8, norms that write fp8)
FAMILIES = {
    "llama": (LINEARS, 2 * LAYERS),
    "llama-bias": (LINEARS, 2 * LAYERS),
    "qwen3": (LINEARS, 2 * LAYERS),
    "phi3": (4 * LAYERS, 2 * LAYERS),
    "gemma3_text": (LINEARS, 2 * LAYERS),
    # normalises what comes out of attention and MLP, not what goes in
    "olmo2": (LINEARS, 0),
    # the norm before the experts feeds a router and stacked weights
    "qwen3_moe": (4 * LAYERS, LAYERS),
    "qwen3_moe-mixed": (4 * LAYERS + 3, LAYERS + 1),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fusing_changes_nothing_in_a_quantised_model(family):
    linears, norms = FAMILIES[family]
    model = tiny(family)
    ids = prompt()
    original = model(ids).logits
    quantize_linears(model)
    assert describe_fp8(model)["linears"] == linears
    assert type(model.lm_head) is nn.Linear
    alone = model(ids).logits
    assert 0 < relative(alone, original) < 0.2

    fuse_model(model)
    kinds = Counter(fusion.kind for fusion in fusions(model) if not fusion.reason)
    assert kinds["fp8_norm"] == norms
    assert kinds["qkv_projection"] == (0 if family == "phi3" else LAYERS)
    fused = model(ids).logits
    # Sums in another order can flip an fp8 rounding; where none flips they agree to float32 noise.
    assert relative(fused, alone) < 0.02
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, ids.shape[1] + 4)
    assert torch.equal(unfuse_model(model)(ids).logits, alone)


@torch.no_grad()
def test_the_norm_before_experts_says_why_it_writes_no_fp8():
    model = fuse_model(quantize_linears(tiny("qwen3_moe")))
    # only projections of the attention are fp8: nothing that reads the second norm is
    readers = {fusion.module for fusion in fusions(model) if fusion.kind == "fp8_norm"}
    assert readers == {f"model.layers.{i}.input_layernorm" for i in range(LAYERS)}


class Curious(nn.Module):
    """An attention that looks at its input twice."""

    def __init__(self, attention):
        super().__init__()
        self.inner = attention

    def forward(self, hidden_states, **kwargs):
        out, weights = self.inner(hidden_states=hidden_states, **kwargs)
        return out + 0.1 * hidden_states, weights


@torch.no_grad()
def test_a_layer_that_reads_the_rows_itself_keeps_its_norm():
    model = quantize_linears(tiny("llama"))
    model.model.layers[1].self_attn = Curious(model.model.layers[1].self_attn)
    alone = model(prompt()).logits
    fuse_model(model)
    (skipped,) = [fusion for fusion in fusions(model) if fusion.kind == "fp8_norm" and fusion.reason]
    assert skipped.module == "model.layers.1.input_layernorm"
    assert "more with it than pass it to linears" in skipped.reason
    assert relative(model(prompt()).logits, alone) < 0.02


@torch.no_grad()
def test_the_probe_leaves_rotary_modules_as_they_were():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    model = quantize_linears(tiny("phi3", rope_parameters=rope, original_max_position_embeddings=128))
    rotary = model.model.rotary_emb
    before = set(vars(rotary)), {name: buffer.clone() for name, buffer in rotary.named_buffers()}
    fuse_model(model)
    assert set(vars(rotary)) == before[0]
    assert not hasattr(rotary, "long_inv_freq")
    assert dict(rotary.named_buffers()).keys() == before[1].keys()
    assert all(torch.equal(buffer, before[1][name]) for name, buffer in rotary.named_buffers())
    model(prompt(200, 1))
    assert hasattr(rotary, "long_inv_freq")  # what a run does to it


@torch.no_grad()
def test_rows_are_quantised_once_for_all_who_read_them(monkeypatch):
    calls = Counter()
    from stem_core.fp8 import linear as fp8_linear
    from stem_core.fuse import mlp, norms, projections

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for module, name in (
        (fp8_linear, "quantize_rows"),
        (projections, "quantize_rows"),
        (mlp, "quantize_rows"),
        (mlp, "silu_mul_fp8"),
        (norms, "rms_norm_fp8"),
    ):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    model = fuse_model(quantize_linears(tiny("llama")))
    calls.clear()
    model(prompt())
    assert calls == {"rms_norm_fp8": 2 * LAYERS, "silu_mul_fp8": LAYERS, "quantize_rows": LAYERS}  # o_proj


@torch.no_grad()
def test_what_stays_in_its_dtype_is_named():
    model = tiny("llama", intermediate_size=100, tie_word_embeddings=True)
    quantize_linears(model, skip=("lm_head", "o_proj", "model.layers.0.self_attn.q_proj"))
    assert describe_fp8(model) == {
        "linears": 2 * LAYERS + LAYERS - 1,
        "experts": 0,
        "kept": {"skipped": 1 + LAYERS + 1, "its sizes are no multiples of 16": 3 * LAYERS},
        "fast_accumulation": False,
    }
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@torch.no_grad()
def test_projections_of_two_kinds_are_no_one_gemm():
    model = tiny("llama")
    ids = prompt()
    quantize_linears(model, skip=("lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.q_proj"))
    alone = model(ids).logits
    fuse_model(model)
    reasons = {f.module: f.reason for f in fusions(model) if f.kind == "qkv_projection"}
    assert reasons["model.layers.0.self_attn"] == "the projections are not plain linears of one kind"
    # k and v are
    assert reasons["model.layers.1.self_attn"] == ""
    attention = model.model.layers[1].self_attn
    assert ["forward" in vars(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)] == [
        False, True, True,
    ]  # fmt: skip
    assert relative(model(ids).logits, alone) < 0.02


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
@torch.no_grad()
def test_what_is_sensitive_to_rounding_stays(family):
    model = quantize_linears(tiny(family), sensitive_linears(tiny(family)))
    last = f"model.layers.{LAYERS - 1}."
    kinds = {name: type(m) for name, m in model.named_modules() if type(m) in (nn.Linear, Fp8Linear)}
    wide = {name for name, kind in kinds.items() if kind is nn.Linear}
    kept = {"lm_head", "k_proj", "v_proj"}
    assert wide == {name for name in kinds if name.startswith(last) or name.rpartition(".")[2] in kept}
    assert describe_fp8(model)["experts"] == (LAYERS if family == "qwen3_moe" else 0)
    alone = model(prompt()).logits
    fuse_model(model)
    fused = {f.module for f in fusions(model) if f.kind == "qkv_projection" and not f.reason}
    assert len(fused) == (0 if family == "phi3" else LAYERS)
    assert relative(model(prompt()).logits, alone) < 0.02


def test_a_model_of_one_layer_has_something_in_fp8():
    model = quantize_linears(tiny("llama", num_hidden_layers=1), sensitive_linears(tiny("llama", num_hidden_layers=1)))
    assert describe_fp8(model)["linears"] == 5


@torch.no_grad()
def test_memory_is_a_byte_a_weight():
    model = tiny("llama")
    weights = sum(m.weight.numel() for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head")
    quantize_linears(model)
    quantised = [m for m in model.modules() if isinstance(m, Fp8Linear)]
    assert sum(m.weight.nbytes for m in quantised) == weights


def test_errors_say_what_to_do(monkeypatch):
    model = tiny("llama")
    with pytest.raises(ValueError, match="before fuse_model"):
        quantize_linears(fuse_model(model))
    with pytest.raises(ValueError, match="no linear to quantise"):
        quantize_linears(nn.Sequential(nn.Linear(3, 3)))
    converted = quantize_linears(unfuse_model(model)).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"never \.to\(dtype\)"):
        converted(prompt())
    monkeypatch.setattr("kernels.device.capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"compute capability 8\.9"):
        quantize_linears(tiny("llama"), device="cuda")


def test_stacked_experts_stay():
    model = quantize_linears(tiny("qwen3_moe"))
    assert not any("experts" in name for name, m in model.named_modules() if isinstance(m, Fp8Linear))


@pytest.mark.parametrize("fast", [False, True])
def test_fast_accumulation_is_the_callers_choice(fast):
    model = quantize_linears(tiny("llama"), fast_accumulation=fast)
    assert describe_fp8(model)["fast_accumulation"] is fast
    rows = quantize_rows(torch.randn(4, 64))
    linear = model.model.layers[0].mlp.up_proj
    got = scaled_linear(rows, linear.weight, linear.weight_scale, fast_accumulation=fast)
    assert relative(got, rows.dequantize() @ (linear.weight.float() * linear.weight_scale.t()).t()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, MAX_ROWS, MAX_ROWS + 1])
@torch.no_grad()
def test_few_rows_and_many_are_the_same_linear_on_a_gpu(rows):
    """A few take `skinny_linear`, more take cuBLAS."""
    torch.manual_seed(0)
    linear = nn.Linear(1024, 2048, dtype=torch.bfloat16, device="cuda")
    fp8 = Fp8Linear.from_linear(linear)
    x = torch.randn(1, rows, 1024, dtype=torch.bfloat16, device="cuda")
    quantized = quantize_rows(x)
    exact = quantized.values.double() * quantized.scales @ (fp8.weight.double() * fp8.weight_scale.t()).t()
    got = fp8(x)
    assert got.dtype == x.dtype
    assert relative(got, exact + linear.bias.double()) < torch.finfo(x.dtype).eps
