"""The layer that runs last reads all of a prompt and answers for its end alone.

Of a prompt nothing is kept behind the keys and values of the last layer but the logits of the last token. Earlier
chunks leave that layer there (stem_core.context.PromptGoesOn), and so do the blocks of the last chunk before its last
one: queries attend by the block, so that the last block is what the last token needs. That is a share 1 / layers of the
prefill which nobody would have read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from torch import Tensor, nn

from stem_core.context import PrefillContext, PromptGoesOn
from stem_core.policy import DENSE_BLOCK_SIZE, LayerPolicy

# What decoder layers are given besides hidden states that has a row for each token, and the dimension of those rows.
ROWS = {"position_ids": -1, "position_embeddings": 1, "cache_position": 0, "per_layer_input": 1}


def answer_for_the_end(model: nn.Module, attention_layer: int) -> bool:
    """Let the decoder layer of that attention layer return the last block's rows alone, in a prefill's last chunk.

    Of a patched model; in calls with PrefillContext.last_layer only. False, and nothing is changed, where decoder
    layers follow it: they would miss the other rows.
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
    @wraps(forward)
    def answer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        context = kwargs.get("stem_context")
        known = not args and not any(isinstance(value, Tensor) for name, value in kwargs.items() if name not in ROWS)
        if not isinstance(context, PrefillContext) or context.last_layer is None or not known:
            return forward(hidden_states, *args, **kwargs)
        begin, end = context.start, context.start + hidden_states.shape[1]
        last = (end - 1) // _block(attention) * _block(attention)  # where the last block begins
        if end < context.prompt_length or last <= begin:
            return forward(hidden_states, **kwargs)

        def run(first: int, behind: int) -> Any:
            """The layer as it would run on a chunk of the tokens [first, behind)."""
            here = slice(first - begin, behind - begin)
            rows = {name: _rows(kwargs[name], dim, here) for name, dim in ROWS.items() if name in kwargs}
            context.start = kwargs["past_key_values"].seen = first
            return forward(hidden_states[:, here], **(kwargs | rows))

        try:
            with suppress(PromptGoesOn):
                run(begin, last)
            return run(last, end)
        finally:
            context.start = kwargs["past_key_values"].seen = begin

    answer.answers_for_the_end = True  # type: ignore[attr-defined]
    return answer


def _block(attention: nn.Module) -> int:
    policy = attention.stem_policy
    assert isinstance(policy, LayerPolicy)
    return DENSE_BLOCK_SIZE if policy.config is None else policy.config.block_size


def _rows(value: Any, dim: int, rows: slice) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_rows(each, dim, rows) for each in value)
    return value.narrow(dim, rows.start, rows.stop - rows.start) if isinstance(value, Tensor) else value
