"""The arms of a comparison: how each chooses the key blocks that a prompt's rows keep.

Every arm has a StemConfig for its budgets, so arms of one density keep the same number of blocks in every row. Stem and
its parts, the presets and the estimators choose by the product's own code; only scores that no product has are made
here (sink and window, random, the attention itself).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from jobs.evaluate.beyond import shared_budget_selection
from jobs.evaluate.scores import (
    Place,
    Score,
    attention_mass,
    product_scores,
    random_scores,
    window_scores,
)
from kernels.block_selection import BlockSelection
from pipeline.errors import JobError, nearest
from stem_core.attention import LayerPolicy
from stem_core.budget import PromptBudget
from stem_core.config import BLOCK_SIZES, PRESETS, StemConfig
from stem_core.estimators import ESTIMATORS
from stem_core.selection import best_of_each_row, stem_selection


@dataclass(frozen=True)
class Arm:
    """One way to choose blocks. config None: dense. score None: the product's own estimator.

    precision: of the engine that reads, also the end of the name; None: the evaluation's own reader.
    mean, shared_budget: ideas beyond Stem, see `jobs.evaluate.beyond`; the rule of the second, empty without it.
    """

    name: str
    config: StemConfig | None
    score: Score | None = None
    precision: str | None = None
    mean: bool = False
    shared_budget: str = ""

    @property
    def block_size(self) -> int:
        return 128 if self.config is None else self.config.block_size

    @property
    def is_product(self) -> bool:
        """Whether the product's engine can run it."""
        return self.score is None and not self.mean and not self.shared_budget

    def budget(self, layer: int, prompt_length: int) -> PromptBudget:
        """The row budgets of a layer, as the product would have them."""
        if self.config is not None and prompt_length >= self.config.dense_below:
            # Budgets go by blocks: prompts of as many share one record, which takes milliseconds to make.
            prompt_length += -prompt_length % self.block_size
        return LayerPolicy(self.config, layer).budget(prompt_length, window=None)

    def select(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> BlockSelection | None:
        """Blocks of the rows of q [N, H, Lq, D] among the keys k [N, Hkv, Lk, D]; None where the layer is dense."""
        budget = self.budget(place.layer, place.prompt_length)
        if self.config is None or budget.budgets is None:
            return None
        score = self.score
        if score is None and not self.shared_budget:
            return stem_selection(q, k, v, self.config, budget, start=place.start, scale=place.scale)
        scores = (score or product_scores)(q, k, v, place, self.config).contiguous()
        first, rows = place.start // self.config.block_size, scores.shape[2]
        if self.shared_budget:
            budgets = budget.rows(first, first + rows, q.device)
            return shared_budget_selection(scores, budgets, place, self.config, self.shared_budget)
        return best_of_each_row(scores, self.config, budget, first)

    def density(self, prompt_length: int, layers: int) -> tuple[float, float]:
        """Kept share of the causal blocks: in a sparse layer, and over all layers."""
        each = [self.budget(layer, prompt_length).density for layer in range(layers)]
        return each[-1], sum(each) / layers


# Arms of equal density: budgets by `density`; the fields that make each one what it is.
EQUAL_DENSITY: dict[str, tuple[dict[str, Any], Score | None]] = {
    "uniform": ({"decay": 1.0, "value_weight": 0.0}, None),
    "tpd": ({"value_weight": 0.0}, None),
    "stem": ({}, None),
    **{name: ({"decay": 1.0, "estimator": name}, None) for name in ESTIMATORS},
    "window": ({"decay": 1.0}, window_scores),
    "random": ({"decay": 1.0}, random_scores),
    "oracle": ({"decay": 1.0}, attention_mass),
}
ARMS = ("dense", *PRESETS, *EQUAL_DENSITY)
# Ideas beyond Stem, behind the name of a sparse arm, as "stem+mean" or "sample+adaptive+mean".
SHARED_BUDGETS = ("adaptive", "threshold", "heads")
IDEAS = ("mean", *SHARED_BUDGETS)
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
    """All arms of a comparison, dense first. specs: "name", "name+idea" with IDEAS, or either followed by
    ":field=value,..." with fields of StemConfig.

    Arms of equal density come at each density and tail; presets have their own budgets. Raises JobError for a name or
    field that is not known.
    """
    arms = [Arm("dense", None)] if any(spec == "dense" for spec in specs) else []
    for block_size in block_sizes:
        # Sparse at any length: where dense attention is faster is no question of what is found.
        common = {"block_size": block_size, "dense_layers": dense_layers, "dense_below": 0}
        common["stride"] = min(16, block_size // 4)
        for spec in specs:
            whole, _, text = spec.partition(":")
            name, *ideas = whole.split("+")
            changes = common | _changes(spec, text)
            if name in PRESETS:
                tails: Sequence[int | None] = [None] if "dense_tail" in changes else dense_tails
                for tail in tails:
                    arms.append(_with_ideas(Arm(spec, _config(spec, name, changes, tail, None)), ideas))
            elif name in EQUAL_DENSITY:
                own, score = EQUAL_DENSITY[name]
                for density in [changes["density"]] if "density" in changes else densities:
                    for tail in [None] if "dense_tail" in changes else dense_tails:
                        config = _config(spec, "release", own | changes, tail, density)
                        arms.append(_with_ideas(Arm(spec, config, score), ideas))
            elif spec != "dense":
                raise JobError(
                    f"--arms: {name!r} is not an arm{nearest(name, ARMS) or '; there are ' + ', '.join(ARMS)}"
                )
    return arms


def _with_ideas(arm: Arm, ideas: Sequence[str]) -> Arm:
    for idea in ideas:
        if idea not in IDEAS:
            hint = nearest(idea, IDEAS) or f"; there are {', '.join(IDEAS)}"
            raise JobError(f"--arms {arm.name}: {idea!r} is not an idea{hint}")
    rules = [idea for idea in ideas if idea in SHARED_BUDGETS]
    if len(rules) > 1:
        raise JobError(f"--arms {arm.name}: of {', '.join(SHARED_BUDGETS)} an arm takes one")
    rule = rules[0] if rules else ""
    assert arm.config is not None
    shares = arm.score is attention_mass or (arm.score is None and ESTIMATORS[arm.config.estimator].shares)
    if rule and not shares:
        known = [name for name, estimator in ESTIMATORS.items() if estimator.shares]
        raise JobError(
            f"--arms {arm.name}: {rule} needs scores that are shares of attention: {', '.join(known)} or oracle"
        )
    return replace(arm, mean="mean" in ideas, shared_budget=rule)


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
    if "max_output_error" in changes:
        raise JobError(
            f"--arms {spec}: max_output_error makes some prompts dense; an arm is of one kind: ask dense too"
        )
    if tail is not None:
        changes = changes | {"dense_tail": tail}
    if density is not None:
        changes = changes | {"schedule": "density", "density": density}
    try:
        return StemConfig.preset(preset, **changes)
    except ValueError as error:
        raise JobError(f"--arms {spec}: {error}") from None
