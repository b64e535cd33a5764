"""The experts of one layer of a mixture: grouped products in fp8, ours and torch's, beside transformers' in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.grouped_linear import group_rows, grouped_linear
from kernels.quantize import QuantizedRows, quantize_rows
from stem_core.fp8 import Fp8Experts, find_experts
from tools.benchmark.elementwise.case import Case, ends

DEVICE = "cuda"
BF16 = torch.bfloat16


def expert_cases(shape: dict[str, Any], M: int) -> Iterator[Case]:
    """M tokens through the experts of one layer of the shape; nothing for a model without experts."""
    experts = _experts(shape)
    if experts is None:
        return
    count, width = experts.num_experts, shape["hidden_size"]
    generator = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(M, width, generator=generator, device=DEVICE, dtype=BF16)
    ids = torch.rand(M, count, generator=generator, device=DEVICE).argsort(-1)[:, : shape["num_experts_per_tok"]]
    shares = torch.rand(ids.shape, generator=generator, device=DEVICE, dtype=torch.float32).softmax(-1).to(BF16)
    picked = ends(ids), ends(shares)
    with torch.inference_mode(False):  # the weights are taken out of a copy
        quantised = Fp8Experts(_experts(shape), fast_accumulation=True)
    experts.config._experts_implementation = "grouped_mm"
    active = 2 * ids.numel() * (quantised.entry[0].numel() + quantised.down[0].numel())
    yield Case(
        f"experts fp8 [{count} x {width}], whole",
        lambda: quantised(x, ids, shares),
        lambda: experts(x, ids, shares),
        lambda: _true_experts(experts, ends(x), *picked),
        flops=active,
        slack=float("inf"),
        note="whole error of fp8",
    )
    flat = ids.reshape(-1)
    for part, repeat in (("entry", ids.shape[1]), ("down", 1)):
        weight, scale = getattr(quantised, part).data, getattr(quantised, f"{part}_scale").data
        inputs = x if part == "entry" else torch.randn(len(flat), weight.shape[2], device=DEVICE, dtype=BF16)
        rows = quantize_rows(inputs)

        def true(rows: QuantizedRows = rows, w: Tensor = weight, s: Tensor = scale, repeat: int = repeat) -> Tensor:
            chosen, source = ends(flat), ends(torch.arange(len(flat), device=DEVICE) // repeat)
            exact = rows.values[source].double() * rows.scales[source]
            products = [exact[i] @ w[e].double().t() * s[e] for i, e in enumerate(chosen.tolist())]
            return torch.stack(products)

        name, flops = f"[{weight.shape[2]} -> {weight.shape[1]}]", 2 * len(flat) * weight[0].numel()
        plain = weight.to(BF16)
        for fast in (True, False):
            yield Case(
                f"experts' {part} fp8{' fast' if fast else ''} {name}",
                lambda r=rows, w=weight, s=scale, fast=fast: grouped_linear(  # type: ignore[misc]
                    w, s, r, group_rows(ids, count), fast_accumulation=fast
                ),
                lambda i=inputs, w=plain, n=repeat: _torch_bf16(i, w, ids, n),  # type: ignore[misc]
                true,
                flops=flops,
                compared=False,
                note="routing included",
            )
            if DEVICE == "cuda":
                yield Case(
                    f"experts' {part} fp8{' fast' if fast else ''} {name}, torch._scaled_grouped_mm",
                    lambda r=rows, w=weight, s=scale, n=repeat, fast=fast: _torch_fp8(r, w, s, ids, n, fast)[0],  # type: ignore[misc]
                    None,
                    true,
                    flops=flops,
                    note="routing and gather included; no scatter",
                    checked=lambda r=rows, w=weight, s=scale, n=repeat, fast=fast: _in_place(  # type: ignore[misc]
                        *_torch_fp8(r, w, s, ids, n, fast)
                    ),
                )
        del plain


def _experts(shape: dict[str, Any]) -> Any:
    """The first layer's experts with random weights in bf16; None for a model without."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**shape, "num_hidden_layers": 1, "layer_types": None, "vocab_size": 64})
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=BF16).eval().requires_grad_(False)
    return next(iter(find_experts(model).values()), None)


def _true_experts(experts: Any, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    """float64, token by token."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, (chosen, weights) in enumerate(zip(ids.tolist(), shares.double(), strict=True)):
        for expert, weight in zip(chosen, weights, strict=True):
            inner = _product(experts, "gate_up_proj", expert, x[token].double())
            out[token] += weight * _product(experts, "down_proj", expert, experts._apply_gate(inner[None])[0])
    return out


def _product(experts: Any, name: str, expert: int, row: Tensor) -> Tensor:
    matrix = getattr(experts, name)[expert].double()
    bias = getattr(experts, f"{name}_bias")[expert].double() if experts.has_bias else 0.0
    return row @ (matrix if experts.is_transposed else matrix.t()) + bias


def _sorted(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    in_order, order = ids.reshape(-1).sort()
    ends = torch.searchsorted(in_order, torch.arange(experts, device=ids.device), right=True)
    return order, ends.int()


def _torch_bf16(x: Tensor, weight: Tensor, ids: Tensor, repeat: int) -> Tensor:
    """As transformers calls torch's grouped product: rows gathered, the output in sorted order."""
    order, offsets = _sorted(ids, len(weight))
    return F.grouped_mm(x[order // repeat], weight.mT, offs=offsets)


def _torch_fp8(
    rows: QuantizedRows, weight: Tensor, scale: Tensor, ids: Tensor, repeat: int, fast: bool
) -> tuple[Tensor, Tensor]:
    """torch's grouped product in fp8 (Hopper), scales by row and by channel: the output in sorted order, and the order.

    In rows' dimension its groups need no alignment: rows of K bytes, K a multiple of 16, begin where TMA can read.
    """
    order, offsets = _sorted(ids, len(weight))
    source = order // repeat
    values = rows.values.view(torch.uint8)[source].view(rows.values.dtype)
    out = torch._scaled_grouped_mm(
        values, weight.mT, rows.scales[source, 0], scale, offs=offsets, out_dtype=BF16, use_fast_accum=fast
    )
    return out, order


def _in_place(out: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(out).index_copy_(0, order, out)
