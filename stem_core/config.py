"""Every choice that Stem leaves open, in one frozen record."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from stem_core.estimators import ESTIMATORS, EstimatorSettings

SCHEDULES = ("paper", "release", "growing", "density")
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class StemConfig(EstimatorSettings):
    """How key blocks are scored, and how many of them each query block keeps.

    Fields that one estimator alone reads are declared in its file, in stem_core/estimators.

    Sources: the Stem paper (arXiv 2603.06274) and the released implementation (Tencent/AngelSlim, commit 67394ce).
    Raises ValueError when a field is out of range.
    """

    schedule: str = "release"
    """Row budgets: "paper" and "release" are Stem's two published schedules; ours are "growing", `base_blocks` and a
    share `growth` of the blocks before, and "density", which solves for `density`."""
    density: float | None = None
    """Share of the causal blocks kept over the whole prompt, in (0, 1]; only with schedule "density"."""
    base_blocks: int = 40
    """Blocks that every row of the schedule "growing" keeps: short prompts lose little or nothing."""
    growth: float = 0.06
    """Share of its causal blocks that a row of the schedule "growing" keeps besides."""
    block_size: int = 128
    """Tokens in a query or key block."""
    sink_blocks: int = 4
    """Leading key blocks that every row keeps."""
    local_blocks: int = 4
    """Nearest key blocks, the diagonal one included, that every row keeps."""
    decay: float = 0.7
    """Token Position Decay: the last row's budget as a share of the first one's; 1 is a uniform budget."""
    estimator: str = "oam"
    """How key blocks are scored: the name of an estimator (stem_core.estimators)."""
    dense_layers: int = 2
    """Leading layers that attend to everything."""
    dense_below: int = 0
    """Prompts shorter than this many tokens attend to everything."""
    dense_tail: int = 0
    """Blocks at the prompt's end whose rows keep every causal block (ours; the question usually stands there)."""
    max_output_error: float = 0.0
    """Largest relative error of the attention output, against dense attention's, that sparse prefill may have in a
    sample of a prompt's rows; a document beyond it is prefilled again, densely. 0: not measured; 1 or more: measured
    only, in practice. Only the engine measures: in a model that is patched without it this changes nothing."""

    def __post_init__(self) -> None:
        self._check_types()
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("estimator", self.estimator, tuple(ESTIMATORS))
        _one_of("block_size", self.block_size, BLOCK_SIZES)
        if (self.schedule == "density") != (self.density is not None):
            raise ValueError(
                f"density={self.density} does not go with schedule={self.schedule!r}: schedule 'density' needs one "
                "in (0, 1], the others take none"
            )
        _within("density", self.density, 0.0, 1.0, open_low=True)
        _within("decay", self.decay, 0.0, 1.0, open_low=True)
        _within("growth", self.growth, 0.0, 1.0)
        _within("max_output_error", self.max_output_error, 0.0, 1e6)
        for field in fields(EstimatorSettings):
            self._check_setting(field.name, getattr(self, field.name), field.metadata)
        ESTIMATORS[self.estimator].check(self)
        _within("local_blocks", self.local_blocks, 1, 1 << 20)
        for name in ("base_blocks", "sink_blocks", "dense_layers", "dense_below", "dense_tail"):
            _within(name, getattr(self, name), 0, 1 << 30)

    def _check_types(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = type(field.default) if field.name != "density" else float
            number = kind is float and isinstance(value, int | float) and not isinstance(value, bool)
            if number or (field.name == "density" and value is None) or type(value) is kind:
                continue
            raise ValueError(f"{field.name} must be {kind.__name__}, got {value!r}")

    def _check_setting(self, name: str, value: Any, rules: Mapping[str, Any]) -> None:
        if rules["low"] is not None:
            _within(name, value, rules["low"], rules["high"])
        if rules["divides_block"] and (value < 1 or self.block_size % value):
            raise ValueError(f"{name} must divide block_size={self.block_size}, got {value}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> StemConfig:
        """A named configuration with `changes` applied; PRESETS says what each is for."""
        if name in REMOVED_PRESETS:
            raise ValueError(f"preset {name!r} is no more: {REMOVED_PRESETS[name]}")
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known; use one of {', '.join(PRESETS)}{_nearest(name, PRESETS)}")
        return cls.from_dict(asdict(PRESETS[name]) | changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StemConfig:
        """The inverse of `to_dict`; fields that are left out keep their defaults, unknown ones raise ValueError."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{name!r} is not a field of StemConfig{_nearest(name, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON and YAML can hold, those of single estimators last."""
        values = asdict(self)
        return {name: values[name] for name in (*StemConfig.__annotations__, *values)}

    def replace(self, **changes: Any) -> StemConfig:
        """A copy with `changes` applied, validated again."""
        return replace(self, **changes)

    def fingerprint(self) -> str:
        """12 hex digits that differ whenever a field differs."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _one_of(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _within(name: str, value: float | None, low: float, high: float, open_low: bool = False) -> None:
    if value is not None and not (low < value <= high if open_low else low <= value <= high):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}], got {value}")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# Below this length dense attention is faster than selection and sparse attention together, measured on an H100 with
# blocks of 128 (`python -m tools.benchmark attention --crossover`). The release schedule drops nothing there anyway.
DENSE_BELOW = 6144

# "sampled", the default, scores blocks by single queries, an eighth of all, and lets the heads of a row share its
# blocks: what loses least on real models. Its end, where the question usually stands, sees everything. "paper" and
# "release" are Stem as published: they lose needles on real models. docs/benchmarks.md has the figures.
PRESETS: dict[str, StemConfig] = {
    "sampled": StemConfig(schedule="growing", decay=1.0, estimator="sample", dense_tail=1, dense_below=DENSE_BELOW),
    "paper": StemConfig(schedule="paper", dense_below=DENSE_BELOW),
    "release": StemConfig(schedule="release", dense_below=DENSE_BELOW),
}
REMOVED_PRESETS = {"robust": "on real models it lost what a document says in its middle; use 'sampled', the default"}
