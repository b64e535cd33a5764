"""LoRA adapters: folders that hold one, which transformers passes over or loads unasked, and what can be merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.model_files import missing_package

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS, "adapter_model.bin")
ADVICE = "Give its base model as --model and the folder of the adapter as --adapter: it is merged when the model loads"


def adapter_problem(folder: Path) -> str:
    """What is wrong with a model folder that holds an adapter, and how to mend it; empty for one that does not."""
    found = next((name for name in FILES if (folder / name).exists()), None)
    if not found:
        return ""
    base = _base(folder)
    return f"it holds an adapter ({found})" + (f" of {base}" if base else "") + f", which is not read here. {ADVICE}"


def merge_problem(adapter: str) -> str:
    """Why an adapter cannot be merged, and how to mend it; empty if nothing in its folder speaks against it."""
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        return (
            f"no such folder; expected one with {CONFIG} and {WEIGHTS}; an adapter of the hub: "
            "hf download ORG/NAME --local-dir FOLDER"
        )
    if not (folder / CONFIG).is_file():
        return f"no {CONFIG} there; expected the folder of a LoRA adapter, as peft's save_pretrained() writes it"
    config = _config(folder)
    if config is None:
        return f"its {CONFIG} cannot be read as JSON"
    if config.get("peft_type") != "LORA":
        return f"it is of type {config.get('peft_type')}, which is not merged here; LoRA adapters are"
    if not (folder / WEIGHTS).is_file():
        return (
            f"no {WEIGHTS} there (a pickled adapter_model.bin is not read): save it again with peft's save_pretrained()"
        )
    return missing_package("peft", "adapters")


def _base(folder: Path) -> str:
    name = (_config(folder) or {}).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None
