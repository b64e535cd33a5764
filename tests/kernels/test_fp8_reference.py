"""The fp8 references against the formulas written out, and a document written, prefilled and decoded through them."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.block_sparse_attention import block_sparse_attention
from kernels.block_sparse_attention_fp8 import block_sparse_attention_fp8, choose_block_sparse_attention_fp8
from kernels.decode_attention_fp8 import decode_attention_fp8
from kernels.fp8_heads import FP8, HeadScales, append_kv, quantize_heads, write_kv
from kernels.fp8_heads.reference import quantize, restore_keys, store_order
from tests.kernels import fp8_cases as cases
from tests.kernels.attention_cases import Case

HEADS, KV_HEADS, DIM = 4, 2, 32


def tensors(length: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, length, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def arenas(tokens: int) -> list[torch.Tensor]:
    shapes = (KV_HEADS, tokens, DIM), (KV_HEADS, DIM, tokens)
    return [torch.full(shape, 0x7F, dtype=torch.uint8).view(FP8) for shape in shapes]


def scales() -> HeadScales:
    return HeadScales(torch.full((HEADS,), 2.0**-4), torch.full((KV_HEADS,), 2.0**-5), torch.full((KV_HEADS,), 2.0**-6))


def test_stored_order_is_the_published_permutation() -> None:
    keys = torch.arange(48.0)
    stored = store_order(keys)
    for group in range(3):
        for t in range(4):
            for j in range(2):
                for e in range(2):
                    assert stored[16 * group + 4 * t + 2 * j + e] == 16 * group + 8 * j + 2 * t + e
    assert torch.equal(restore_keys(stored), keys)


def test_values_saturate_and_stay_finite() -> None:
    x = torch.tensor([1e9, -1e9, math.inf, -math.inf, 0.0, 1.0, 464.0, 465.0, 2.0**-9, 2.0**-11])
    got = quantize(x, torch.tensor(1.0)).float().tolist()
    assert got == [448.0, -448.0, 448.0, -448.0, 0.0, 1.0, 448.0, 448.0, 2.0**-9, 0.0]
    assert quantize(torch.tensor(math.nan), torch.tensor(1.0)).float().isnan()


def test_attention_equals_the_formula() -> None:
    length, scale = 37, 0.3
    s = scales()
    q, k, v = (quantize(x, y[:, None, None]) for x, y in zip(tensors(length), (s.q, s.k, s.v), strict=True))
    stored = store_order(torch.nn.functional.pad(v.float(), (0, 0, 0, 11)).to(FP8).mT)
    out = block_sparse_attention_fp8(q, k, stored, s, None, scale=scale, dtype=torch.float32, impl="reference")
    for h in range(HEADS):
        for t in range(length):
            logits = (q[0, h, t].float() * s.q[h]) @ (k[0, h // 2, : t + 1].float() * s.k[h // 2]).T * scale
            weights = (logits - logits.max()).exp()
            rounded = (weights * 256).to(FP8).float() / 256
            wanted = rounded @ (v[0, h // 2, : t + 1].float() * s.v[h // 2]) / rounded.sum()
            torch.testing.assert_close(out[0, h, t], wanted, atol=1e-5, rtol=1e-5)  # type: ignore[index]


@pytest.mark.parametrize("case", [Case(100, start=64, block_size=32, head_dim=64, unknown=40, dtype=torch.float32)])
def test_cases_hold_for_the_reference(case: Case, poisoned: None) -> None:
    cases.check_attention(case, "reference", "cpu")
    cases.check_writing(70, torch.bfloat16, 96, "reference", "cpu")
    cases.check_key_bias(70, torch.bfloat16, 96, "reference", "cpu")
    cases.check_decode(cases.DECODE[1], "reference", "cpu")


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_a_document_in_chunks_and_token_by_token(length: int) -> None:
    """Prefill in chunks equals prefill in one piece; decoding sees the same keys as prefill; the error is fp8's own."""
    q, k, v = tensors(length + 20)
    s = scales()
    start = 64
    whole, pieces = arenas(256), arenas(256)
    write_kv(k[:, :, :length], v[:, :, :length], s, *whole, start, impl="reference")
    for begin in range(0, length, 32):
        part = slice(begin, min(begin + 32, length))
        write_kv(k[:, :, part], v[:, :, part], s, *pieces, start + begin, impl="reference")
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(whole, pieces, strict=True))

    for token in range(length, length + 20):
        slots = torch.tensor([start + token])
        append_kv(k[0, :, token][None], v[0, :, token][None], s, *pieces, slots, impl="reference")
    total = length + 20
    room = -(-total // 16) * 16
    q8 = quantize_heads(q, s.q, impl="reference")
    k8, vt8 = pieces[0][None, :, start : start + total], pieces[1][None, :, :, start : start + room]
    prefilled = block_sparse_attention_fp8(q8, k8, vt8, s, None, dtype=torch.float32, impl="reference")
    decoded = decode_attention_fp8(
        q[0, :, -1][None], *pieces, s, torch.tensor([start]), torch.tensor([total], dtype=torch.int32),
        max_length=total, impl="reference",
    )  # fmt: skip
    exact = block_sparse_attention(q, k, v, None, impl="reference")
    assert isinstance(prefilled, torch.Tensor)
    assert isinstance(exact, torch.Tensor)
    # q, k, v and P each have 3 bits behind the point: 2.6% each, and the scores' error grows with their size.
    assert (prefilled - exact).norm() / exact.norm() < 0.1
    assert (decoded[0] - exact[0, :, -1]).norm() / exact[0, :, -1].norm() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 8, 32)}, "must be torch.float8_e4m3fn"),
        ({"q": torch.zeros(1, 3, 8, 32).to(FP8)}, "H be a multiple of Hkv"),
        ({"vt": torch.zeros(1, 2, 32, 8).to(FP8)}, "rounded up to 16, got 8"),
        ({"query_start": 20}, "must lie inside the 16 keys"),
        ({"block_size": 16}, r"block_size must be one of \(32"),
        ({"scales": HeadScales(torch.ones(4), torch.ones(2), torch.ones(3))}, r"scales.v must be float32 \[2\]"),
        ({"bias": torch.zeros(1, 2, 1, 7, 16).to(FP8)}, r"bias must be torch.float8_e4m3fn \[1, 2, 1, 8, 16\]"),
        ({"bias": torch.zeros(1, 2, 1, 8, 16, device="meta").to(FP8)}, "on cpu, .* on meta"),
        ({"impl": "cuda"}, "impl='cuda' is not known"),
        ({"impl": "gluon"}, "cannot run"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.zeros(1, 4, 8, 32).to(FP8),
        "k": torch.zeros(1, 2, 16, 32).to(FP8),
        "vt": torch.zeros(1, 2, 32, 16).to(FP8),
        "scales": scales(),
        "selection": None,
    }
    with pytest.raises(ValueError, match=message):
        block_sparse_attention_fp8(**{**arguments, **change})  # type: ignore[arg-type]


