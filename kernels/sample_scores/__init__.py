"""How much attention each key block gets at most from any of a sample of the query block's rows."""

from kernels.sample_scores.api import choose_sample_scores, sample_scores
from kernels.sample_scores.reference import PEAKS

__all__ = ["PEAKS", "choose_sample_scores", "sample_scores"]
