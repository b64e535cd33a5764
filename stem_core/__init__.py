"""The Stem algorithm (arXiv 2603.06274) and how it enters a transformers model. No files, no Ray."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_PLACES = {
    "DecodeContext": "stem_core.context",
    "PrefillContext": "stem_core.context",
    "PromptBudget": "stem_core.budget",
    "QuantizedKV": "stem_core.context",
    "StemConfig": "stem_core.config",
    "patch_model": "stem_core.patch",
    "prompt_budget": "stem_core.budget",
    "row_budgets": "stem_core.budget",
    "unpatch_model": "stem_core.patch",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: the settings alone are read without torch.
    if name not in _PLACES:
        raise AttributeError(f"module 'stem_core' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
