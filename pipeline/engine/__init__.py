"""The engine on one device: prompts prefilled in chunks with Stem or dense attention, decoded as one ragged batch."""

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
