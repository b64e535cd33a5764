"""Every choice that Stem leaves open, in one frozen record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from stem_core.estimators import ESTIMATORS, EstimatorSettings
from stem_core.settings import SettingError, check_all, nearest, setting

SCHEDULES = ("paper", "release", "growing", "density")
BLOCK_SIZES = (16, 32, 64, 128, 256)
FP8_BLOCK_SIZES = (32, 64, 128, 256)
MOST = 1 << 30  # blocks, tokens or layers: counts on the device are of 32 bits


@dataclass(frozen=True)
class StemConfig(EstimatorSettings):
    """How key blocks are scored, and how many of them each query block keeps.

    Fields that one estimator alone reads are declared in its file, in stem_core/estimators.

    Sources: the Stem paper (arXiv 2603.06274) and the released implementation (Tencent/AngelSlim, commit 67394ce).
    Every field but `schedule` and `density` is a setting of jobs, where unset leaves the preset's value.
    Raises ValueError when a field is out of range (SettingError), or fields do not go together.
    """

    schedule: str = setting(
        "release",
        "row budgets: paper and release are Stem's two published schedules; ours are growing and density",
        more="growing keeps base_blocks and a share growth of the blocks before, or all where that saves less than the "
        "scores cost; density solves for density",
        choices=SCHEDULES,
    )
    density: float | None = setting(
        None,
        "share of the causal blocks kept over the whole prompt",
        more="only with the schedule density",
        above=0,
        high=1,
    )
    base_blocks: int = setting(
        48,
        "blocks that every row keeps, with the schedule of sampled",
        more="short prompts lose little or nothing by that",
        low=0,
        high=MOST,
    )
    growth: float = setting(0.06, "share of its causal blocks that every row keeps besides base_blocks", low=0, high=1)
    block_size: int = setting(128, "tokens in a query or key block", choices=BLOCK_SIZES)
    sink_blocks: int = setting(4, "leading key blocks that every row keeps", low=0, high=MOST)
    local_blocks: int = setting(
        4, "nearest key blocks, the diagonal one included, that every row keeps", low=1, high=1 << 20
    )
    decay: float = setting(
        0.7,
        "last row's budget as a share of the first one's (Token Position Decay)",
        more="1 is a uniform budget",
        above=0,
        high=1,
    )
    estimator: str = setting("oam", "how key blocks are scored", choices=ESTIMATORS)
    dense_layers: int = setting(2, "leading layers that attend to everything", low=0, high=MOST)
    dense_below: int = setting(0, "prompts of fewer tokens attend to everything", low=0, high=MOST)
    dense_tail: int = setting(
        0,
        "blocks at the prompt's end whose rows keep every causal block",
        more="ours",
        low=0,
        high=MOST,
    )
    max_output_error: float = setting(
        0.0,
        "documents whose attention output sparse prefill changes by a larger share are read again, densely",
        more="measured against dense attention in a sample of each prompt's rows; 0: not measured; a limit of 100 only "
        "measures. Only the engine measures: in a model that is patched without it this changes nothing",
        low=0,
        high=1e6,
        added_later=True,
    )

    def __post_init__(self) -> None:
        check_all(self)
        if (self.schedule == "density") != (self.density is not None):
            raise ValueError(
                f"density={self.density} does not go with schedule={self.schedule!r}: schedule 'density' needs one "
                "in (0, 1], the others take none"
            )
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata["divides_block"] and (value < 1 or self.block_size % value):
                raise SettingError(item.name, f"a divisor of block_size={self.block_size}", value)
        ESTIMATORS[self.estimator].check(self)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> StemConfig:
        """A named configuration with `changes` applied; PRESETS says what each is for."""
        if name in REMOVED_PRESETS:
            raise ValueError(f"preset {name!r} is no more: {REMOVED_PRESETS[name]}")
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known; use one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
        return cls.from_dict(asdict(PRESETS[name]) | changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StemConfig:
        """The inverse of `to_dict`; fields that are left out keep their defaults, unknown ones raise ValueError."""
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{name!r} is not a field of StemConfig{nearest(name, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON and YAML can hold, those of single estimators last."""
        values = asdict(self)
        return {name: values[name] for name in (*StemConfig.__annotations__, *values)}

    def replace(self, **changes: Any) -> StemConfig:
        """A copy with `changes` applied, validated again."""
        return replace(self, **changes)

    def fp8_obstacle(self) -> str:
        """Why the fp8 kernels cannot take these blocks; empty if they can."""
        if self.block_size in FP8_BLOCK_SIZES:
            return ""
        sizes = ", ".join(map(str, FP8_BLOCK_SIZES))
        return f"its kernels take blocks of {sizes} tokens, got block_size={self.block_size}"

    def fingerprint(self) -> str:
        """12 hex digits that differ whenever a field differs."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# Below this length dense attention is faster than selection and sparse attention together, measured on an H100 with
# blocks of 128 (`python -m tools.benchmark attention --crossover`). The release schedule drops nothing there anyway.
DENSE_BELOW = 6144

DEFAULT_PRESET = "sampled"

# "sampled" scores blocks by single queries, an eighth of all, and lets the heads of a row share its blocks: what loses
# least on real models. The end of a document sees everything, and so does the question behind it. No leading layers are
# dense: at equal cost, more blocks in every layer lose less. "paper" and "release" are Stem as published: they lose
# needles on real models. docs/quality.md has the figures.
PRESETS: dict[str, StemConfig] = {
    "sampled": StemConfig(
        schedule="growing",
        decay=1.0,
        estimator="sample",
        dense_layers=0,
        dense_tail=1,
        dense_below=DENSE_BELOW,
    ),
    "paper": StemConfig(schedule="paper", dense_below=DENSE_BELOW),
    "release": StemConfig(schedule="release", dense_below=DENSE_BELOW),
}
REMOVED_PRESETS = {"robust": "on real models it lost what a document says in its middle; use 'sampled', the default"}
