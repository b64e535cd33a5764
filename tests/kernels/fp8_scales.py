"""How much the choice of fp8 scales matters to attention: the table in kernels.fp8_heads.

    python -m tests.kernels.fp8_scales

Relative error of the output of dense causal attention (last 256 of 4096 tokens, D = 128, 8 heads, float64 is the truth)
when q, k and v are rounded to e4m3 under different scales, and P as the kernels round it. Static scales come from
another sample of the same distribution; their values are clamped where they exceed the range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.block_sparse_attention_fp8.reference import round_weights
from kernels.fp8_heads import FP8, FP8_MAX

HEADS, TOKENS, DIM, ROWS, BLOCK = 8, 4096, 128, 256, 128
STATIC = (1, 2, 4, 8, 16, 64, 256)


def gaussian(generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(HEADS, TOKENS, DIM, generator=generator) for _ in range(3)]


def outlier_channels(generator: torch.Generator) -> list[Tensor]:
    """Channels of very different size (log-normal, sigma 1), three of K and Q 20 times larger still, as after RoPE in
    trained models."""
    made = gaussian(generator)
    profile = torch.Generator().manual_seed(99)  # channels belong to the model, not to the sample
    for index, x in enumerate(made):
        x *= torch.randn(HEADS, 1, DIM, generator=profile).exp()
        if index < 2:
            x[..., :3] *= 20
    return made


def heavy_tails(generator: torch.Generator) -> list[Tensor]:
    """Student's t with 3 degrees of freedom per value, over outlier channels of moderate size."""
    made = outlier_channels(generator)
    for x in made:
        x /= (torch.randn(3, *x.shape, generator=generator).square().mean(0)).sqrt()
    return made


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * scale


def amax(x: Tensor, tokens: int) -> Tensor:
    """Largest magnitude of each head over groups of `tokens` tokens, broadcast to [heads, T, 1]."""
    groups = x.abs().unflatten(1, (-1, tokens)).amax((2, 3))
    return groups.repeat_interleave(tokens, 1)[..., None]


def static_scale(x: Tensor, headroom: float) -> Tensor:
    return torch.exp2((x.abs().amax((1, 2), keepdim=True) * headroom / FP8_MAX).log2().ceil())


def attend(q: Tensor, k: Tensor, v: Tensor, fp8: bool) -> Tensor:
    position = torch.arange(TOKENS - ROWS, TOKENS)[:, None]
    scores = (q @ k.mT).masked_fill(torch.arange(TOKENS) > position, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (round_weights(weights) if fp8 else weights) @ v / weights.sum(-1, keepdim=True)


def measure(make: object) -> dict[str, float]:
    """Relative error in % by kind of scale."""
    tensors = make(torch.Generator().manual_seed(1))  # type: ignore[operator]
    calibration = make(torch.Generator().manual_seed(2))  # type: ignore[operator]
    tensors[0] = tensors[0][:, -ROWS:]
    # Logits with a standard deviation of 2, whatever the channels are.
    q, k, v = tensors
    factor = 2.0 / (q @ k.mT).std(dim=(1, 2), keepdim=True)
    true = attend((q * factor).double(), k.double(), v.double(), fp8=False)
    found = {}
    kinds = {
        "per token": [amax(x, 1) / FP8_MAX for x in tensors],
        "per block": [amax(x, BLOCK) / FP8_MAX for x in tensors],
        "per token, 2^n": [torch.exp2((amax(x, 1) / FP8_MAX).log2().ceil()) for x in tensors],
        "per head": [amax(x, x.shape[1]) / FP8_MAX for x in tensors],
    } | {f"static x{headroom}": [static_scale(x, headroom) for x in calibration] for headroom in STATIC}
    for name, scales in kinds.items():
        q8, k8, v8 = (rounded(x, s) for x, s in zip(tensors, scales, strict=True))
        out = attend(q8 * factor, k8, v8, fp8=True)
        found[name] = float((out.double() - true).norm() / true.norm()) * 100
    return found


def main() -> None:
    columns = {kind.__name__.replace("_", " "): measure(kind) for kind in (gaussian, outlier_channels, heavy_tails)}
    print(f"{'':16}" + "".join(f"{name:>18}" for name in columns))
    for kind in next(iter(columns.values())):
        print(f"{kind:16}" + "".join(f"{values[kind]:18.2f}" for values in columns.values()))


if __name__ == "__main__":
    main()
