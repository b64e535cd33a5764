"""The arms of a comparison: dense attention, the presets, and controls that choose blocks without an estimator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jobs.known.reader import Arm
from kernels.block_selection import BlockSelection
from pipeline.errors import JobError, nearest
from stem_core.budget import PromptBudget
from stem_core.config import BLOCK_SIZES, PRESETS, StemConfig
from stem_core.selection import best_of_each_row

# (layer, q [1, H, Lq, D], k [1, Hkv, Lk, D], start, block size, scale) -> float32 [1, H, rows, n_keys]; shapes as of
# stem_core.estimators.Estimator.scores.
Score = Callable[[int, Tensor, Tensor, int, int, float | None], Tensor]
# One piece of attention weights in float32 may have this many entries.
MASS_ENTRIES = 1 << 27
# Share of the blocks that a control keeps where no density is given.
CONTROL_DENSITY = 0.25
# Dense attention once more, in chunks of another length: what rounding alone makes of the answers.
AGAIN = "dense-again"


def select_by(score: Score, layer: int, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, budget: PromptBudget, *,
              start: int, scale: float | None, **_: Any) -> BlockSelection:  # fmt: skip
    """What a control keeps; as PrefillContext.select, behind the control's score."""
    scores = score(layer, q, k, start, config.block_size, scale).contiguous()
    return best_of_each_row(scores, config, budget, start // config.block_size)


def window_scores(layer: int, q: Tensor, k: Tensor, start: int, block_size: int, scale: float | None) -> Tensor:
    """The nearer a block, the higher."""
    rows, n_keys = _grid(q, start, block_size)
    return torch.arange(n_keys, device=q.device, dtype=torch.float32).expand(*q.shape[:2], rows, n_keys)


def random_scores(layer: int, q: Tensor, k: Tensor, start: int, block_size: int, scale: float | None) -> Tensor:
    """In [0, 1), from layer, head, row and column alone: no chunking changes them."""
    rows, n_keys = _grid(q, start, block_size)
    first = start // block_size
    head = torch.arange(q.shape[1], device=q.device)[:, None, None]
    row = torch.arange(first, first + rows, device=q.device)[:, None]
    column = torch.arange(n_keys, device=q.device)
    mixed = ((layer * 1009 + head) * 65_537 + row) * 131_101 + column
    for shift, factor in ((33, 0x2545F4914F6CDD1D), (29, 0x369DEA0F31A53F85), (32, 1)):  # as in splitmix64
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed & 0xFFFFFF).float().div(1 << 24).expand(*q.shape[:2], rows, n_keys)


def attention_mass(layer: int, q: Tensor, k: Tensor, start: int, block_size: int, scale: float | None) -> Tensor:
    """The oracle: mean share of attention that each key block gets from the rows of each query block, exactly.

    As dear as dense attention itself; a few rows at a time, never N x N.
    """
    N, H, Lq, D = q.shape
    rows, n_keys = _grid(q, start, block_size)
    known = start + Lq
    keys = k[:, :, :known].float().mT
    out = torch.zeros(N, H, rows, n_keys, device=q.device)
    step = max(1, MASS_ENTRIES // (N * H * n_keys * block_size * block_size))
    for row in range(0, rows, step):
        part = slice(row * block_size, min(Lq, (row + step) * block_size))
        asked = q[:, :, part].float().mul(D**-0.5 if scale is None else scale).reshape(N, k.shape[1], -1, D)
        positions = torch.arange(start + part.start, start + part.stop, device=q.device)[:, None]
        logits = (asked @ keys).view(N, H, -1, known)
        share = logits.masked_fill_(torch.arange(known, device=q.device) > positions, -torch.inf).softmax(-1)
        missing = (0, n_keys * block_size - known, 0, -share.shape[2] % block_size)
        blocks = torch.nn.functional.pad(share, missing).unflatten(3, (-1, block_size)).sum(-1)
        found = blocks.unflatten(2, (-1, block_size)).sum(3)
        out[:, :, row : row + found.shape[2]] = found
    return out


def _grid(q: Tensor, start: int, block_size: int) -> tuple[int, int]:
    return -(-q.shape[2] // block_size), -(-(start + q.shape[2]) // block_size)


CONTROLS: dict[str, Score] = {"window": window_scores, "random": random_scores, "oracle": attention_mass}
ARMS = ("dense", AGAIN, *PRESETS, *CONTROLS)


def make_arms(specs: Sequence[str], block_size: int | None, precisions: Sequence[str] = ()) -> list[Arm]:
    """The arms in their order, dense first. specs: "name", or "name:field=value,..." with fields of StemConfig.

    block_size: of all sparse arms, which then are sparse at any length; None: as their presets say. Raises JobError for
    a name, field or value that is not known, or that one of the precisions cannot run.
    """
    arms = [Arm("dense", None)]
    for spec in dict.fromkeys(specs):
        name, _, text = spec.partition(":")
        changes = _changes(spec, text)
        if block_size is not None:
            # Sparse at any length: where dense attention is faster is no question of what is found.
            changes = {"block_size": block_size, "stride": min(16, block_size // 4), "dense_below": 0} | changes
        if name in ("dense", AGAIN):
            if text:
                raise JobError(f"--arms {spec}: dense attention has no settings")
            arms += [] if name == "dense" else [Arm(AGAIN, None, other_chunks=True)]
        elif name in PRESETS:
            arms.append(Arm(spec, _config(spec, name, changes)))
        elif name in CONTROLS:
            own = {"decay": 1.0, "density": CONTROL_DENSITY, "dense_below": 0} | changes
            arms.append(Arm(spec, _config(spec, "release", own), partial(select_by, CONTROLS[name])))
        else:
            hint = nearest(name, ARMS) or f"; there are {', '.join(ARMS)}"
            raise JobError(f"--arms: {name!r} is not an arm{hint}")
    for arm in arms if "fp8" in precisions else ():
        obstacle = arm.config.fp8_obstacle() if arm.config is not None else ""
        if arm.name.partition(":")[0] == "oracle":
            obstacle = "it reads keys in 16 or 32 bits"
        if obstacle:
            raise JobError(f"--arms {arm.name}: it cannot run with --precision fp8: {obstacle}")
    return arms


def _changes(spec: str, text: str) -> dict[str, Any]:
    kinds: dict[str, type] = {item.name: type(item.default) for item in fields(StemConfig)} | {"density": float}
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        if name not in kinds or not value:
            raise JobError(f"--arms {spec}: {pair!r} is not field=value of StemConfig{nearest(name, kinds)}")
        try:
            found[name] = kinds[name](value)
        except ValueError:
            raise JobError(f"--arms {spec}: {name} must be {kinds[name].__name__}, got {value!r}") from None
    return found


def _config(spec: str, preset: str, changes: dict[str, Any]) -> StemConfig:
    if "density" in changes:
        changes = {"schedule": "density"} | changes
    try:
        config = StemConfig.preset(preset, **changes)
    except ValueError as error:
        raise JobError(f"--arms {spec}: {error}") from None
    if config.block_size not in BLOCK_SIZES:
        raise JobError(f"--arms {spec}: block_size must be one of {', '.join(map(str, BLOCK_SIZES))}")
    return config
