"""Calibration of fp8 scales: what it saw fits, with the room that was asked for, and nothing of it stays behind."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kernels.fp8_heads import quantize_heads
from stem_core import patch_model
from stem_core.kv_scales import calibrate, power_of_two_scale, recording, rounding_errors

VOCAB = 97


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
    )
    return patch_model(AutoModelForCausalLM.from_config(config).eval(), None)


def prompts(count=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (40 + 13 * i,), generator=generator).tolist() for i in range(count)]


def test_scales_are_the_least_powers_of_two_with_headroom(model):
    with recording() as seen, torch.inference_mode():
        for prompt in prompts():
            model(input_ids=torch.tensor([prompt]))
    scales = calibrate(model, prompts(), headroom=4).scales
    assert sorted(scales) == [0, 1, 2]
    for layer, heads in scales.items():
        assert (heads.q.shape, heads.k.shape, heads.v.shape) == ((4,), (2,), (2,))
        found = seen[layer]
        peaks = found.q, found.k(heads.k_shift), found.v
        for scale, peak in zip((heads.q, heads.k, heads.v), peaks, strict=True):
            assert (scale * 448 >= peak * 4).all()
            assert (scale / 2 * 448 < peak * 4).all()
            assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))


def test_more_prompts_never_shrink_a_scale_and_the_order_does_not_matter(model):
    few, many, turned = (calibrate(model, x).scales for x in (prompts(1), prompts(3), prompts(3)[::-1]))
    for layer in few:
        for name in ("q", "k", "v"):
            assert (getattr(many[layer], name) >= getattr(few[layer], name)).all()
            assert torch.equal(getattr(many[layer], name), getattr(turned[layer], name))


def test_calibration_changes_nothing_and_leaves_nothing(model):
    ids = torch.tensor(prompts(1))
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        calibrate(model, prompts())
        with recording() as seen:
            pass
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not seen


def test_values_seen_in_calibration_do_not_saturate(model):
    scales = calibrate(model, prompts(), headroom=1).scales[0]
    x = torch.randn(1, 4, 8, 16)
    x *= (scales.q * 448)[:, None, None] / x.abs().amax()
    restored = quantize_heads(x, scales.q).float() * scales.q[:, None, None]
    assert ((restored - x).abs() <= x.abs() / 16 + scales.q[:, None, None] * 2**-10).all()
    far = quantize_heads(x * 1e9, scales.q).float()
    assert far.isfinite().all()
    assert far.abs().amax() == 448


def test_exact_powers_zeros_and_round_trip(model):
    scale = power_of_two_scale(torch.tensor([448.0, 449.0, 0.0, 7.0, 1e-30]), headroom=1)
    assert scale.tolist() == [1.0, 2.0, 1.0, 2.0**-6, 2.0**-108]


def biased(sinks=False):
    """A model whose keys have biases: of 30 in each head's last channel, which turns once in 20,000 tokens, and of 3 in
    the first, which turns once in six.
    """
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    kind = {"num_local_experts": 2, "num_experts_per_tok": 1} if sinks else {}
    config = AutoConfig.for_model("gpt_oss" if sinks else "qwen2", **sizes, **kind)
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.view(2, 16, 64)[:, 15].mul_(10)
            layer.self_attn.k_proj.bias.zero_().view(2, 16)[:, [0, 15]] = torch.tensor([3.0, 30.0])
    return patch_model(made, None)


def test_what_all_keys_have_in_common_is_taken_from_them():
    model = biased()
    calibration = calibrate(model, prompts(3), context=1000)
    for layer in range(2):
        shift = calibration.scales[layer].k_shift
        assert shift.shape == (2, 16)
        assert (shift[:, 15] - 30).abs().max() < 4
        assert not shift[:, 0].any(), "it turns with the position"
    beginning = calibrate(model, prompts(3)).scales[0]
    assert (beginning.k_shift[:, 15] - 30).abs().max() < 4
    plain = {layer: replace(heads, k_shift=None) for layer, heads in calibration.scales.items()}
    errors = rounding_errors(model, prompts(3), plain)
    assert all(calibration.errors[layer] < 0.8 * max(errors[layer]) for layer in errors)


def test_what_all_queries_have_in_common_is_taken_from_them():
    model = biased()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.05)
            layer.self_attn.q_proj.bias.zero_().view(4, 16)[:, [7, 15]] = torch.tensor([50.0, -40.0])
    calibration = calibrate(model, prompts(3))
    for scales in calibration.scales.values():
        assert scales.q_mean.shape == (4, 16)
        assert torch.equal(scales.q_mean, scales.q_mean.bfloat16().float()), "the same on every GPU"
        assert (scales.q_mean[:, [7, 15]] - torch.tensor([50.0, -40.0])).abs().max() < 1
    plain = {layer: replace(heads, q_mean=None) for layer, heads in calibration.scales.items()}
    before = rounding_errors(model, prompts(3), plain)
    after = rounding_errors(model, prompts(3), calibration.scales)
    for layer, (prefill, decode) in after.items():
        assert prefill < 0.6 * before[layer][0]
        assert decode == before[layer][1], "whole queries"
        assert calibration.errors[layer] == max(prefill, decode) == decode, "what harms decoding harms the layer"


def test_layers_with_sinks_keep_their_keys():
    scales = calibrate(biased(sinks=True), prompts(3), context=4096).scales
    assert scales
    assert not any(heads.k_shift.any() for heads in scales.values() if heads is not None)


def test_what_cannot_be_calibrated_is_refused(model):
    with pytest.raises(ValueError, match="at least one prompt"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="tokens in each"):
        calibrate(model, [[1], []])
    with pytest.raises(ValueError, match="headroom must be at least 1"):
        calibrate(model, prompts(), headroom=0.5)
    with pytest.raises(ValueError, match="patch_model first"):
        calibrate(AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa"), prompts(1))
