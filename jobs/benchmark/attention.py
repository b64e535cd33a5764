"""One attention layer, prefill: dense baselines, FlexAttention and our kernels on the same blocks.

Each case is checked on sampled query blocks against float64 before it is timed; a case that fails gets no speed.
TFLOP/s count executed blocks, 4 * 128 * 128 * D flops each, the diagonal ones in full.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.benchmark._attention_fp8 import Fp8Layer
from jobs.benchmark._stamp import stamp
from jobs.benchmark.measure import isolated_ms, sustained_ms, table, write_json
from kernels.block_scores import choose_block_scores, oam_scores
from kernels.block_selection import BlockSelection, select_blocks
from kernels.block_sparse_attention import block_sparse_attention, choose_block_sparse_attention
from kernels.fp8_heads import fp8_obstacle
from stem_core.budget import row_budgets
from stem_core.config import StemConfig

BLOCK = 128
COLUMNS = {
    "tokens": "d",
    "case": "",
    "density": ".3f",
    "ms": ".3f",
    "TFLOP/s": ".0f",
    "vs cuDNN": ".2f",
    "sustained ms": ".3f",
    "sustained TFLOP/s": ".0f",
    "error": ".1e",
    "note": "",
}


@dataclass
class Case:
    """A name, and what makes its call ready: (call, selection or None for dense). The call returns [1, H, L, D].

    `prepare` runs inside the case, so that a baseline that is missing or refuses costs its own row only."""

    name: str
    prepare: Callable[[], tuple[Callable[[], object], BlockSelection | None]]
    note: str = ""
    attends: bool = True  # False: no attention flops and no output
    fp8: Fp8Layer | None = None  # its error is allowed, not that of eager bfloat16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.12], help="shares of blocks kept")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--idle", type=float, default=1.5, help="seconds of rest before a case's isolated timing")
    parser.add_argument("--sustained", type=float, default=2.0, help="seconds of back-to-back calls; 0 for none")
    parser.add_argument("--without", nargs="*", default=[], help="leave out cases whose name contains one of these")
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="attention.json, .txt and .png")


def run(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("jobs.benchmark attention needs a CUDA device; torch sees none", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = False
    facts = {
        **stamp(torch.device("cuda"), options.commit),
        "heads": options.heads,
        "kv_heads": options.kv_heads,
        "head_dim": options.head_dim,
    }
    print("  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        rows += _at_length(length, options)
        write_json(options.output / "attention.json", {**facts, "rows": rows})
        torch.cuda.empty_cache()
    text = table(rows, COLUMNS)
    (options.output / "attention.txt").write_text(text + "\n")
    print(text)
    _plot(rows, facts, options.output / "attention.png")
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        print(f"failed: {row['case']} at {row['tokens']} tokens: {row['note']}", file=sys.stderr)
    return 1 if failed else 0


def _at_length(length: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every case at one length; rows come in the order of the cases."""
    generator = torch.Generator("cuda").manual_seed(length)

    def projected(heads: int) -> Tensor:
        """As a transformers layer makes it: a transposed view of [1, L, heads * D]."""
        shape = (1, length, heads, options.head_dim)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    q, k, v = projected(options.heads), projected(options.kv_heads), projected(options.kv_heads)
    reference: float | None = None
    for case in _cases(q, k, v, options.densities, generator):
        if any(part in case.name for part in options.without):
            continue
        row: dict[str, Any] = {"tokens": length, "case": case.name, "status": "ok", "note": case.note}
        try:
            call, selection = case.prepare()
            if case.attends:
                row["density"] = selection.density() if selection else 1.0
                row["error"], allowed = _error(call, selection, q, k, v, case.fp8)
                if not row["error"] <= 1.5 * allowed:
                    raise ArithmeticError(f"error {row['error']:.1e}, allowed 1.5 * {allowed:.1e}")
            ms = isolated_ms(call, options.idle)
            sustained = sustained_ms(call, options.sustained, ms) if options.sustained else None
        except torch.OutOfMemoryError:
            row |= {"status": "no memory", "note": "out of GPU memory"}
        except Exception as error:  # one broken baseline must not cost the other figures
            text = (str(error).splitlines() or [""])[0][:150]
            row |= {"status": "failed", "note": f"{type(error).__name__}: {text}"}
        else:
            reference = ms if case.name == "dense cuDNN" else reference
            row |= {"ms": ms, "sustained ms": sustained}
            if case.attends:
                blocks = row["density"] * _causal_blocks(length) * options.heads
                gigaflops = 4 * BLOCK * BLOCK * options.head_dim * blocks / 1e9
                row |= {"TFLOP/s": gigaflops / ms, "vs cuDNN": reference / ms if reference else None}
                row["sustained TFLOP/s"] = gigaflops / sustained if sustained else None
        print(table([row], COLUMNS).splitlines()[1], flush=True)
        yield row


