"""The Stem algorithm (arXiv 2603.06274) and how it enters a transformers model. No files, no Ray."""

from stem_core.budget import PromptBudget, prompt_budget, row_budgets
from stem_core.config import StemConfig
from stem_core.context import DecodeContext, PrefillContext, QuantizedKV
from stem_core.patch import patch_model, unpatch_model

__all__ = [
    "DecodeContext",
    "PrefillContext",
    "PromptBudget",
    "QuantizedKV",
    "StemConfig",
    "patch_model",
    "prompt_budget",
    "row_budgets",
    "unpatch_model",
]
