"""Selection and decode attention at the shapes of one layer: scores, selection, decoding.

Everything is checked before it is timed; what fails its check gets no figure. The scores of sample count their own
flops, 2 * D for each pair of a sampled query and a key that it sees; decoding counts the bytes of keys and values
against a copy measured in the same run. `ms` is the replay of a CUDA graph (which also shows that nothing waits for the
host), `eager ms` includes the launches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.measurement import stamp
from kernels.block_selection import BlockSelection, select_blocks
from kernels.decode_attention import decode_attention
from kernels.fp8_heads import fp8_obstacle
from kernels.oam_scores import KeySummary, key_sums_dtype, oam_scores
from stem_core.budget import row_budgets
from stem_core.config import StemConfig
from tools.benchmark._attention_fp8 import Fp8Layer
from tools.benchmark._measure import isolated_ms, table, write_json
from tools.benchmark._selection_fp8 import decode_case
from tools.benchmark._selection_heads import heads_cases
from tools.benchmark._selection_sample import fp8_case, sample_case

BLOCK = 128
DEVICE = "cuda"
COLUMNS = {
    "tokens": "d",
    "case": "",
    "ms": ".3f",
    "eager ms": ".3f",
    "GB/s": ".0f",
    "of copy": ".2f",
    "TFLOP/s": ".0f",
    "note": "",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=whole_blocks, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--documents", type=int, default=4, help="live documents of decode attention, all of a length")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--every", type=int, nargs="+", default=[8], metavar="N", help="sample looks at each Nth query")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument("--idle", type=float, default=0.5, help="seconds of rest before a timing")
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON with the rows and the machine")


def whole_blocks(text: str) -> int:
    """A prompt length of the command line: the checks here take whole blocks only."""
    length = int(text)
    if length < BLOCK or length % BLOCK:
        raise argparse.ArgumentTypeError(f"lengths must be multiples of {BLOCK} tokens, got {length}")
    return length


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 if every check passed, else 1. The file is written after every length."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 1
    about = stamp(torch.device(DEVICE), args.commit)
    copy = copy_bandwidth()
    rows: list[dict[str, Any]] = [{"case": "device copy, read + write", "GB/s": copy}]
    for measure in (prefill_rows, decode_rows):
        for length in args.lengths:
            try:
                rows += measure(args, length, copy)
            except torch.OutOfMemoryError:
                rows.append({"tokens": length, "case": "the rest", "note": "skipped: memory"})
            if args.output:
                write_json(args.output, {"about": about, "rows": rows})
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(rows, COLUMNS))
    return 1 if any("FAILED" in row.get("note", "") for row in rows) else 0


def copy_bandwidth() -> float:
    """GB/s of a 4 GiB device-to-device copy, bytes read plus bytes written."""
    source = torch.empty(1 << 31, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    ms = isolated_ms(lambda: target.copy_(source), 0.2)
    return 2 * source.nbytes / ms / 1e6


def prefill_rows(args: argparse.Namespace, length: int, copy: float) -> list[dict[str, Any]]:
    torch.manual_seed(length)
    D = args.head_dim

    def make(heads: int) -> Tensor:
        return torch.randn(1, length, heads, D, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)

    q, k, v = make(args.heads), make(args.kv_heads), make(args.kv_heads)
    n = -(-length // BLOCK)
    budgets = row_budgets(n, StemConfig(schedule="density", density=0.25))
    on_device = torch.tensor(budgets, device=DEVICE)
    keep = int(budgets.max())
    scores = oam_scores(q, k, v)
    selection = select_blocks(scores, on_device, max_blocks=keep)
    again = select_both(q, k, v, on_device, keep)
    bad = check_oam(q, k, v, scores) or check_selection(scores, on_device, selection)
    bad = bad or check_selection(scores, on_device, again)
    read = q.nbytes + k.nbytes + v.nbytes
    density = f"density {selection.density():.3f}"
    summary = KeySummary.allocate(
        1, args.kv_heads, length, D, block_size=BLOCK, stride=16, device=q.device, dtype=key_sums_dtype(k)
    )
    last = max(0, n - 64) * BLOCK
    oam_scores(q[:, :, :last], k, v, summary=summary) if last else None
    before = summary.blocks

    def last_chunk() -> BlockSelection:
        summary.blocks = before
        chunk = oam_scores(q[:, :, last:], k, v, query_start=last, summary=summary, fill_above=False)
        return select_blocks(chunk, on_device[last // BLOCK :], first_row=last // BLOCK, max_blocks=keep)

    cases: list[tuple[str, Callable[[], object], dict[str, Any]]] = [
        ("OAM scores", lambda: oam_scores(q, k, v), {"bytes": read}),
        ("OAM scores, none above the diagonal", lambda: oam_scores(q, k, v, fill_above=False), {"bytes": read}),
        ("block selection", lambda: select_blocks(scores, on_device, max_blocks=keep), {"note": density}),
        ("OAM scores + selection", lambda: select_both(q, k, v, on_device, keep), {}),
        ("the same, last 8K chunk", last_chunk, {}),
    ]
    rows = [timed(length, name, call, args.idle, bad, copy, **more) for name, call, more in cases if chosen(args, name)]
    for name, call, bad in heads_cases(scores, budgets, args.kv_heads) if chosen(args, "budgets shared") else ():
        rows.append(timed(length, name, call, args.idle, bad, copy))
    for every in args.every:
        name = f"sample scores, every {every}th query"
        if not chosen(args, name):
            continue
        call, bad = sample_case(q, k, every)
        # Sampled query r, from 1 on, sees r * every keys.
        flops = 2 * D * args.heads * every * (length // every) * (length // every + 1) / 2
        rows.append(timed(length, name, call, args.idle, bad, copy, flops=flops))
        if not fp8_obstacle(q.device):
            layer = Fp8Layer(q, k, v)
            layer.prepare()
            call, bad = fp8_case(layer, every)
            rows.append(timed(length, f"{name}, keys in fp8", call, args.idle, bad, copy, flops=flops))
    return rows


def chosen(args: argparse.Namespace, name: str) -> bool:
    return not args.only or any(part in name for part in args.only)


def select_both(q: Tensor, k: Tensor, v: Tensor, budgets: Tensor, keep: int) -> BlockSelection:
    """Scores and selection as the product calls them."""
    return select_blocks(oam_scores(q, k, v, fill_above=False), budgets, max_blocks=keep)


def timed(
    length: int,
    name: str,
    call: Callable[[], object],
    idle: float,
    bad: str,
    copy: float,
    *,
    bytes: float = 0,
    flops: float = 0,
    note: str = "",
) -> dict[str, Any]:
    row: dict[str, Any] = {"tokens": length, "case": name, "note": note}
    if bad:
        return row | {"note": f"CHECK FAILED: {bad}"}
    row["eager ms"] = isolated_ms(call, idle)
    row["ms"] = graph_ms(call, idle)
    if bytes:
        row |= {"GB/s": bytes / row["ms"] / 1e6, "of copy": bytes / row["ms"] / 1e6 / copy}
    if flops:
        row["TFLOP/s"] = flops / row["ms"] / 1e9
    return row


def graph_ms(call: Callable[[], object], idle: float) -> float:
    """Milliseconds of a replay of `call` captured in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return isolated_ms(graph.replay, idle, 9)


