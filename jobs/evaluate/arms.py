"""The arms of a comparison: how each chooses the key blocks that a prompt's rows keep.

Every arm has a StemConfig for its budgets, so arms of one density keep the same number of blocks in every row. Stem and
its parts, the presets and the mass estimator choose by the product's own code; only scores that no product has are made
here (sink and window, random, the attention itself).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kernels.block_scores import mass_scores, oam_scores
from kernels.block_selection import BlockSelection, select_blocks
from pipeline.errors import JobError, nearest
from stem_core.attention import LayerPolicy
from stem_core.budget import PromptBudget
from stem_core.config import BLOCK_SIZES, StemConfig
from stem_core.selection import stem_selection

# One piece of attention weights in float32 may have this many entries.
MASS_ENTRIES = 1 << 27


@dataclass(frozen=True)
class Place:
    """Where a selection is wanted: the tokens [start, start + Lq) of a prompt of `prompt_length`, in one layer."""

    layer: int
    start: int
    prompt_length: int
    scale: float | None


# (q, k, v, place, config) -> float32 [N, H, rows, n_keys]
Score = Callable[[Tensor, Tensor, Tensor, Place, StemConfig], Tensor]


def window_scores(q: Tensor, k: Tensor, v: Tensor, place: Place, config: StemConfig) -> Tensor:
    """float32 [N, H, rows, n_keys]: the nearer a block, the higher."""
    rows, n_keys = _grid(q, place, config.block_size)
    return torch.arange(n_keys, device=q.device, dtype=torch.float32).expand(*q.shape[:2], rows, n_keys)


def random_scores(q: Tensor, k: Tensor, v: Tensor, place: Place, config: StemConfig) -> Tensor:
    """float32 [N, H, rows, n_keys] in [0, 1), from layer, head, row and column alone: no chunking changes them."""
    rows, n_keys = _grid(q, place, config.block_size)
    first = place.start // config.block_size
    head = torch.arange(q.shape[1], device=q.device)[:, None, None]
    row = torch.arange(first, first + rows, device=q.device)[:, None]
    column = torch.arange(n_keys, device=q.device)
    mixed = ((place.layer * 1009 + head) * 65_537 + row) * 131_101 + column
    for shift, factor in ((33, 0x2545F4914F6CDD1D), (29, 0x369DEA0F31A53F85), (32, 1)):  # as in splitmix64
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed & 0xFFFFFF).float().div(1 << 24).expand(*q.shape[:2], rows, n_keys)


def attention_mass(q: Tensor, k: Tensor, v: Tensor, place: Place, config: StemConfig) -> Tensor:
    """The oracle: mean share of attention that each key block gets from the rows of each query block, exactly.

    float32 [N, H, rows, n_keys]. As dear as dense attention itself; a few rows at a time, never N x N.
    """
    N, H, Lq, D = q.shape
    block_size = config.block_size
    rows, n_keys = _grid(q, place, block_size)
    width = n_keys * block_size
    out = torch.zeros(N, H, rows, n_keys, device=q.device)
    step = max(1, MASS_ENTRIES // (N * H * width * block_size))
    for row in range(0, rows, step):
        part = slice(row * block_size, min(Lq, (row + step) * block_size))
        positions = torch.arange(place.start + part.start, place.start + part.stop, device=q.device)
        share = block_shares(q[:, :, part], k, positions, block_size, place.scale)
        missing = -share.shape[2] % block_size
        share = torch.nn.functional.pad(share, (0, 0, 0, missing)).unflatten(2, (-1, block_size)).sum(3)
        out[:, :, row : row + share.shape[2], : share.shape[3]] = share
    return out


def block_shares(q: Tensor, k: Tensor, positions: Tensor, block_size: int, scale: float | None) -> Tensor:
    """Share of attention of each key block, for queries q [N, H, R, D] at `positions` [R], ascending.

    float32 [N, H, R, blocks up to the last position].
    """
    N, H, R, D = q.shape
    known = int(positions[-1]) + 1
    scale = D**-0.5 if scale is None else scale
    grouped = q.float().mul(scale).reshape(N, k.shape[1], -1, D)
    logits = (grouped @ k[:, :, :known].float().mT).view(N, H, R, known)
    first = int(positions[0])  # keys before the first query are seen by all of them
    later = torch.arange(first, known, device=q.device)
    logits[..., first:].masked_fill_(later > positions[:, None], -torch.inf)
    share = logits.softmax(-1)
    return torch.nn.functional.pad(share, (0, -known % block_size)).unflatten(-1, (-1, block_size)).sum(-1)


def product_mass(q: Tensor, k: Tensor, place: Place, config: StemConfig) -> Tensor:
    """The product's mass scores, float32 [N, H, rows, n_keys]."""
    return mass_scores(
        q,
        k,
        query_start=place.start,
        block_size=config.block_size,
        group=config.mass_group,
        rows=config.mass_rows,
        scale=place.scale,
    )


