"""Static fp8 scales of queries, keys and values, one for each layer and head, from a calibration run.

A scale is a power of two with room for values HEADROOM times as large as those seen: e4m3 is a floating format, so that
room costs no precision (kernels.fp8_heads has the measurement), and a power of two makes scaling itself exact.

No scale helps keys of which a few channels dwarf all others: 3% of such a channel, times the query, is noise of several
units in the logits. But what such channels hold is mostly the same for all keys (a bias of the projection, where the
channel's rotary frequency is low), and what is the same for all keys changes no softmax: it is taken from the keys
before they are rounded (the smoothing of keys of SageAttention, arXiv 2410.02367, by a mean from the calibration).

Most of a query is the mean query of its head, too (60 to 84% of the energy in Qwen2.5-Coder-0.5B and -1.5B). It is
taken from the queries of a prefill before they are rounded, and its products with the keys as they were before rounding
are added to the scores (SageAttention2's smoothing of queries, arXiv 2411.10958, by a mean from the calibration): so
neither is its own rounding felt, nor what it makes of the rounding of the keys. Of Qwen2.5-Coder-0.5B it takes 29% off
the KL of fp8 along a text of 2,048 tokens. Decoding, and the reading of a question behind its document, keep their
queries in 16 bits and add nothing.

Calibration also measures what rounding still does to each layer's output; a layer that it harms (WIDE_ERROR) gets no
scales: it is wide, its queries, keys and values stay in the model's own type. So do those of layers whose heads the fp8
kernels do not hold (MOST_FP8_HEAD).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernels.fp8_heads import FP8_MAX, HeadScales
from kernels.fp8_heads.reference import quantize
from stem_core.attention import attention_forward
from stem_core.context import PrefillContext
from stem_core.patch import ATTENTION_NAME
from stem_core.policy import LayerPolicy

HEADROOM = 16.0
# A layer whose attention output e4m3 changes by more than this share is wide. Found with the engine's calibration
# prompts (pipeline.engine.model.runner): Qwen2.5-0.5B 20% in layer 0, at most 11% in others; tiny-reader at most 5%.
# With keys as they are, Qwen2.5-1.5B had 36 and 47% in layer 0, which alone ruined the model, and at most 17% in
# others: the limit is halfway, as factors, between 17 and 36%.
WIDE_ERROR = 0.25
# D of the largest heads that the fp8 kernels take.
MOST_FP8_HEAD = 256
# Tokens of each prompt, its first ones, on which the errors are measured; attention is causal.
ERROR_TOKENS = 512

# Where the prompts of a calibration begin, as shares of the context: what keys have in common must be so at every
# position. Uneven, so that no rotary frequency has the same phase at all of them.
STARTS = (0.0, 0.13, 0.37, 0.61, 0.83, 0.97)
# A channel whose mean holds more than this share of its energy is shifted by it.
COMMON = 0.5


@dataclass
class Seen:
    """What a layer's heads held, float32. q [H], v [Hkv]: largest magnitudes.

    q_sum [H, D]; k_sum, k_squares, k_highest, k_lowest [Hkv, D]: over all tokens of all prompts. shifts: whether the
    layer's softmax bears a shift of its logits (it has no sinks).
    """

    q: Tensor
    v: Tensor
    q_sum: Tensor
    k_sum: Tensor
    k_squares: Tensor
    k_highest: Tensor
    k_lowest: Tensor
    tokens: int
    shifts: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, shifts: bool) -> Seen:
        """q [N, H, L, D]; k, v [N, Hkv, L, D]."""
        q_peak, v_peak = (x.detach().abs().amax(dim=(0, 2, 3)).float() for x in (q, v))
        keys = k.detach().float()
        return cls(
            q_peak, v_peak, q.detach().float().sum((0, 2)), keys.sum((0, 2)), keys.square().sum((0, 2)),
            keys.amax((0, 2)), keys.amin((0, 2)), k.shape[0] * k.shape[2], shifts,
        )  # fmt: skip

    def add(self, other: Seen) -> None:
        """What another prompt held."""
        self.q, self.v = self.q.maximum(other.q), self.v.maximum(other.v)
        self.q_sum = self.q_sum + other.q_sum
        self.k_sum, self.k_squares = self.k_sum + other.k_sum, self.k_squares + other.k_squares
        self.k_highest = self.k_highest.maximum(other.k_highest)
        self.k_lowest = self.k_lowest.minimum(other.k_lowest)
        self.tokens += other.tokens

    def q_mean(self) -> Tensor:
        """[H, D], to eight bits, so that other GPUs find the same."""
        return (self.q_sum / self.tokens).bfloat16().float().contiguous()

    def k_shift(self) -> Tensor:
        """[Hkv, D]: the mean of the channels that are mostly mean; to eight bits as well."""
        mean = (self.k_sum / self.tokens).bfloat16().float()
        common = self.shifts & (mean.square() > COMMON * self.k_squares / self.tokens)
        return torch.where(common, mean, 0.0).contiguous()

    def k(self, shift: Tensor) -> Tensor:
        """[Hkv]: the largest magnitudes of keys less a shift."""
        return torch.maximum(self.k_highest - shift, shift - self.k_lowest).amax(dim=-1)


# By layer; None for a wide one.
LayerScales = Mapping[int, HeadScales | None]


@dataclass(frozen=True)
class Calibration:
    """What a calibration run found, by layer.

    scales: None for a wide layer. errors: of the attention's output in fp8, in a prefill or in decoding, whichever is
    larger (see rounding_errors).
    """

    scales: LayerScales = field(default_factory=dict)
    errors: Mapping[int, float] = field(default_factory=dict)

    @property
    def wide(self) -> dict[int, float]:
        """The errors of the wide layers."""
        return {layer: self.errors[layer] for layer, scales in self.scales.items() if scales is None}

    @property
    def harmed(self) -> dict[int, float]:
        """The errors of the layers that are wide because of them, not of their heads."""
        return {layer: error for layer, error in self.wide.items() if error > WIDE_ERROR}


def calibrate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    headroom: float = HEADROOM,
    wide: Collection[int] = (),
    context: int = 0,
) -> Calibration:
    """Scales of every attention layer of a patched model (`patch_model`), by layer index, on the layers' devices.

    prompts: token ids, each run by itself, without a cache, a few times. They should look like the production's own
        prompts, the first token included: models put their largest keys on it. A few thousand tokens do.
    headroom: how much larger than any value seen a value may be before it saturates; at least 1.
    wide: layers that are wide whatever their errors.
    context: positions that documents may come to; the prompts are read at several places (STARTS) of them, in turn.
        0: at the beginning alone.
    Raises ValueError without prompts, for an empty one, for values that are not finite, or where no attention layer of
    the model ran through Stem.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("calibration needs at least one prompt, and tokens in each")
    if not headroom >= 1:
        raise ValueError(f"headroom must be at least 1, got {headroom}")
    with recording() as seen:
        room = max(0, context - max(map(len, prompts)))
        for i in range(max(len(prompts), len(STARTS) if room else 0)):
            _read(model, [prompts[i % len(prompts)]], int(STARTS[i % len(STARTS)] * room))
    if not seen:
        raise ValueError(f"no attention layer of {type(model).__name__} ran through Stem: call patch_model first")
    scales = {layer: _scales(layer, found, headroom) for layer, found in sorted(seen.items())}
    errors = {layer: max(found) for layer, found in rounding_errors(model, prompts, scales).items()}
    kept = {i: None if i in wide or errors[i] > WIDE_ERROR else found for i, found in scales.items()}
    return Calibration(kept, errors)


