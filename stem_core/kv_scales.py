"""Static fp8 scales of queries, keys and values, one for each layer and head, from a calibration run.

A scale is a power of two with room for values HEADROOM times as large as those seen: e4m3 is a floating format, so that
room costs no precision (kernels.fp8_heads has the measurement), and a power of two makes scaling itself exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernels.fp8_heads import FP8_MAX, HeadScales
from stem_core.attention import attention_forward
from stem_core.patch import ATTENTION_NAME
from stem_core.policy import LayerPolicy

HEADROOM = 16.0

# Largest magnitudes by layer: q [H], k [Hkv], v [Hkv], float32.
Peaks = dict[int, tuple[Tensor, Tensor, Tensor]]


def calibrate(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, headroom: float = HEADROOM
) -> dict[int, HeadScales]:
    """Scales of every attention layer of a patched model (`patch_model`), by layer index, on the layers' devices.

    prompts: token ids, each run by itself, without a cache. They should look like the production's own prompts, the
        first token included: models put their largest keys on it. A few thousand tokens do.
    headroom: how much larger than any value seen a value may be before it saturates; at least 1.
    Raises ValueError without prompts, for an empty one, for values that are not finite, or where no attention layer of
    the model ran through Stem.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("calibration needs at least one prompt, and tokens in each")
    if not headroom >= 1:
        raise ValueError(f"headroom must be at least 1, got {headroom}")
    device = next(model.parameters()).device
    with recording() as peaks, torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([list(map(int, prompt))], device=device)
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if not peaks:
        raise ValueError(f"no attention layer of {type(model).__name__} ran through Stem: call patch_model first")
    return {layer: _scales(layer, *found, headroom) for layer, found in sorted(peaks.items())}


@contextmanager
def recording() -> Iterator[Peaks]:
    """Inside, every call of Stem's attention function notes the largest magnitudes of its queries, keys and values."""
    from transformers import AttentionInterface

    peaks: Peaks = {}

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        policy: LayerPolicy | None = getattr(module, "stem_policy", None)
        if policy is not None:
            found = tuple(x.detach().abs().amax(dim=(0, 2, 3)).float() for x in (query, key, value))
            before = peaks.get(policy.layer, found)
            peaks[policy.layer] = tuple(map(torch.maximum, before, found))  # type: ignore[assignment]
        return attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(ATTENTION_NAME, note)
    try:
        yield peaks
    finally:
        AttentionInterface.register(ATTENTION_NAME, attention_forward)


def _scales(layer: int, q: Tensor, k: Tensor, v: Tensor, headroom: float) -> HeadScales:
    for name, peak in (("queries", q), ("keys", k), ("values", v)):
        if not bool(peak.isfinite().all()):
            raise ValueError(f"the {name} of layer {layer} are not finite: no fp8 scale fits them")
    return HeadScales(*(power_of_two_scale(peak, headroom) for peak in (q, k, v)))


def power_of_two_scale(peak: Tensor, headroom: float = HEADROOM) -> Tensor:
    """The least power of two that keeps headroom * peak within e4m3's 448; 1 for a head of zeros. float32."""
    # On the host: torch.ldexp launches its kernel on the current GPU, whichever its arguments are on, and then it waits
    # for none of the work that they and its result's memory come from (https://github.com/pytorch/pytorch/issues/189567).
    wanted = peak.double().cpu() * headroom / FP8_MAX
    mantissa, exponent = torch.frexp(wanted)
    # frexp gives 0.5 <= mantissa < 1; a power of two itself is 0.5 * 2^exponent.
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scale = torch.where(wanted > 0, torch.ldexp(torch.ones_like(wanted), exponent), 1.0)
    return scale.float().to(peak.device)


def to_dict(scales: dict[int, HeadScales]) -> dict[str, dict[str, list[int]]]:
    """Plain values for a JSON file: layer -> the exponents of two. Raises ValueError for other scales."""

    def exponents(scale: Tensor) -> list[int]:
        found = [math.frexp(value) for value in scale.tolist()]
        if any(mantissa != 0.5 for mantissa, _ in found):
            raise ValueError("only scales that are powers of two can be written")
        return [exponent - 1 for _, exponent in found]

    return {
        str(layer): {name: exponents(getattr(heads, name)) for name in ("q", "k", "v")}
        for layer, heads in scales.items()
    }


def from_dict(content: dict[str, dict[str, list[int]]], device: torch.device) -> dict[int, HeadScales]:
    """The inverse of `to_dict`."""

    def scale(exponents: list[int]) -> Tensor:
        return torch.tensor([2.0**exponent for exponent in exponents], device=device)

    return {
        int(layer): HeadScales(*(scale(heads[name]) for name in ("q", "k", "v"))) for layer, heads in content.items()
    }
