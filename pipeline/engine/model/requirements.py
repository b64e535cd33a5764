"""What a model must be for the engine to run it, seen while it reads a prompt of two tokens.

The engine keeps documents apart by their keys and values alone, and tells each layer's attention what it reads. A model
that keeps more, or does not hand that on, would give wrong outputs, or fail, document after document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.engine.kv.arena import LayerShape
from stem_core.patch import UnsupportedModelError

# The kernels hold whole heads in a multiprocessor's shared memory.
MAX_HEAD_DIM = 512


def check_layers(
    model: nn.Module,
    queries: Mapping[int, int],
    cached: Counter[int],
    tokens: int,
    attention_keys: Mapping[int, Tensor] | None = None,
    own: Mapping[int, Tensor] | None = None,
) -> dict[int, int]:
    """Compare the layers whose attention ran with those that put keys and values into the cache.

    queries: by layer, how many its attention was given. cached: how often each put something. tokens: of the prompt.
    attention_keys: by layer, the keys that its attention got. own: those that it put, as the cache gave them back.
    Returns, by layer, whose keys and values a layer without its own takes.
    Raises UnsupportedModelError, naming the feature, unless every other layer had all queries and put keys and values
    once, and those without their own had all or the last.
    """
    name = type(model).__name__
    silent = sorted(set(cached) - set(queries))
    if silent or not queries:
        raise UnsupportedModelError(
            f"{name} does not hand the engine's context (stem_context) on to the attention of its layers "
            f"{_listed(silent)}: its code drops what it does not know; use another model"
        )
    borrowing = sorted(set(queries) - set(cached))
    owners = {id(keys): layer for layer, keys in (own or {}).items()}
    got = {layer: id(keys) for layer, keys in (attention_keys or {}).items()}
    sources = {layer: owners[got[layer]] for layer in borrowing if got.get(layer) in owners}
    unknown = sorted(set(borrowing) - set(sources))
    if unknown:
        raise UnsupportedModelError(
            f"{name} has layers that neither keep keys and values nor take those of another layer unchanged: "
            f"{_listed(unknown)}. The engine keeps them by layer; use another model"
        )
    fewer = sorted(layer for layer, n in queries.items() if n != tokens and not (layer in sources and n == 1))
    if fewer:
        raise UnsupportedModelError(
            f"{name} has layers that leave out queries whose output nobody reads: {_listed(fewer)}. The kernels expect "
            "those of all tokens; use another model"
        )
    repeated = sorted(layer for layer, count in cached.items() if count > 1)
    if repeated:
        raise UnsupportedModelError(
            f"{name} has several attentions in one layer: {_listed(repeated)}. The engine keeps the keys and values of "
            "one; use another model"
        )
    return sources


def check_windows(model: nn.Module, windows: Mapping[int, int | None]) -> None:
    """Raise UnsupportedModelError for a model whose config has a sliding window of which its attention is not told.

    windows: by layer, as its attention was told. Such models put it into masks or caches of their own, which nothing
    here reads.
    """
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    types = getattr(text, "layer_types", None)
    if types is None:
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        silent = list(windows) if isinstance(window, int) and not any(windows.values()) else []
    else:
        silent = [
            layer
            for layer, window in windows.items()
            if window is None and layer < len(types) and types[layer] == "sliding_attention"
        ]
    if silent:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a sliding window in its config of which it does not tell the attention of its "
            f"layers {_listed(silent)}; use another model"
        )


def check_head_sizes(shapes: Mapping[int, LayerShape], devices: Mapping[int, torch.device]) -> None:
    """Raise UnsupportedModelError for heads that the GPU kernels cannot hold."""
    for layer, shape in shapes.items():
        size = max(shape.head_dim, shape.value_dim)
        if devices[layer].type == "cuda" and size > MAX_HEAD_DIM:
            raise UnsupportedModelError(
                f"layer {layer} has heads of {size} (head_dim), and our kernels for GPUs hold at most {MAX_HEAD_DIM}: "
                "use another model, or device cpu for a small one"
            )


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that modules hold besides their parameters, by name."""
    return {
        f"{place}.{name}": tensor
        for place, module in model.named_modules()
        for name, tensor in (*vars(module).items(), *module._buffers.items())
        if isinstance(tensor, Tensor)
    }


def check_state(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedModelError if modules hold other tensors than `before` (kept_tensors) the prompt was read.

    A recurrent state, then, of which there is one for all documents. One whose type alone has changed holds the same.
    """

    def same(name: str, tensor: Tensor) -> bool:
        old = before.get(name)
        return old is tensor or (old is not None and torch.equal(old.to(tensor), tensor))

    changed = [name for name, tensor in kept_tensors(model).items() if not same(name, tensor)]
    if changed:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps a state in its modules ({', '.join(changed[:3])}), where the documents of a "
            "batch would change one another's; only models whose whole state is in their cache can run"
        )


@contextmanager
def named_failures(model: nn.Module) -> Iterator[None]:
    """Inside, what the model's own code raises becomes an UnsupportedModelError; what is named already stays."""
    try:
        yield
    except (ValueError, AttributeError, AssertionError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # models raise many kinds, Triton one of its own
        reason = f"{type(error).__name__}: {error}"
        raise UnsupportedModelError(f"{type(model).__name__} cannot read a prompt here ({reason})") from error


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:8])) + ", ..." * (len(layers) > 8)
