"""A LoRA adapter, merged into its model when that is loaded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from pipeline.adapters import merge_problem
from pipeline.engine.model.checkpoint import ModelLoadError, listed

PREFIX = "base_model.model."


def check_adapter(adapter: str) -> None:
    """Raise ModelLoadError for an adapter that cannot be merged, as far as its folder tells."""
    problem = merge_problem(adapter)
    if problem:
        raise ModelLoadError(f"adapter {adapter!r}: {problem}")


@torch.no_grad()
def merge_adapter(model: Any, adapter: str) -> nn.Module:
    """`model` with the adapter's products added to its weights: W + scale * B @ A, computed in float32 by peft.

    model: with all its weights, none of them quantised. adapter: folder of a LoRA adapter. Its modules_to_save take the
    place of the model's. Raises ModelLoadError for one that is of another model.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    stored = load_peft_weights(adapter, device="cpu")
    try:
        with warnings.catch_warnings():  # what is missing is an error below
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _misfit(adapter, model, _reason(error)) from error
    due = get_peft_model_state_dict(wrapped)
    missing, extra = sorted(due.keys() - stored.keys()), sorted(stored.keys() - due.keys())
    if missing or extra:
        kinds = {"missing": missing, "without a place in the model": extra}
        told = [f"{len(names):,} of its weights {kind} ({listed(names, 1)})" for kind, names in kinds.items() if names]
        raise _misfit(adapter, model, "; ".join(told))
    try:
        merged: nn.Module = wrapped.merge_and_unload(safe_merge=True)  # raises for values that are not finite
    except ValueError as error:
        raise ModelLoadError(f"adapter {adapter!r}: it cannot be merged: {_reason(error)}") from error
    vars(merged).pop("peft_config", None)
    return merged


def _misfit(adapter: str, model: Any, why: str) -> ModelLoadError:
    name = type(model).__name__
    return ModelLoadError(
        f"adapter {adapter!r} is not one of this model ({name}): {why}. Give the model that it was trained on as "
        "--model (base_model_name_or_path in adapter_config.json)"
    )


def _reason(error: BaseException) -> str:
    """One line of peft's message; of sizes that do not fit, the first weight with both."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if line.startswith("size mismatch")), lines[0] if lines else repr(error))
    return line.replace(PREFIX, "")[:300]
