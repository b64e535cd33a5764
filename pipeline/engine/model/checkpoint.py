"""What can be wrong with a checkpoint: its folder, its kind, and whether it holds the weights of its model, no others.

transformers gives random values to weights that a checkpoint lacks, passes over those that the model lacks, and says so
in the log alone.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.adapters import ADVICE, adapter_problem
from pipeline.engine.config import EngineConfig, EngineError
from pipeline.model_files import gguf_problem, is_gguf

# Names that may be in a checkpoint without a place in the model, since nothing would be computed with them. Those that
# transformers lists with a model's class (_keys_to_ignore_on_load_unexpected) do not get here.
HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$"  # computed from the config
    r"|self_attn\.([kv]_proj\.)?([qkv]_scale|output_scale)$"  # of a cache in fp8: ours are measured when a model loads
    r"|(^|\.)mtp(_layers)?\."  # heads that guess further tokens, which nothing here asks
)
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "module.")
SCALES = re.compile(r"(scale|scale_inv|scales|zero_point|zeros|_packed|absmax|SCB)$")
SHOWN = 3


class ModelLoadError(EngineError):
    """The model cannot be read; the message names it and the cause."""


def check_folder(model: str) -> None:
    """Raise ModelLoadError for the commonest mistakes with local folders, in better words than transformers has."""
    path = Path(model)
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if is_gguf(model) and not path.is_dir():
        problem = gguf_problem(model)
        if problem:
            raise ModelLoadError(f"model {model!r}: {problem}")
    elif path.exists():
        if not path.is_dir():
            raise ModelLoadError(
                f"model {model!r} is a file; give the folder that holds config.json (of files, .gguf ones are read)"
            )
        if adapter_problem(path):
            raise ModelLoadError(f"model {model!r}: {adapter_problem(path)}")
        config = path / "config.json"
        if not config.is_file():
            raise ModelLoadError(f"model folder {model!r} has no config.json")
        try:
            json.loads(config.read_text())
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"model folder {model!r}: config.json cannot be read: {error}") from error
    elif looks_local:
        raise ModelLoadError(f"model folder {model!r} does not exist")


def check_hub(config: EngineConfig) -> None:
    """Raise ModelLoadError for a repository of the hub that holds an adapter."""
    from transformers.utils import find_adapter_config_file

    here = Path(config.model).exists() or is_gguf(config.model)
    if not here and find_adapter_config_file(config.model, revision=config.revision):
        raise ModelLoadError(f"model {config.model!r}: it holds an adapter, which is not read here. {ADVICE}")


def keys_problem(found: Mapping[str, Any]) -> str:
    """What is wrong with the weights that were found, with names, and how to mend it; empty if nothing is.

    found: transformers' loading info, whose mismatched_keys are (name, shape in the checkpoint, in the model).
    """
    missing = sorted(found["missing_keys"])
    extra = sorted(key for key in found["unexpected_keys"] if not HARMLESS.search(key))
    shapes = sorted(f"{key}: {list(stored)}, not {list(due)}" for key, stored, due in found["mismatched_keys"])
    kinds = {"missing": missing, "without a place in the model": extra, "of another shape": shapes}
    wrong = {kind: names for kind, names in kinds.items() if names}
    if not wrong:
        return ""
    # A worker's reason is cut at 500 characters, and the remedy stands at its end.
    shown = SHOWN if len(wrong) == 1 else 1
    told = [f"{len(names):,} {kind} ({listed(names, shown)})" for kind, names in wrong.items()]
    return f"its weights are not those that its config describes: {'; '.join(told)}. {_remedy(missing, extra)}"


def listed(names: list[str], shown: int = SHOWN) -> str:
    """The first of some names, and "..." for the others."""
    return ", ".join(names[:shown]) + ", ..." * (len(names) > shown)


def unscaled_weights(model: str) -> str:
    """What is wrong with a folder whose config tells of no quantisation, if weights in it are whole numbers all the
    same: transformers would take them as they are. Empty if nothing is, or for what is not a folder.
    """
    from safetensors import safe_open

    for file in sorted(Path(model).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
        whole = sorted(name for name, kind in kinds.items() if kind[0] in "IU" and name.endswith((".weight", ".bias")))
        if whole:
            return (
                f"{len(whole):,} of its weights are whole numbers ({kinds[whole[0]]}: {listed(whole)}), and its config "
                "tells of no quantisation that would scale them: use the checkpoint in bf16, or the config.json with "
                "the quantization_config that belongs to it"
            )
    return ""


def _remedy(missing: list[str], extra: list[str]) -> str:
    if any(".lora_" in key or ".base_layer." in key for key in extra):
        return (
            "It holds an adapter that is not merged: save the model again after peft's merge_and_unload(), or the "
            "adapter alone (peft's save_pretrained) and give that as --adapter"
        )
    wrapper = next((name for name in WRAPPERS if any(f".{name}" in f".{key}" for key in extra)), "")
    if wrapper and missing:
        return f"They were saved from inside a wrapper ({wrapper[:-1]}): save the model in it with save_pretrained()"
    if any(SCALES.search(key) for key in extra):
        return (
            "Without their scales quantised weights are wrong, and this model has no place for these where they are: "
            "use the checkpoint in bf16, with precision fp8 to make it smaller"
        )
    if missing == ["lm_head.weight"]:
        return "If this model's output head is its embedding, set tie_word_embeddings to true in config.json"
    return "Use the whole checkpoint and the config.json that belongs to it, or save the model anew (save_pretrained)"


@contextmanager
def load_report() -> Iterator[list[str]]:
    """Inside, transformers' table of keys goes into the list instead of the log: our error says it in one line.

    Also where transformers was told to be quiet.
    """
    found: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return record.levelno >= shown
        found.append(text)
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    level, shown = logger.level, logger.getEffectiveLevel()
    # At WARNING itself transformers would tell which layers it has not spread over processes: all, with us.
    logger.setLevel(min(shown, logging.WARNING - 1))
    logger.addFilter(keep)
    try:
        yield found
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)


def conversion_problem(report: list[str]) -> str:
    """The weights that transformers could not put together from a checkpoint's parts; empty if it says of none."""
    names = [line.split()[0] for text in report for line in text.splitlines() if "| CONVERSION" in line]
    if not names:
        return ""
    return (
        f"{len(names):,} weights cannot be put together from its parts ({listed(names)}): some are missing, or of "
        f"another shape. {_remedy([], [])}"
    )


def pickle_problem(error: BaseException) -> str:
    """What torch found in a pytorch_model.bin besides tensors, and how to mend it; empty if it is something else."""
    text = str(error)
    if "Weights only load failed" not in text and "weights_only" not in text:
        return ""
    found = re.search(r"GLOBAL (\S+)", text)
    return (
        f"its pytorch_model.bin holds more than tensors{f' ({found[1]})' if found else ''}, which could run code when "
        "it is loaded, so it is not read: load it where you trust it, and save the model again with save_pretrained()"
    )
