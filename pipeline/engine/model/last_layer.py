"""The layer that runs last reads all of a prompt and answers for its end alone.

Of a prompt nothing is kept behind the keys and values of the last layer but the logits of the last token. Earlier
chunks leave that layer there (stem_core.context.PromptGoesOn), and so do the blocks of the last chunk before its last
one: queries attend by the block, so that the last block is what the last token needs. That is a share 1 / layers of the
last chunk which nobody would have read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.kv.cache import EngineCache
from stem_core.context import PrefillContext, PromptGoesOn
from stem_core.policy import DENSE_BLOCK_SIZE, LayerPolicy

# What decoder layers are given besides hidden states that has a row for each token, and the dimension of those rows.
ROWS = {"position_ids": -1, "position_embeddings": 1, "cache_position": 0, "per_layer_input": 1}


def answer_for_the_end(model: nn.Module, attention_layer: int) -> bool:
    """Let the decoder layer of that attention layer compute the last block's rows alone, in a prefill's last chunk.

    Of a patched model; in calls with PrefillContext.last_layer only. Other rows are the layer's input then. False, and
    nothing is changed, where decoder layers follow it.
    """
    found = _decoder_layer(model, attention_layer)
    if found is None:
        return False
    layer, attention = found
    if not getattr(layer.forward, "answers_for_the_end", False):
        layer.forward = _last_block_only(layer.forward, attention)  # type: ignore[method-assign]
    return True


def _decoder_layer(model: nn.Module, attention_layer: int) -> tuple[nn.Module, nn.Module] | None:
    """(decoder layer, its attention) if it is the last of its list."""
    for name, module in model.named_modules():
        policy = getattr(module, "stem_policy", None)
        if isinstance(policy, LayerPolicy) and policy.layer == attention_layer:
            parent, _, _ = name.rpartition(".")
            stack, _, index = parent.rpartition(".")
            layers = model.get_submodule(stack)
            if isinstance(layers, nn.ModuleList) and index == str(len(layers) - 1):
                return layers[-1], module
    return None


def _last_block_only(forward: Callable[..., Any], attention: nn.Module) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Any:
        context = kwargs.get("stem_context")
        if not isinstance(context, PrefillContext) or context.last_layer is None:
            return forward(*args, **kwargs)
        given = _by_name(signature, args, kwargs)
        call = None if given is None else _call(given, context)
        if call is None or call.last is None:
            return forward(*args, **kwargs)
        try:
            with suppress(PromptGoesOn):
                forward(**call.rows(call.begin, call.last))
            return call.whole(forward(**call.rows(call.last, call.end)))
        finally:
            call.go_to(call.begin)

    def _call(given: dict[str, Any], context: PrefillContext) -> _Call | None:
        """None where not all that is given is known to have a row for each token, or none."""
        hidden, *others = given
        caches = [value for value in given.values() if isinstance(value, EngineCache)]
        if len(caches) != 1 or given[hidden].ndim != 3:
            return None
        length = given[hidden].shape[1]
        for name in others:
            if not all(name in ROWS and tensor.shape[ROWS[name]] == length for tensor in _tensors(given[name])):
                return None
        return _Call(given, hidden, context, caches[0], _block(attention))

    answer.answers_for_the_end = True  # type: ignore[attr-defined]
    return answer


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by their names, the first one first; None where some have none."""
    found: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            found[name] = value
        else:
            return None
    return found


class _Call:
    """A decoder layer's call on a chunk, the tokens [begin, end), that can be made of parts of it.

    given: its arguments by name. hidden: the name of the hidden states, [1, L, hidden size].
    """

    def __init__(
        self, given: dict[str, Any], hidden: str, context: PrefillContext, cache: EngineCache, block: int
    ) -> None:
        self.given, self.hidden, self.context, self.cache, self.block = given, hidden, context, cache, block
        self.begin = context.start
        self.end = context.start + given[hidden].shape[1]

    @property
    def last(self) -> int | None:
        """Where the prompt's last block begins, if it ends in this chunk and is not all of it."""
        last = (self.end - 1) // self.block * self.block
        return None if self.end < self.context.prompt_length or last <= self.begin else last

    def rows(self, first: int, behind: int) -> dict[str, Any]:
        """Its arguments as if the chunk were the tokens [first, behind)."""
        self.go_to(first)
        here = slice(first - self.begin, behind - self.begin)
        cut = {name: _rows(self.given[name], dim, here) for name, dim in ROWS.items() if name in self.given}
        return self.given | cut | {self.hidden: self.given[self.hidden][:, here]}

    def whole(self, out: Any) -> Any:
        """What the layer gave for the last rows, behind its input's others: some models count them again."""
        if isinstance(out, tuple):
            return (self.whole(out[0]), *out[1:])
        hidden = self.given[self.hidden]
        return torch.cat([hidden[:, : hidden.shape[1] - out.shape[1]], out], dim=1)

    def go_to(self, start: int) -> None:
        self.context.start = self.cache.seen = start


def _block(attention: nn.Module) -> int:
    policy = attention.stem_policy
    assert isinstance(policy, LayerPolicy)
    return DENSE_BLOCK_SIZE if policy.config is None else policy.config.block_size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _rows(value: Any, dim: int, rows: slice) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_rows(each, dim, rows) for each in value)
    return value.narrow(dim, rows.start, rows.stop - rows.start) if isinstance(value, Tensor) else value