def rounding_errors(
    model: nn.Module, prompts: Sequence[Sequence[int]], scales: Mapping[int, HeadScales]
) -> dict[int, tuple[float, float]]:
    """By layer, the errors of the attention's output in fp8 as shares of its norm: in a prefill, where q, k and v are
    rounded to e4m3, and in decoding, where whole queries meet rounded keys and values.

    Over all heads and prompts together; causal softmax in float32, whatever window, selection or sinks the layer has.
    """
    squares: dict[int, Tensor] = {}

    def note(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: bool) -> None:
        found = _squares(q, k, v, scales[layer], scale)
        squares[layer] = squares[layer] + found if layer in squares else found

    with _watching(note):
        _read(model, prompts)
    sums = {layer: found.tolist() for layer, found in sorted(squares.items())}
    return {
        layer: (math.sqrt(prefill / norm), math.sqrt(decode / norm)) if norm else (0.0, 0.0)
        for layer, (prefill, decode, norm) in sums.items()
    }


@contextmanager
def recording() -> Iterator[dict[int, Seen]]:
    """Inside, every call of Stem's attention function notes what its queries, keys and values hold, by layer."""
    seen: dict[int, Seen] = {}

    def note(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: bool) -> None:
        found = Seen.of(q, k, v, shifts=not sinks)
        if layer in seen:
            seen[layer].add(found)
        else:
            seen[layer] = found

    with _watching(note):
        yield seen


