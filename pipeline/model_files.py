"""A model's files on this machine: which kinds are read, and how transformers is told of them. Read without torch."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from pipeline.errors import nearest_beside

GGUF = ".gguf"
GGUF_MAGIC = b"GGUF"
SAFETENSORS = "*.safetensors"
# Read by torch with weights_only=True, which builds tensors and plain containers and runs no code.
PICKLED = "pytorch_model*.bin"
OTHER_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_gguf(model: str) -> bool:
    """Whether a model is given as the path of a .gguf file."""
    return model.lower().endswith(GGUF)


def is_local(model: str) -> bool:
    """Whether a model is a folder, or a .gguf file, of this machine; otherwise it is a hub id."""
    path = Path(model).expanduser()
    return path.is_dir() or (is_gguf(model) and path.is_file())


def source(model: str) -> tuple[str, dict[str, str]]:
    """The first argument of transformers' from_pretrained(), and what else tells it where the model is."""
    if not is_gguf(model):
        return model, {}
    path = Path(model).expanduser()
    return str(path.parent), {"gguf_file": path.name}


def gguf_problem(model: str) -> str:
    """Why a .gguf file cannot be read, and how to mend it; empty if nothing speaks against it."""
    path = Path(model).expanduser()
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        return f"the file cannot be read: {error.strerror}"
    if magic != GGUF_MAGIC:
        return "it is no GGUF file (it does not begin with GGUF): download it again"
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name, re.IGNORECASE):
        return "it is one part of several: join them with llama.cpp's `llama-gguf-split --merge FIRST_PART WHOLE.gguf`"
    return missing_package("gguf", "GGUF files")


def missing_package(name: str, what: str) -> str:
    """The line for a package that is not installed and that `what` needs; empty if it is there.

    name: as pip knows it.
    """
    if importlib.util.find_spec(name.replace("-", "_")):
        return ""
    return f"{what} need the package {name}, which is not installed: pip install {name}"


def weights_problem(folder: Path) -> str:
    """What is wrong with the kinds of weight files in a model folder, and how to mend it; empty if one can be read."""
    if any(folder.glob(SAFETENSORS)) or any(folder.glob(PICKLED)):
        return ""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    gguf = [path for path in files if is_gguf(path.name)]
    if gguf:
        return f"it has no {SAFETENSORS}, but a GGUF file: give that itself, --model {gguf[0]}"
    found = ", ".join(path.name for path in files[:6])
    if any(path.suffix in OTHER_PICKLES for path in files):
        return (
            f"it has no {SAFETENSORS} (found: {found}); pickled weights can run code when they are loaded, so only "
            "pytorch_model.bin is read, as tensors and nothing else; load these where you trust them, and save the "
            "model again with save_pretrained()"
        )
    return (
        f"it has no {SAFETENSORS} (found: {found}); the weights are missing: download them to this folder, too "
        "(hf download ORG/NAME --local-dir FOLDER)"
    )


def has_safetensors(model: str) -> bool:
    """False for a folder whose weights are in pytorch_model.bin alone."""
    folder = Path(model)
    return not folder.is_dir() or any(folder.glob(SAFETENSORS)) or not any(folder.glob(PICKLED))


def config_problem(error: BaseException, model: str, revision: str | None) -> str:
    """What transformers' failure to read a model's config means here, with the flag that helps; empty if not known."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it comes with code of its own, which --trust-remote-code runs: give it if you trust who wrote it"
    kinds = {type(part).__name__ for part in _chain(error)}
    if kinds & {"RevisionNotFoundError"} or "not a valid git identifier" in text:
        return (
            f"the hub has the model, but not revision {revision!r}: --revision takes a branch, a tag or a whole commit"
        )
    if kinds & {"GatedRepoError"} or "gated repo" in text:
        return "it is gated: ask for access on its page at the hub, then log in here with `hf auth login` (or HF_TOKEN)"
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"} or "couldn't connect to" in text:
        return (
            "no such folder here, and the hub cannot be reached, nor was the model downloaded before: fetch it where "
            f"there is network (hf download {model} --local-dir FOLDER), and give the folder"
            + nearest_beside(Path(model).expanduser())
        )
    if found := re.search(r"model type [`'\"]?([\w.-]+)[`'\"]? but Transformers does not recognize", text):
        return (
            f"this version of transformers does not know the model type {found[1]}: pip install -U transformers, or "
            "--trust-remote-code if the model comes with code"
        )
    return ""


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in found:
        found.append(step)
        step = step.__cause__ or step.__context__
    return found