def test_writing_at_other_than_multiples_of_16_is_refused() -> None:
    _, k, v = tensors(20)
    with pytest.raises(ValueError, match="multiple of 16"):
        write_kv(k, v, scales(), *arenas(64), 8)
    with pytest.raises(ValueError, match="end inside"):
        write_kv(k, v, scales(), *arenas(64), 48)
    with pytest.raises(ValueError, match="arenas must be"):
        write_kv(k, v, scales(), arenas(64)[0], arenas(64)[0], 0)


def test_slots_that_are_not_behind_one_another_are_refused() -> None:
    _, k, v = tensors(20)
    slots = torch.zeros(1, dtype=torch.int64).expand(4)
    with pytest.raises(ValueError, match=r"slots must be contiguous int64 \[4\], .* strides \(0,\)"):
        append_kv(k[0].transpose(0, 1)[:4], v[0].transpose(0, 1)[:4], scales(), *arenas(64), slots)


def test_a_gpu_without_fp8_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.device.capability", lambda device: (8, 6))
    q = torch.empty(1, 4, 8, 64, device="meta")
    assert choose_block_sparse_attention_fp8(q, impl="reference").impl == "reference"
    from kernels.fp8_heads import fp8_obstacle

    assert "capability 8.9" in fp8_obstacle(torch.device("cuda", 0))