def _causal_blocks(length: int) -> int:
    n = -(-length // BLOCK)
    return n * (n + 1) // 2


def _cases(q: Tensor, k: Tensor, v: Tensor, densities: list[float], generator: torch.Generator) -> Iterator[Case]:
    yield Case("dense cuDNN", partial(_sdpa, q, k, v, SDPBackend.CUDNN_ATTENTION))
    yield Case("dense FlashAttention-2", partial(_sdpa, q, k, v, SDPBackend.FLASH_ATTENTION))

    def ours(selection: BlockSelection | None, impl: str) -> tuple[Callable[[], object], BlockSelection | None]:
        return partial(block_sparse_attention, q, k, v, selection, impl=impl), selection  # type: ignore[arg-type]

    best = choose_block_sparse_attention(q, BLOCK, k=k, v=v)
    impls = ("gluon", "triton") if best.impl == "gluon" else ("triton",)
    for impl in impls:
        yield Case(f"dense ours {impl}", partial(ours, None, impl), note=best.reason)
    fp8 = None if fp8_obstacle(q.device) else Fp8Layer(q, k, v)
    fp8_impls, fp8_note = fp8.impls() if fp8 else ((), "")
    if fp8:
        yield Case("fp8 preparation alone", lambda: (fp8.prepare, None), attends=False)
        for impl in fp8_impls:
            yield Case(f"dense fp8 {impl}", partial(fp8.case, None, impl), note=fp8_note, fp8=fp8)
    product = choose_block_scores(q)
    if product.impl == "triton":
        config = StemConfig(schedule="density", density=densities[0], dense_layers=0)
        yield Case("selection alone (OAM)", lambda: (_stem_selection(q, k, v, config), None), attends=False)
    for density in densities:
        selection = random_selection(q, density, generator)
        for impl in impls:
            yield Case(f"{density:.0%} ours {impl}", partial(ours, selection, impl))
        if fp8:
            for impl in fp8_impls:
                yield Case(f"{density:.0%} fp8 {impl}", partial(fp8.case, selection, impl), fp8=fp8)
        if density == 0.25:
            yield Case("25% FlexAttention", partial(_flex, q, k, v, selection))
        if product.impl == "triton":
            config = StemConfig(schedule="density", density=density, dense_layers=0)
            yield Case(f"{density:.0%} Stem, selection included", partial(_stem, q, k, v, config))
            if fp8:
                select = _stem_selection(q, k, v, config)
                name = f"{density:.0%} Stem fp8, selection and preparation included"
                yield Case(name, partial(fp8.stem, select), fp8=fp8)
    if product.impl == "triton":
        # Its density depends on the length: what the crossover with dense attention is read from.
        release = partial(_stem, q, k, v, StemConfig.preset("release"))
        yield Case("release schedule, selection included", release)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> tuple[Callable[[], object], None]:
    """Dense causal attention by one of torch's backends; K and V repeated beforehand where it has no GQA."""

    def call(key: Tensor = k, value: Tensor = v) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=key is k)

    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        group = q.shape[1] // k.shape[1]
        return partial(call, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)), None
    return call, None


