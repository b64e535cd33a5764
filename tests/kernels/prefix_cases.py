"""Decode attention of rows that share what stands before their own keys, for every implementation and KV precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels._common.fp8 import FP8, KEY_GROUP, HeadScales, quantize, store_order
from kernels.decode_attention import Prefixes, decode_attention
from kernels.decode_attention_fp8 import decode_attention_fp8
from tests.kernels.fp8_cases import NAN, attend_one
from tests.kernels.selection_cases import BF16, FP16, FP32

ALIGN = 64


@dataclass(frozen=True)
class Shared:
    """groups: of each prefix, (tokens of it that a row sees, tokens behind it) of its rows; 0 tokens of prefix: the
    rows have none. spare: columns of the table without a row.
    """

    groups: tuple[tuple[tuple[int, int], ...], ...]
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = FP32
    window: int | None = None
    sinks: bool = False
    spare: int = 1

    def __str__(self) -> str:
        rows = "_".join("+".join(f"{before}.{own}" for before, own in group) for group in self.groups)
        kind = str(self.dtype).removeprefix("torch.")
        return f"{rows[:40]}-{self.heads}/{self.kv_heads}x{self.head_dim}-{kind}-w{self.window}{'-sinks' * self.sinks}"


def questions(prefix: int, *tails: int) -> tuple[tuple[int, int], ...]:
    return tuple((prefix, tail) for tail in tails)


CASES = [
    Shared((questions(700, 3, 40, 1), questions(0, 130, 0))),
    Shared((questions(130, 5), questions(0, 77), questions(65, 300, 2)), sinks=True, dtype=FP16),
    # The window begins in the tail, in the prefix, before it; and reaches over the border.
    Shared((questions(300, 100, 90, 89, 5, 1), questions(40, 3)), window=90),
    Shared((questions(500, 20, 1, 33),), heads=7, kv_heads=1, window=50, sinks=True, dtype=FP16),
    # Rows of one extent that see one token more each, as drafts do, and with more keys of their own behind it.
    Shared((((301, 0), (302, 0), (303, 0), (304, 0)), ((90, 8), (91, 7), (96, 1)))),
    Shared((((301, 0), (302, 0), (303, 0), (304, 0)), ((90, 0), (91, 0))), window=40, sinks=True, dtype=FP16),
    # More queries than a tile.
    Shared((questions(200, *range(1, 37)), questions(70, 9)), spare=0, head_dim=32),
    Shared((questions(90, 3, 40),), heads=4, kv_heads=1, head_dim=512),
    Shared((questions(150, *range(1, 12)),), heads=28, kv_heads=2, head_dim=128, dtype=FP16, spare=5),
]


def _inputs(case: Shared, room: int) -> tuple[Any, ...]:
    """Extents for the rows, in the order of their numbers, and for the prefixes, `room` tokens around each."""
    generator = torch.Generator().manual_seed(sum(map(len, case.groups)))
    rows = [(g, *row) for g, group in enumerate(case.groups) for row in group]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    total, starts, prefixes = room, [], []
    for group in case.groups:
        prefixes.append(total)
        total += -(-max(before for before, _ in group) // ALIGN) * ALIGN + room
    for _, _, own in rows:
        starts.append(total)
        total += -(-own // ALIGN) * ALIGN + room
    sharing = [g for g, group in enumerate(case.groups) if group[0][0]]
    # Numbers of rows that the batch does not have are passed over as -1 is.
    table = [[i for i, row in enumerate(rows) if row[0] == g] for g in sharing]
    width = max(map(len, table)) + case.spare
    table = [[*row, *[-1, len(rows) + 3][: width - len(row)], *[-1] * (width - len(row) - 2)] for row in table]
    table.append([-1] * width)
    return rows, prefixes, starts, total, torch.tensor(table, dtype=torch.int32), generator


def _sinks(case: Shared) -> Tensor | None:
    return torch.linspace(-20.0, 30.0, case.heads).to(case.dtype) if case.sinks else None


def check(case: Shared, impl: str, device: str, fp8: bool) -> None:
    """Against attention in float64 to the keys of both places, as exact as eager attention; arenas are full of NaN
    wherever nobody may read.
    """
    rows, prefixes, starts, total, table, generator = _inputs(case, room=32)
    shape = (case.kv_heads, total, case.head_dim)
    plain = torch.full((2, *shape), torch.nan)
    ends = {start: max(before for before, _ in group) for start, group in zip(prefixes, case.groups, strict=True)}
    ends |= {start: own for start, (_, _, own) in zip(starts, rows, strict=True)}
    for start, length in ends.items():
        plain[:, :, start : start + length] = torch.randn(2, case.kv_heads, length, case.head_dim, generator=generator)
    q = torch.randn(len(rows), case.heads, case.head_dim, generator=generator).to(case.dtype)
    counts = torch.tensor([own for _, _, own in rows], dtype=torch.int32)
    before = torch.tensor([shared for _, shared, _ in rows], dtype=torch.int32)
    longest = max(1, int(before.max()))
    shared = Prefixes(
        torch.tensor([prefixes[g] for g, _, _ in rows]).to(device), before.to(device), table.to(device), longest
    )
    sinks = _sinks(case)
    options: dict[str, Any] = {"max_length": max(1, int(counts.max())), "window": case.window, "impl": impl}
    options |= {"prefixes": shared, "sinks": None if sinks is None else sinks.to(device)}
    places = torch.tensor(starts).to(device), counts.to(device)
    if fp8:
        ones = torch.ones(case.kv_heads)
        scales = HeadScales(torch.ones(case.heads), ones * 2.0**-5, ones * 2.0**-6)
        k8 = torch.full(shape, NAN, dtype=torch.uint8).view(FP8)
        vt8 = torch.full((case.kv_heads, case.head_dim, total), NAN, dtype=torch.uint8).view(FP8)
        keys, values = plain.double()
        for start, length in ends.items():
            part = slice(start, start + length)
            k8[:, part] = quantize(plain[0, :, part], scales.k[:, None, None])
            room = -(-length // KEY_GROUP) * KEY_GROUP
            columns = torch.full((case.kv_heads, case.head_dim, room), 400.0).to(FP8)
            columns[..., :length] = quantize(plain[1, :, part], scales.v[:, None, None]).mT
            vt8[..., start : start + room] = store_order(columns)
            keys[:, part] = k8[:, part].double() * scales.k[:, None, None]
            values[:, part] = columns[..., :length].mT.double() * scales.v[:, None, None]
        scales = HeadScales(*(s.to(device) for s in (scales.q, scales.k, scales.v)))
        got = decode_attention_fp8(q.to(device), k8.to(device), vt8.to(device), scales, *places, **options)
    else:
        keys, values = plain.to(case.dtype)
        got = decode_attention(q.to(device), keys.to(device), values.to(device), *places, **options)
    assert got.dtype == case.dtype
    low = FP16 if fp8 and case.dtype != BF16 else case.dtype
    for s, (g, seen, own) in enumerate(rows):
        if not seen + own:
            assert not got[s].any()
            continue
        places_of = torch.cat([torch.arange(prefixes[g], prefixes[g] + seen), torch.arange(starts[s], starts[s] + own)])
        places_of = places_of[-case.window :] if case.window else places_of
        k, v = keys[:, places_of].double(), values[:, places_of].double()
        exact = attend_one(q[s], k, v, torch.float64, sinks)
        eager = float((attend_one(q[s], k, v, low, sinks) - exact).abs().max())
        error = float((got[s].cpu().double() - exact).abs().max())
        if case.dtype == FP32:
            # A kernel's exp2 knows a weight to 2^-22. Values of both signs cancel in the result; that does not.
            rounding = 2.0**-20 * float(attend_one(q[s], k, v.abs(), torch.float64, None).max())
        else:
            rounding = 2.0**-22 * float(exact.abs().max())
        assert error <= (8 if low == FP32 else 1.5) * eager + rounding, (s, error, eager)


def check_company(
    impl: str, device: str, fp8: bool, dtype: torch.dtype = FP32, windows: tuple[int | None, ...] = (None, 200, 100)
) -> None:
    """Rows of one prefix give the same bits whatever the others of their group hold, and however far a window reaches
    into the prefix for them: in a table of the same width, so that the kernel is the same.
    """
    shape = (2, 1024, 64)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, *shape, generator=generator).to(device)
    q = torch.randn(4, 8, 64, generator=generator).to(device, dtype)
    scales = HeadScales(*(torch.ones(n, device=device) for n in (8, 2, 2)))

    def run(rows: list[int], tails: list[int], window: int | None) -> Tensor:
        table = torch.full((1, 8), -1, dtype=torch.int32)
        table[0, : len(rows)] = torch.arange(len(rows))
        prefixes = Prefixes(
            torch.zeros(len(rows), dtype=torch.int64, device=device),
            torch.full((len(rows),), 333, dtype=torch.int32, device=device), table.to(device), 333,
        )  # fmt: skip
        starts = torch.tensor([512 + 128 * row for row in rows], device=device)
        lengths = torch.tensor(tails, dtype=torch.int32, device=device)
        options: dict[str, Any] = {"max_length": 128, "window": window, "prefixes": prefixes, "impl": impl}
        if fp8:
            stored = store_order(v.mT.contiguous()).to(FP8)
            return decode_attention_fp8(q[rows], k.to(FP8), stored, scales, starts, lengths, **options)
        return decode_attention(q[rows], k, v, starts, lengths, **options)

    for window in windows:
        whole = run([0, 1, 2, 3], [5, 128, 60, 1], window)
        for row, tail in enumerate([5, 128, 60, 1]):
            assert torch.equal(run([row], [tail], window)[0], whole[row]), (window, row)
