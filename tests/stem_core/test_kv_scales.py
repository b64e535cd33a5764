"""Calibration of fp8 scales: what it saw fits, with the room that was asked for, and nothing of it stays behind."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kernels.fp8_heads import quantize_heads
from stem_core import patch_model
from stem_core.kv_scales import calibrate, from_dict, power_of_two_scale, recording, to_dict

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
    with recording() as peaks, torch.inference_mode():
        for prompt in prompts():
            model(input_ids=torch.tensor([prompt]))
    scales = calibrate(model, prompts(), headroom=4).scales
    assert sorted(scales) == [0, 1, 2]
    for layer, heads in scales.items():
        assert (heads.q.shape, heads.k.shape, heads.v.shape) == ((4,), (2,), (2,))
        for scale, peak in zip((heads.q, heads.k, heads.v), peaks[layer], strict=True):
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
        with recording() as peaks:
            pass
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not peaks


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
    scales = calibrate(model, prompts()).scales
    content = json.loads(json.dumps(to_dict(scales)))
    restored = from_dict(content, torch.device("cpu"))
    for layer, heads in scales.items():
        for name in ("q", "k", "v"):
            assert torch.equal(getattr(restored[layer], name), getattr(heads, name))


def test_what_cannot_be_calibrated_is_refused(model):
    with pytest.raises(ValueError, match="at least one prompt"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="tokens in each"):
        calibrate(model, [[1], []])
    with pytest.raises(ValueError, match="headroom must be at least 1"):
        calibrate(model, prompts(), headroom=0.5)
    with pytest.raises(ValueError, match="patch_model first"):
        calibrate(AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa"), prompts(1))
