"""What measurements share: the stamp (machine, versions, commit, time), when two tokens are a tie, random weights."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import JobError
from pipeline.versions import versions

# Logits, by precision: two tokens no further apart may trade places by rounding. Those of bf16 models come in steps of
# 2^-8 of their size: a few steps at logits around 16 are a tie.
TIE = {"fp32": 1e-3, "bf16": 0.5, "fp16": 0.1}


def dummy_folder(config: dict[str, Any], folder: Path) -> Path:
    """The folder, with this config.json for load_format "dummy", but for its stop ids: random weights stop anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    stops = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    (folder / "config.json").write_text(json.dumps(config | stops))
    return folder


def dummy_copy(model: str, folder: Path) -> Path:
    """dummy_folder() for the config.json of a model folder. Raises JobError if there is none."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"--model {model}: --load-format dummy needs a folder with a config.json: {error}") from None
    return dummy_folder(config, folder)


def stamp(device: torch.device, commit: str = "") -> dict[str, Any]:
    """What a measurement must carry with it, as plain values for a JSON file.

    commit: what is measured, where this is not a git checkout.
    """
    about: dict[str, Any] = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "device": str(device),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        **versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return about


def _commit() -> str:
    """The checkout's commit, "+" where files differ from it; "unknown" outside of a checkout."""
    root = Path(__file__).parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "") if head.returncode == 0 else "unknown"
