"""How much the choice of fp8 scales matters to attention: the table in kernels.fp8_heads.

    python -m tests.kernels.fp8_scales

Relative error of the output of dense causal attention (last 256 of 4096 tokens, float64 is the truth) when q, k and v
are rounded to e4m3 under different scales, and P as the kernels round it: three synthetic kinds of tensors (8 heads,
D = 128), and the mean over the layers of the bundled trained model. Static scales come from another sample of the same
kind, or another document; values are clamped where they exceed the range.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def measure(tensors: list[Tensor], calibration: list[Tensor], std: float | None) -> dict[str, float]:
    """Relative error in % by kind of scale. q, k, v [heads, T, D]; std: of the logits, None for q and k as they are."""
    tensors = [tensors[0][:, -ROWS:], *tensors[1:]]
    q, k, v = tensors
    factor = q.shape[-1] ** -0.5 if std is None else std / (q @ k.mT).std(dim=(1, 2), keepdim=True)
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


def measure_model(path: str, documents: list[Path]) -> dict[str, float]:
    """Mean over the layers of a trained model on the first of two documents, the static scales from the second."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    from stem_core import patch_model
    from stem_core.attention import attention_forward
    from stem_core.patch import ATTENTION_NAME

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = patch_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), None)
    layers: dict[int, list[list[Tensor]]] = {}

    def note(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        group = q.shape[1] // k.shape[1]
        kept = [q[0].clone(), k[0].repeat_interleave(group, 0), v[0].repeat_interleave(group, 0)]
        layers.setdefault(module.stem_policy.layer, []).append(kept)
        return attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register(ATTENTION_NAME, note)
    for document in documents:
        ids = tokenizer(document.read_text(), add_special_tokens=False).input_ids[:TOKENS]
        with torch.inference_mode():
            model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    found = [measure(first, second, None) for first, second in layers.values()]
    return {kind: sum(layer[kind] for layer in found) / len(found) for kind in found[0]}


def main() -> None:
    columns = {}
    for kind in (gaussian, outlier_channels, heavy_tails):
        made = [kind(torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        columns[kind.__name__.replace("_", " ")] = measure(*made, std=2.0)
    root = Path(__file__).parents[2]
    documents = [root / "examples" / "documents" / f"{name}.txt" for name in ("jargon-file", "newton-opticks")]
    columns["tiny-reader"] = measure_model(str(root / "models" / "tiny-reader"), documents)
    print(f"{'':16}" + "".join(f"{name:>18}" for name in columns))
    for kind in columns["gaussian"]:
        print(f"{kind:16}" + "".join(f"{values[kind]:18.2f}" for values in columns.values()))


if __name__ == "__main__":
    main()
