"""What is lost where fp8 products are added up: signed bias and error against float64 of the same fp8 operands.

bias: how much larger, or below 0 smaller, a result is along the truth; error: of the norms, the rounding of a bfloat16
output included (0.17%). Attention over prompts: `tools.benchmark attention`, which checks every row. --model PATH asks
the same of a checkpoint: its logits along a text, dense, with fast and with precise accumulation, against bf16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu

from jobs.measurement import stamp
from kernels.decode_attention_fp8 import decode_attention_fp8
from kernels.fp8_heads import fp8_obstacle
from kernels.quantize import quantize_rows
from kernels.sample_scores import sample_scores
from pipeline.engine import EngineConfig
from pipeline.errors import JobError
from stem_core.fp8.linear import scaled_linear
from tools.benchmark._attention_fp8 import Fp8Layer
from tools.benchmark._measure import table, write_json
from tools.benchmark._row_errors import BIAS_LIMIT, even_operands
from tools.benchmark._selection_sample import true_fp8_shares
from tools.benchmark.engine.errors import DOCUMENTS, Variant, measure_errors
from tools.benchmark.selection import whole_blocks

DEVICE = "cuda"
EVERY = 8
COLUMNS = {"what": "", "operands": "", "summed": "d", "bias": "+.3%", "error": ".3%", "note": ""}
LOGIT_COLUMNS = {
    "variant": "", "kl_mean": ".2e", "kl_max": ".2e", "same_token": ".2%", "logit_bias": "+.3%", "logit_error": ".3%",
}  # fmt: skip
VARIANTS: tuple[Variant, ...] = (
    ("dense bf16", "bf16", False, False),
    ("dense fp8, precise", "fp8", False, False),
    ("dense fp8, fast accumulation", "fp8", False, True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inputs", type=int, nargs="+", default=[4096, 14336], metavar="K", help="inputs of a linear")
    parser.add_argument("--rows", type=int, default=1024, help="rows of activations")
    parser.add_argument("--outputs", type=int, default=2048, metavar="N", help="outputs of a linear")
    parser.add_argument("--lengths", type=whole_blocks, nargs="+", default=[131072], metavar="L", help="keys")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--model", metavar="PATH", help="a checkpoint whose logits are compared, too")
    parser.add_argument("--text", type=Path, default=DOCUMENTS / "newton-opticks.txt", help="what the checkpoint reads")
    parser.add_argument("--tokens", type=int, default=4096, help="so much of the text")
    parser.add_argument("--positions", type=int, default=1024, help="tokens whose logits are compared")
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark"), metavar="DIR", help="for accumulation.json and .txt"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print as it comes, write. 0, or 1 without a GPU that has fp8."""
    device = torch.device(DEVICE)
    missing = "torch sees no CUDA device" if DEVICE == "cuda" and not torch.cuda.is_available() else ""
    if missing := missing or fp8_obstacle(device):
        print(f"tools.benchmark accumulation: {missing}", file=sys.stderr)
        return 1
    facts = stamp(device, options.commit)
    print("  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    rows: list[dict[str, Any]] = []
    logits: list[dict[str, Any]] = []

    def write() -> None:
        write_json(options.output / "accumulation.json", {**facts, "rows": rows, "logits": logits})
        text = table(rows, COLUMNS) + (f"\n\n{table(logits, LOGIT_COLUMNS)}" if logits else "")
        (options.output / "accumulation.txt").write_text(text + "\n")

    for measure in (linear_rows, head_rows):
        for row in measure(options):
            rows.append({"note": "" if abs(row["bias"]) <= BIAS_LIMIT else f"past {BIAS_LIMIT:.1%}"} | row)
            print(table(rows[-1:], COLUMNS).splitlines()[1], flush=True)
        write()

    def note(results: list[dict[str, Any]]) -> None:
        logits[:] = results
        print(table(logits[-1:], LOGIT_COLUMNS).splitlines()[1], flush=True)
        write()

    if options.model:
        config = EngineConfig(options.model, device=DEVICE)
        measure_errors(config, _prompt(options), None, note, VARIANTS, options.positions)
    print((options.output / "accumulation.txt").read_text(), end="")
    return 0


def compare(got: Tensor, true: Tensor) -> dict[str, float]:
    """bias and error of any tensors of one shape."""
    got, norm = got.double(), true.norm()
    return {"bias": float((got * true).sum() / norm**2 - 1), "error": float((got - true).norm() / norm)}


def linear_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Linears as the engine runs them, on operands that do not cancel and on such as models have."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=DEVICE) + 0.5

    def outliers(rows: int, inputs: int) -> Tensor:
        """A gated MLP's hidden values, one channel of 512 thirty times as large."""
        x = silu(normal(rows, inputs)) * normal(rows, inputs)
        x[:, :: min(512, inputs)] *= 30
        return x

    kinds: dict[str, tuple[Callable[[int, int], Tensor], Callable[[int, int], Tensor]]] = {
        "positive": (uniform, uniform),
        "shifted by 1": (lambda rows, inputs: normal(rows, inputs) + 1, normal),
        "gated, outliers": (outliers, normal),
    }
    for inputs in options.inputs:
        for kind, (activations, weights) in kinds.items():
            x = quantize_rows(activations(options.rows, inputs).bfloat16())
            w = quantize_rows((weights(options.outputs, inputs) * 0.02).bfloat16())
            true = (x.values.double() * x.scales) @ (w.values.double() * w.scales).mT
            for fast in (True, False):
                got = scaled_linear(x, w.values, w.scales.view(1, -1), fast_accumulation=fast)
                name = f"linear, {'fast' if fast else 'precise'} accumulation"
                yield {"what": name, "operands": kind, "summed": inputs, **compare(got, true)}


def head_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What else reads heads in fp8: scores of sampled queries, decode attention, and the rounding of the heads."""
    for length in options.lengths:
        q, k, v = even_operands(options.heads, options.kv_heads, length, options.head_dim, DEVICE)
        heads, group = range(options.heads), options.heads // options.kv_heads
        # Queries and keys that do not cancel either: all logits are large, and nearly the same.
        for kind, layer in (("even", Fp8Layer(q, k, v)), ("positive", Fp8Layer(q.abs() + 0.5, k.abs() + 0.5, v))):
            q8, (k8, vt8) = layer.q8, layer.arenas
            given = {"operands": kind, "summed": length}
            exact = [layer.exact(head) for head in heads[::group]]
            for name, tensor, of in (("keys", layer.k, 1), ("values", layer.v, 2)):
                rounded = torch.stack([operands[of] for operands in exact])
                row = {"what": f"fp8 heads, {name} as stored", **given, "note": "rounding, no sum"}
                yield row | compare(rounded, tensor[0].double())
            scores = sample_scores(layer.q, k8[None], every=EVERY, scales=layer.scales)[0, :, -1]
            true = torch.stack([true_fp8_shares(layer, EVERY, head) for head in heads])
            yield {"what": f"sample scores, every {EVERY}th query", **given, **compare(scores, true)}
            last = layer.q[:, :, -1]
            places = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.tensor([length], device=DEVICE).int()
            out = decode_attention_fp8(last, k8, vt8, layer.scales, *places, max_length=length)
            true = torch.stack([_decode(last[0, head].double(), *exact[head // group][1:]) for head in heads])
            yield {"what": "decode attention", **given, **compare(out[0], true)}
            del layer, q8


def _decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q * q.shape[0] ** -0.5).softmax(0) @ v


def _prompt(options: argparse.Namespace) -> np.ndarray:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer.encode(options.text.read_text(encoding="utf-8"))[: options.tokens]
    if len(ids) < options.tokens:
        raise JobError(f"--text {options.text}: {len(ids)} tokens, --tokens asks for {options.tokens}")
    return np.asarray(ids, dtype=np.int64)