def coarse_mass(q: Tensor, k: Tensor, v: Tensor, place: Place, config: StemConfig) -> Tensor:
    """Mass scores of the half of the causal blocks that OAM scores highest; the others come after all of them.

    What a first stage that halves the estimator's cost would choose, but for the softmax's total, which is exact here.
    """
    scores = product_mass(q, k, place, config)
    coarse = oam_scores(
        q,
        k,
        v,
        query_start=place.start,
        block_size=config.block_size,
        stride=config.stride,
        value_weight=0.0,
        scale=place.scale,
    )
    first = place.start // config.block_size
    causal = torch.arange(first + 1, first + 1 + scores.shape[2], device=q.device)
    rank = coarse.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return torch.where(rank < -(-causal[:, None] // 2), scores, scores - 2.0)


def shared_mass(q: Tensor, k: Tensor, v: Tensor, place: Place, config: StemConfig) -> Tensor:
    """Mass scores, the largest of the heads of a KV head for all of them: one selection serves the group's keys."""
    scores = product_mass(q, k, place, config).unflatten(1, (k.shape[1], -1))
    return scores.amax(2, keepdim=True).expand_as(scores).flatten(1, 2)


def _grid(q: Tensor, place: Place, block_size: int) -> tuple[int, int]:
    return -(-q.shape[2] // block_size), -(-(place.start + q.shape[2]) // block_size)


@dataclass(frozen=True)
class Arm:
    """One way to choose blocks. config None: dense. score None: the product's own estimator.

    precision: of the engine that reads, also the end of the name; None: the evaluation's own reader.
    """

    name: str
    config: StemConfig | None
    score: Score | None = None
    precision: str | None = None

    @property
    def block_size(self) -> int:
        return 128 if self.config is None else self.config.block_size

    def budget(self, layer: int, prompt_length: int) -> PromptBudget:
        """The row budgets of a layer, as the product would have them."""
        return LayerPolicy(self.config, layer).budget(prompt_length, window=None)

    def select(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> BlockSelection | None:
        """Blocks of the rows of q [N, H, Lq, D] among the keys k [N, Hkv, Lk, D]; None where the layer is dense."""
        budget = self.budget(place.layer, place.prompt_length)
        if self.config is None or budget.budgets is None:
            return None
        if self.score is None:
            return stem_selection(q, k, v, self.config, budget, start=place.start, scale=place.scale)
        scores = self.score(q, k, v, place, self.config).contiguous()
        first, rows = place.start // self.config.block_size, scores.shape[2]
        return select_blocks(
            scores,
            budget.rows(first, first + rows, q.device),
            first_row=first,
            sink_blocks=self.config.sink_blocks,
            local_blocks=self.config.local_blocks,
            max_blocks=budget.max_blocks(first, first + rows),
        )

    def density(self, prompt_length: int, layers: int) -> tuple[float, float]:
        """Kept share of the causal blocks: in a sparse layer, and over all layers."""
        each = [self.budget(layer, prompt_length).density for layer in range(layers)]
        return each[-1], sum(each) / layers


# Arms of equal density: budgets by `density`; the fields that make each one what it is.
EQUAL_DENSITY: dict[str, tuple[dict[str, Any], Score | None]] = {
    "uniform": ({"decay": 1.0, "value_weight": 0.0}, None),
    "tpd": ({"value_weight": 0.0}, None),
    "oam": ({"decay": 1.0}, None),
    "stem": ({}, None),
    "mass": ({"decay": 1.0, "estimator": "mass"}, None),
    "bound": ({"decay": 1.0, "estimator": "bound"}, None),
    "window": ({"decay": 1.0}, window_scores),
    "random": ({"decay": 1.0}, random_scores),
    "oracle": ({"decay": 1.0}, attention_mass),
    # Not in --arms all: ways to make the estimator or the attention cheaper.
    "coarse_mass": ({"decay": 1.0, "estimator": "mass"}, coarse_mass),
    "shared_mass": ({"decay": 1.0, "estimator": "mass"}, shared_mass),
}
PRESETS = ("paper", "release", "robust")
ARMS = ("dense", *PRESETS, *EQUAL_DENSITY)
USUAL_ARMS = tuple(name for name in ARMS if name not in ("coarse_mass", "shared_mass"))
# What a StemConfig says in full, so that the engine runs it.
ENGINE_ARMS = ("dense", *PRESETS, *(name for name, (_, score) in EQUAL_DENSITY.items() if score is None))
# At least so many blocks a prompt: with fewer, sink and window alone are much of it, and the published schedules dense.
FEWEST_BLOCKS = 256


def block_size_for(length: int) -> int:
    """The largest block of up to 128 tokens that cuts `length` into 256 or more; 16 where none does."""
    fitting = [size for size in BLOCK_SIZES if size <= 128 and length // size >= FEWEST_BLOCKS]
    return max(fitting, default=min(BLOCK_SIZES))


def make_arms(
    specs: Sequence[str],
    block_sizes: Sequence[int],
    densities: Sequence[float],
    dense_tails: Sequence[int],
    dense_layers: int,
) -> list[Arm]:
    """All arms of a comparison, dense first. specs: names, or "name:field=value,..." with fields of StemConfig.

    Arms of equal density come at each density and tail; "paper" and "release" have their own budgets, and "robust" its
    own tail too. Raises JobError for a name or field that is not known.
    """
    arms = [Arm("dense", None)] if any(spec == "dense" for spec in specs) else []
    for block_size in block_sizes:
        # Sparse at any length: where dense attention is faster is no question of what is found.
        common = {"block_size": block_size, "dense_layers": dense_layers, "dense_below": 0}
        common["stride"] = min(16, block_size // 4)
        for spec in specs:
            name, _, text = spec.partition(":")
            changes = common | _changes(spec, text)
            if name in PRESETS:
                tails: Sequence[int | None] = [None] if name == "robust" or "dense_tail" in changes else dense_tails
                for tail in tails:
                    arms.append(Arm(spec, _config(spec, name, changes, tail, None)))
            elif name in EQUAL_DENSITY:
                own, score = EQUAL_DENSITY[name]
                for density in [changes["density"]] if "density" in changes else densities:
                    for tail in [None] if "dense_tail" in changes else dense_tails:
                        arms.append(Arm(spec, _config(spec, "release", own | changes, tail, density), score))
            elif spec != "dense":
                raise JobError(
                    f"--arms: {name!r} is not an arm{nearest(name, ARMS) or '; there are ' + ', '.join(ARMS)}"
                )
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


def _config(spec: str, preset: str, changes: dict[str, Any], tail: int | None, density: float | None) -> StemConfig:
    # Selections are compared also where dense attention would be faster.
    changes = {"dense_below": 0} | changes
    if tail is not None:
        changes = changes | {"dense_tail": tail}
    if density is not None:
        changes = changes | {"schedule": "density", "density": density}
    try:
        return StemConfig.preset(preset, **changes)
    except ValueError as error:
        raise JobError(f"--arms {spec}: {error}") from None
