"""The estimators, which score key blocks: a file each. What differs between them is asked of this table."""

from __future__ import annotations

from dataclasses import dataclass

from stem_core.estimators.oam import Oam, OamSettings
from stem_core.estimators.protocol import Chunk, Estimator, KeyState
from stem_core.estimators.sample import Sample, SampleSettings

__all__ = ["ESTIMATORS", "Chunk", "Estimator", "EstimatorSettings", "KeyState"]

ESTIMATORS: dict[str, Estimator] = {estimator.name: estimator for estimator in (Sample(), Oam())}


@dataclass(frozen=True)
class EstimatorSettings(OamSettings, SampleSettings):
    """The fields of StemConfig that belong to one estimator each (the last base's come first)."""
