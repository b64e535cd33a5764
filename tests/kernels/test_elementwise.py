"""Row-wise operations: the references against float64, the kernels compiled for Ampere, Ada and Hopper."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from kernels.quantize import quantize_rows
from kernels.rms_norm import rms_norm, rms_norm_fp8
from kernels.rope import apply_rope
from kernels.silu_mul import silu_mul, silu_mul_fp8
from tests.kernels import elementwise_cases as cases
from tests.kernels import offline

CHECKS = [cases.check_rms_norm, cases.check_fp8, cases.check_silu_mul, cases.check_rope]
BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_reference_matches_float64(check, dtype):
    check(dtype, "reference", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_triton_matches_float64(check, dtype):
    check(dtype, "triton", "cuda")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@torch.no_grad()
def test_rounding_is_that_of_transformers(dtype):
    x = cases.random(2, 9, 64, dtype=dtype)
    for module, offset, early in (
        (LlamaRMSNorm(64, cases.EPS), 0.0, True),
        (Olmo2RMSNorm(64, cases.EPS), 0.0, False),
        (GemmaRMSNorm(64, cases.EPS), 1.0, False),
    ):
        module.to(dtype).weight.copy_(cases.random(64, seed=2))
        got = rms_norm(x, module.weight, cases.EPS, weight_offset=offset, round_before_weight=early)
        assert torch.equal(got, module(x))
    q, k = cases.random(1, 4, 9, 16, dtype=dtype), cases.random(1, 2, 9, 16, dtype=dtype, seed=1)
    cos, sin = cases.random(1, 9, 16, dtype=dtype, seed=2), cases.random(1, 9, 16, dtype=dtype, seed=3)
    for got, wanted in zip(apply_rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(got, wanted)


def launch_all(fp8: bool, batch: int = 2, length: int = 16) -> None:
    x, w = torch.empty(batch, length, 4096, dtype=BF16), torch.empty(4096, dtype=BF16)
    heads = torch.empty(batch, length, 48, 128, dtype=BF16)
    gate_up = torch.empty(batch * length, 2 * 14336, dtype=BF16)
    gate, up = gate_up.chunk(2, dim=-1)
    if fp8:
        rms_norm_fp8(x, w, 1e-5, impl="triton")
        silu_mul_fp8(gate, up, impl="triton")
        quantize_rows(x, impl="triton")
    else:
        rms_norm(x, w, 1e-5, impl="triton")
        rms_norm(heads[:, :, :32], w[:128], 1e-5, impl="triton")
        silu_mul(gate, up, impl="triton")
        q, k = heads[:, :, :32].transpose(1, 2), heads[:, :, 32:40].transpose(1, 2)
        angles = torch.empty(batch, length, 128, dtype=BF16)
        apply_rope(q, k, angles, angles, impl="triton")


@pytest.mark.parametrize(("capability", "fp8"), [((8, 0), False), ((9, 0), False), ((8, 9), True), ((9, 0), True)])
def test_kernels_compile_without_spills(capability, fp8, monkeypatch):
    # The launch checks ask for a GPU; compiling needs none.
    monkeypatch.setattr("kernels.dispatch.triton_unavailable", lambda device: "")
    for report in offline.compile_reports(lambda: launch_all(fp8), capability):
        assert report.spills == 0, str(report)


@pytest.mark.parametrize(("fp8", "kernels"), [(False, 4), (True, 3)])
def test_no_kernel_is_compiled_anew_for_another_number_of_tokens(fp8, kernels, monkeypatch):
    monkeypatch.setattr("kernels.dispatch.triton_unavailable", lambda device: "")
    with offline.compiling((9, 0)) as compiled:
        for batch, length in ((1, 8192), (1, 1), (1, 777), (3, 1), (16, 1)):
            launch_all(fp8, batch, length)
    assert len({kernel.hash for kernel in compiled}) == kernels


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: rms_norm(x.long(), w, 1e-6), "one type out of bfloat16"),
        (lambda x, w: rms_norm(x.mT, w[:3], 1e-6), "last dimension must be contiguous"),
        (lambda x, w: rms_norm(x, w[:4], 1e-6), r"weight must be contiguous \[8\]"),
        (lambda x, w: rms_norm(x.bfloat16(), w, 1e-6), "weight must be torch.bfloat16"),
        (lambda x, w: rms_norm(x, None, 1e-6, weight_offset=1.0), "needs a weight"),
        (lambda x, w: rms_norm(x, w, 1e-6, impl="gluon"), "no gluon implementation"),
        (lambda x, w: rms_norm(x, w, 1e-6, impl="triton"), "need a CUDA device"),
        (lambda x, w: silu_mul(x, x[..., :4]), "gate and up must agree"),
        (lambda x, w: silu_mul(x, x, activation="relu"), "activation must be one of"),
        (lambda x, w: quantize_rows(x.expand(4, 3, 8).transpose(0, 1)), "rows must be evenly spaced"),
        (lambda x, w: apply_rope(x, x, x, x), "must agree"),
        (lambda x, w: apply_rope(x[None, None], x[None, None], x[None, :, :3], x[None, :, :3]), "even number"),
        (lambda x, w: apply_rope(x[None, None], x[None, None], x[None, :2], x[None, :2]), "cos and sin must be"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(cases.random(3, 8), cases.random(8))


def test_fp8_on_a_gpu_without_it_says_so(monkeypatch):
    monkeypatch.setattr("kernels.device.capability", lambda device: (8, 0))
    from kernels.quantize import choose_row_kernel

    with pytest.raises(ValueError, match=r"fp8 needs compute capability 8\.9.* has 8\.0"):
        choose_row_kernel("quantize_rows", torch.device("cuda"), fp8=True)
