"""Model folders that hold an adapter (LoRA and its like), which transformers passes over without peft."""

from __future__ import annotations

from pathlib import Path

CONFIG = "adapter_config.json"
FILES = (CONFIG, "adapter_model.safetensors", "adapter_model.bin")
MERGE = (
    "Merge the adapter into its base model first: "
    "peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)"
)


def adapter_problem(folder: Path) -> str:
    """What is wrong with a model folder that holds an adapter, and how to mend it; empty for one that does not."""
    found = next((name for name in FILES if (folder / name).exists()), None)
    return f"it holds an adapter ({found}), which is not read. {MERGE}" if found else ""
