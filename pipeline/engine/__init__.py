"""The engine on one device: prompts prefilled in chunks with Stem or dense attention, decoded as one ragged batch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.engine.config import Completion, EngineConfig, EngineError, Request, Sampling, SharedPrompt
    from pipeline.engine.engine import Engine
    from pipeline.engine.memory.plan import MemoryPlan, estimate_plan
    from pipeline.engine.model.checkpoint import ModelLoadError

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineError",
    "MemoryPlan",
    "ModelLoadError",
    "Request",
    "Sampling",
    "SharedPrompt",
    "estimate_plan",
]

_PLACES = {
    "Engine": "pipeline.engine.engine",
    "MemoryPlan": "pipeline.engine.memory.plan",
    "ModelLoadError": "pipeline.engine.model.checkpoint",
    "estimate_plan": "pipeline.engine.memory.plan",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: a job's driver needs what goes into the engine and comes out, and neither engine nor torch.
    if name not in __all__:
        raise AttributeError(f"module 'pipeline.engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES.get(name, "pipeline.engine.config")), name)