def check_oam(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> str:
    """The last and a middle row of every 5th head, routing and value term in float64; empty if they agree."""
    n, stride, share = scores.shape[3], 16, q.shape[1] // k.shape[1]
    for head in range(0, q.shape[1], 5):
        keys = k[0, head // share].double().unflatten(0, (n, -1, stride)).sum(1).flip(1).flatten(1)
        norms = v[0, head // share].double().norm(dim=-1).unflatten(0, (n, -1, stride)).amax(-1).log()
        count = torch.arange(1, n + 1, device=DEVICE) * norms.shape[1]
        mean = norms.sum(1).cumsum(0) / count
        std = ((norms**2).sum(1).cumsum(0) / count - mean**2).clamp(min=0).sqrt()
        value = 0.2 * ((norms - mean[:, None]) / (std[:, None] + 1e-6)).clamp(min=0).mean(1)
        for row in (n - 1, n // 2):
            queries = q[0, head, row * BLOCK : (row + 1) * BLOCK].double().unflatten(0, (-1, stride)).sum(0).flatten()
            pairs = stride * (BLOCK // stride) ** 2
            wanted = (keys[: row + 1] @ queries) / pairs / q.shape[-1] ** 0.5 + value[: row + 1]
            error = float((scores[0, head, row, : row + 1].double() - wanted).abs().max())
            if not error < 3e-3:
                return f"OAM head {head} row {row}: error {error:.1e}"
            if not scores[0, head, row, row + 1 :].isneginf().all():
                return f"OAM head {head} row {row}: finite above the diagonal"
    return ""


def check_selection(scores: Tensor, budgets: Tensor, selection: BlockSelection) -> str:
    """Every row of two heads against the reference."""
    for head in (0, scores.shape[1] - 1):
        part = scores[:, head : head + 1]
        wanted = select_blocks(part, budgets, max_blocks=selection.indices.shape[-1], impl="reference")
        counts = selection.counts[:, head : head + 1]
        valid = torch.arange(selection.indices.shape[-1], device=DEVICE) < counts[..., None]
        same = torch.equal(selection.indices[:, head : head + 1][valid], wanted.indices[valid])
        if not torch.equal(counts, wanted.counts) or not same:
            return f"selection of head {head} differs from the reference"
    return ""


def decode_rows(args: argparse.Namespace, length: int, copy: float) -> list[dict[str, Any]]:
    S, D = args.documents, args.head_dim
    name = f"decode attention, {S} documents"
    if not chosen(args, name):
        return []
    k, v = (torch.randn(args.kv_heads, S * length, D, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    q = torch.randn(S, args.heads, D, dtype=torch.bfloat16, device=DEVICE)
    starts = torch.arange(S, device=DEVICE) * length
    lengths = torch.full((S,), length, dtype=torch.int32, device=DEVICE)

    def call() -> Tensor:
        return decode_attention(q, k, v, starts, lengths, max_length=length)

    got, bad = call(), ""
    for s in (0, S - 1):
        keys, values = (x[:, s * length : (s + 1) * length].float() for x in (k, v))
        grouped = q[s].float().unflatten(0, (args.kv_heads, -1))
        wanted = ((grouped @ keys.mT * D**-0.5).softmax(-1) @ values).flatten(0, 1)
        error = float((got[s].float() - wanted).norm() / wanted.norm())
        bad = bad or ("" if error < 1e-2 else f"decode document {s}: relative error {error:.1e}")
    rows = [timed(length, name, call, args.idle, bad, copy, bytes=k.nbytes + v.nbytes)]
    if not fp8_obstacle(q.device):
        layer = Fp8Layer(q[:, :, None].transpose(0, 2), k[None], v[None])
        layer.prepare()
        fp8_call, bad = decode_case(layer, q, S)
        size = sum(arena.nbytes for arena in layer.arenas)
        rows.append(timed(length, f"{name}, fp8", fp8_call, args.idle, bad, copy, bytes=size))
    return rows