def _stem(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> tuple[Callable[[], object], BlockSelection]:
    """The product's path: scores, selection and attention in one call."""
    select = _stem_selection(q, k, v, config)
    return lambda: block_sparse_attention(q, k, v, select()), select()


def random_selection(q: Tensor, density: float, generator: torch.Generator) -> BlockSelection:
    """Random blocks up to `density` of each row's causal ones, at least 8, the first 4 and last 4 among them."""
    heads, n = q.shape[1], -(-q.shape[2] // BLOCK)
    block = torch.arange(n, device=q.device)
    budgets = ((block + 1) * density).ceil().clamp(min=8).minimum(block + 1).int()
    scores = torch.rand(1, heads, n, n, generator=generator, device=q.device)
    # The reference: a benchmark of attention should not stand on another kernel of ours.
    return select_blocks(scores, budgets, max_blocks=int(budgets.max()), impl="reference")


def _stem_selection(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> Callable[[], BlockSelection]:
    """The product's own selection; the budgets depend on the length alone and are ready beforehand."""
    budgets = row_budgets(-(-q.shape[2] // BLOCK), config)
    on_device = torch.from_numpy(budgets).to(q.device)
    return lambda: select_blocks(oam_scores(q, k, v), on_device, max_blocks=int(budgets.max()))


def _flex(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> tuple[Callable[[], object], BlockSelection]:
    """FlexAttention on the same blocks: the diagonal one with a causal mask, the others without any."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    n = -(-q.shape[2] // BLOCK)
    counts = selection.counts
    full = torch.zeros(*counts.shape, n, dtype=torch.int32, device=q.device)
    full[..., : selection.indices.shape[-1]] = selection.indices
    diagonal = torch.zeros_like(full)
    diagonal[..., 0] = torch.arange(n, dtype=torch.int32, device=q.device)
    mask = BlockMask.from_kv_blocks(
        torch.ones_like(counts),
        diagonal,
        counts - 1,
        full.clamp_(0, n - 1),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=lambda b, h, query, key: query >= key,
        seq_lengths=(q.shape[2], q.shape[2]),
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True), selection


def _error(
    call: Callable[[], object],
    selection: BlockSelection | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fp8: Fp8Layer | None,
) -> tuple[float, float]:
    """Relative error over sampled query blocks, and that of eager attention on them: in bfloat16, or with the roundings
    of fp8. float64 is the truth."""
    out = call()
    assert isinstance(out, Tensor)
    if not bool(out.isfinite().all()):
        return float("nan"), 0.0
    heads, length = q.shape[1:3]
    n, group = -(-length // BLOCK), q.shape[1] // k.shape[1]
    sums = torch.zeros(3, dtype=torch.float64, device=q.device)
    samples = {(h % heads, b) for h, b in [(0, n - 1), (5, n // 2), (17, n // 3), (31, min(7, n - 1)), (30, 0), (2, 1)]}
    for head, block in sorted(samples):
        begin, end = block * BLOCK, min(length, (block + 1) * BLOCK)
        if selection is None:
            keys = torch.arange(end, device=q.device)
        else:
            kept = selection.indices[0, head, block, : int(selection.counts[0, head, block])].long()
            keys = (kept[:, None] * BLOCK + torch.arange(BLOCK, device=q.device)).flatten()
            keys = keys[keys < end]
        hidden = keys[None] > torch.arange(begin, end, device=q.device)[:, None]
        tile = (q[0, head, begin:end], k[0, head // group, keys], v[0, head // group, keys], hidden)
        true = _attend(*tile, torch.float64)
        eager = fp8.emulate(head, *tile) if fp8 else _attend(*tile, torch.bfloat16)
        got = out[0, head, begin:end].double()
        sums += torch.stack([(got - true).square().sum(), (eager - true).square().sum(), true.square().sum()])
    relative = (sums[:2] / sums[2]).sqrt()
    return float(relative[0]), float(relative[1])


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Eager attention of q [T, D] to k, v [K, D] in `dtype`, the softmax in float32 or better."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).to(torch.promote_types(dtype, torch.float32))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1).to(dtype) @ v).double()


def _plot(rows: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """Speed against dense cuDNN over the prompt length."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is missing (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    for name in dict.fromkeys(row["case"] for row in rows):
        points = [row for row in rows if row["case"] == name and row.get("TFLOP/s")]
        tokens = [row["tokens"] for row in points]
        if points:
            left.plot(tokens, [row["vs cuDNN"] or float("nan") for row in points], marker="o", label=name)
            right.plot(tokens, [row["TFLOP/s"] for row in points], marker="o", label=name)
    for axis, title in ((left, "times faster than dense cuDNN"), (right, "executed TFLOP/s")):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("prompt tokens")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    left.set_yscale("log", base=2)
    left.legend(fontsize=7)
    figure.suptitle(f"{facts['gpu']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
