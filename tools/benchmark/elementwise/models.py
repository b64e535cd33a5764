"""Transformers' model of a few layers, unfused against fused, in bf16 and fp8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stem_core.fp8 import quantize_linears
from stem_core.fuse import describe_fusion, fuse_model
from tools.benchmark.elementwise.case import SAMPLE, Case
from tools.benchmark.elementwise.cases import BF16, DEVICE

VOCABULARY = 512


def model_cases(shape: dict[str, Any], layers: int, counts: list[int]) -> Iterator[tuple[Case, int]]:
    """The model's own attention, no cache. Few rows: a decode step of as many sequences; many: one prompt.

    Errors are those of the logits of a short prompt, against the model in float64; timings are of the whole model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**shape, "num_hidden_layers": layers, "vocab_size": VOCABULARY})

    def build(dtype: torch.dtype = BF16) -> Any:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            return AutoModelForCausalLM.from_config(config, dtype=BF16).to(dtype).eval().requires_grad_(False)

    # Outside of inference mode: the weights are changed in place.
    with torch.inference_mode(False):
        models = {
            "fused": fuse_model(build()),
            "fused, fp8": fuse_model(quantize_linears(build())),
            "fused, fp8 fast": fuse_model(quantize_linears(build(), fast_accumulation=True)),
        }
        plain, float64 = build(), build(torch.float64)
    prompt = _ids(1, 2 * SAMPLE)
    truth = float64(input_ids=prompt, use_cache=False).logits[0]
    del float64
    for count in counts:
        step = count < 1024
        ids = _ids(count, 1) if step else _ids(1, count)
        # Given a mask of four dimensions, transformers does not look into the positions, which waits for the device.
        mask = torch.ones(count, 1, 1, 1, dtype=torch.bool, device=DEVICE) if step else None
        for name, model in models.items():

            def run(model: Any, ids: Tensor = ids, mask: Tensor | None = mask) -> Tensor:
                return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]

            def logits(model: Any) -> Tensor:
                return model(input_ids=prompt, use_cache=False).logits[0]

            skipped = describe_fusion(model)["skipped"]
            yield (
                Case(
                    f"model of {layers} layers, {name}",
                    lambda model=model, run=run: run(model),  # type: ignore[misc]
                    lambda run=run: run(plain),  # type: ignore[misc]
                    lambda: truth,
                    checked=lambda model=model: logits(model),  # type: ignore[misc]
                    checked_eager=lambda: logits(plain),
                    slack=1.1 if name == "fused" else float("inf"),
                    note=f"not fused: {skipped}" if skipped else "",
                ),
                count,
            )


def _ids(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(VOCABULARY, (batch, length), generator=generator).to(DEVICE)
