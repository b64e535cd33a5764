"""From a path or hub id to a model on the device, and what the engine must know of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.engine.config import EngineConfig, EngineError

# A context that no arena reaches, for configs that state none.
UNBOUNDED = 1 << 40


class ModelLoadError(EngineError):
    """The model cannot be read; the message names it and the cause."""


def load_config(config: EngineConfig) -> Any:
    """The transformers config of `config.model`. Raises ModelLoadError."""
    from transformers import AutoConfig

    _check_folder(config.model)
    try:
        return AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ModelLoadError(f"cannot read the config of model {config.model!r}: {_first_line(error)}") from error


def load_model(config: EngineConfig) -> nn.Module:
    """The model in eval mode on the engine's device, without a second copy in host memory.

    Reads safetensors only. load_format "dummy" builds the architecture straight on the device with its own random
    initialisation, buffers (rotary frequencies) included. Raises ModelLoadError.
    """
    from transformers import AutoModelForCausalLM

    device = config.torch_device()
    dtype = config.torch_dtype(device)
    hf_config = load_config(config)
    try:
        if config.load_format == "dummy":
            torch.manual_seed(config.seed)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(
                    hf_config, dtype=dtype, trust_remote_code=config.trust_remote_code
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(
                config.model,
                config=hf_config,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=dtype,
                use_safetensors=True,
                device_map={"": device} if device.type == "cuda" else None,
            )
    except torch.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        raise ModelLoadError(f"model {config.model!r} does not fit the {total:.0f} GiB of {device}") from error
    except Exception as error:
        raise ModelLoadError(f"cannot load model {config.model!r}: {_first_line(error)}") from error
    return model.eval().requires_grad_(False)


def stop_token_ids(model: nn.Module) -> tuple[int, ...]:
    """End-of-sequence ids of the generation config, or else of the model config; sorted."""
    for source in (getattr(model, "generation_config", None), model.config.get_text_config()):  # type: ignore[union-attr, operator]
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(sorted({ids} if isinstance(ids, int) else set(ids)))
    return ()


def context_limit(hf_config: Any) -> int:
    """Most positions that the model was made for: its config's, or those of its RoPE scaling where they are more."""
    text = hf_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return UNBOUNDED
    rope = getattr(text, "rope_parameters", None) or {}
    scalings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for scaling in scalings:
        factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
        if factor and original:
            limit = max(limit, math.floor(factor * original))
    return limit


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; tied tensors once."""
    tensors = {t.data_ptr() or id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())


def _check_folder(model: str) -> None:
    """A better message than transformers has for the commonest mistakes with local folders."""
    path = Path(model)
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if path.exists():
        if not path.is_dir():
            raise ModelLoadError(f"model {model!r} is a file; give the folder that holds config.json")
        config = path / "config.json"
        if not config.is_file():
            raise ModelLoadError(f"model folder {model!r} has no config.json")
        try:
            json.loads(config.read_text())
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"model folder {model!r}: config.json cannot be read: {error}") from error
    elif looks_local:
        raise ModelLoadError(f"model folder {model!r} does not exist")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
