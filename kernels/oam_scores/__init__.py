"""How much each key block matters to each query block: Stem's output-aware metric."""

from kernels.oam_scores.api import KeySummary, choose_oam_scores, key_sums_dtype, oam_scores

__all__ = ["KeySummary", "choose_oam_scores", "key_sums_dtype", "oam_scores"]
