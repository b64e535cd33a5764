"""How transformers is asked for a model's config and weights, by the kind of its files."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.model_files import has_safetensors, is_gguf, source


def read_config(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The transformers config of a folder, .gguf file or hub id. Raises what transformers raises."""
    from transformers import AutoConfig

    if is_gguf(model):
        state = Path(model).stat()
        return deepcopy(_gguf_config(model, state.st_size, state.st_mtime_ns))
    return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)


@lru_cache(maxsize=2)
def _gguf_config(model: str, size: int, modified_ns: int) -> Any:
    """Kept, since the file's vocabulary is read on the way to its config, which takes seconds."""
    from transformers import AutoConfig

    place, more = source(model)
    return AutoConfig.from_pretrained(place, **more)


def weight_files(model: str) -> tuple[str, dict[str, Any]]:
    """The first argument of from_pretrained() for a model's weights, and the others that tell of their files.

    A .gguf file is dequantised. A folder with pytorch_model.bin alone is read by torch with weights_only=True; of the
    hub, safetensors alone are read.
    """
    place, more = source(model)
    if not is_gguf(model):
        return place, {"use_safetensors": has_safetensors(model), "weights_only": True}
    import transformers

    # Later versions would fetch kernels from the hub and keep the weights packed; earlier ones always unpack them.
    packed = getattr(transformers, "GgufConfig", None)
    return place, more | ({"quantization_config": packed(dequantize=True)} if packed else {})