class _Note(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: bool) -> None: ...


@contextmanager
def _watching(note: _Note) -> Iterator[None]:
    """Inside, `note` gets what Stem's attention function is called with."""
    from transformers import AttentionInterface

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float | None = None, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        policy: LayerPolicy | None = getattr(module, "stem_policy", None)
        if policy is not None:
            note(policy.layer, query, key, value, scaling, kwargs.get("s_aux") is not None)
        return attention_forward(module, query, key, value, mask, scaling, *args, **kwargs)

    AttentionInterface.register(ATTENTION_NAME, forward)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION_NAME, attention_forward)


@torch.inference_mode()
def _read(model: nn.Module, prompts: Sequence[Sequence[int]], start: int = 0) -> None:
    """start: the position at which each prompt begins.

    Densely, whatever the layers' policy: so what is found does not depend on it, and arms of an evaluation have the
    same scales as jobs.
    """
    device = next(model.parameters()).device
    for prompt in prompts:
        ids = torch.tensor([list(map(int, prompt))], device=device)
        places = {} if not start else {"position_ids": start + torch.arange(len(prompt), device=device)[None]}
        context = PrefillContext(prompt_length=len(prompt), dense=True)
        model(input_ids=ids, use_cache=False, logits_to_keep=1, stem_context=context, **places)


def _squares(q: Tensor, k: Tensor, v: Tensor, scales: HeadScales, scale: float | None) -> Tensor:
    """Sums of squares float32 [3]: of the errors in a prefill and in decoding, of the output. One kv head's heads at a
    time: memory stays small."""
    q, k, v = (x[0, :, :ERROR_TOKENS].float() for x in (q, k, v))
    k = scales.shifted(k)
    common = torch.zeros_like(q[:, :1]) if scales.q_mean is None else scales.q_mean[:, None]
    rounded = [
        quantize(x, by[:, None, None]).float() * by[:, None, None]
        for x, by in ((q - common, scales.q), (k, scales.k), (v, scales.v))
    ]
    attend = partial(_causal_attention, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    group = q.shape[0] // k.shape[0]
    sums = torch.zeros(3, device=q.device)
    for head in range(k.shape[0]):
        queries = slice(head * group, (head + 1) * group)
        exact = attend(q[queries], k[head], v[head])
        q8, k8, v8 = rounded
        # [G, 1, L]: what the mean query adds to every score of a key.
        prefill = attend(q8[queries], k8[head], v8[head], bias=common[queries] @ k[head].mT)
        decode = attend(q[queries], k8[head], v8[head])
        sums += torch.stack([(x - y).square().sum() for x, y in ((prefill, exact), (decode, exact), (exact, 0.0))])
    return sums


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | float = 0.0) -> Tensor:
    """q [G, L, D]; k, v [L, D]; bias [G, 1, L], added to the products."""
    future = torch.ones(k.shape[0], k.shape[0], dtype=torch.bool, device=k.device).triu(1)
    return ((q @ k.mT + bias) * scale).masked_fill(future, -math.inf).softmax(dim=-1) @ v


def _scales(layer: int, seen: Seen, headroom: float) -> HeadScales:
    shift = seen.k_shift()
    peaks = {"queries": seen.q, "keys": seen.k(shift), "values": seen.v}
    for name, peak in peaks.items():
        if not bool(peak.isfinite().all()):
            raise ValueError(f"the {name} of layer {layer} are not finite: no fp8 scale fits them")
    q, k, v = (power_of_two_scale(peak, headroom) for peak in peaks.values())
    return HeadScales(q, k, v, shift, seen.q_mean())


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
