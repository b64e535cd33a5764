"""The attention function that patched transformers models call, and Stem prefill itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.block_selection import BlockSelection
from kernels.block_sparse_attention import block_sparse_attention
from kernels.block_sparse_attention_fp8 import block_sparse_attention_fp8
from kernels.decode_attention import decode_attention
from kernels.decode_attention_fp8 import decode_attention_fp8
from kernels.fp8_heads import FP8, HeadScales, bias_shape, key_bias, quantize_heads
from stem_core.budget import PromptBudget
from stem_core.config import StemConfig
from stem_core.context import DecodeContext, PrefillContext, PromptGoesOn, QuantizedKV, StemContext
from stem_core.estimators import KeyState
from stem_core.output_error import ErrorProbe
from stem_core.policy import DENSE_BLOCK_SIZE, LayerPolicy, cutting_window
from stem_core.selection import new_key_state, stem_selection

# What models hand on to their attention besides, with no bearing on it: positions are encoded and the cache merged by
# then, and the others are asked of the layers around it. Anything else might change what is to be computed.
PASSED_OVER = frozenset(
    {
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def stem_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None,
    budget: PromptBudget,
    *,
    start: int = 0,
    scale: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    keys: KeyState | None = None,
    quantized: QuantizedKV | None = None,
    probe: ErrorProbe | None = None,
    select: Callable[..., BlockSelection] | None = None,
) -> Tensor:
    """Causal attention of one chunk of a prompt, sparse or dense as `budget` says.

    q [N, H, Lq, D] are the tokens [start, start + Lq); k, v [N, Hkv, Lk, D] hold at least the tokens [0, start + Lq).
    sinks: [H], a logit for each head that takes part in the softmax and has no value (gpt-oss). It takes the same share
    of its weight from every key of a row, so that estimators and selection, which compare keys, need not know of it.
    quantized: attend in fp8 to these keys and values; then N is 1, and k, v are those of the chunk alone.
    probe: gets the errors of those of its blocks that lie in the chunk, if the chunk is sparse. select: makes the
    selection of a sparse chunk (stem_selection).
    Returns [N, H, Lq, D] in q's dtype (a view of [N, Lq, H, D]).
    """
    if config is None or budget.budgets is None:
        selection, block_size = None, DENSE_BLOCK_SIZE if config is None else config.block_size
    else:
        select = select or stem_selection
        selection = select(q, k, v, config, budget, start=start, scale=scale, keys=keys, quantized=quantized)
        block_size = config.block_size
    chunk = _Chunk(q, k, v, quantized, start, block_size, scale, window, sinks)
    out = chunk.attend(selection)
    if probe is not None and selection is not None:
        for index, first, last in chunk.sampled(probe):
            probe.add(index, out[:, :, first - start : last - start], chunk.attend(None, first, last))
    return out


def _refuse_unknown(others: dict[str, Any]) -> None:
    for name, value in others.items():
        given = value is not None and value is not False
        if (given and name not in PASSED_OVER) or (name == "is_causal" and value is False):
            raise ValueError(
                f"the model asks its attention for {name}={_short(value)}, which our kernels do not compute, neither "
                "sparse nor dense; use another model, or call it without that"
            )


def _check_sinks(module: nn.Module, sinks: Tensor | None, heads: int) -> None:
    if sinks is None:
        if getattr(module, "sinks", None) is not None:
            raise ValueError(
                "the model has attention sinks and does not hand them to its attention as s_aux, the only way in which "
                "our kernels get them; use another model"
            )
    elif sinks.shape != (heads,):
        raise ValueError(
            f"attention sinks (s_aux) must be one logit for each of the {heads} heads, got {list(sinks.shape)}; use "
            "another model"
        )


def _short(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


@dataclass(frozen=True)
class _Chunk:
    """One chunk's attention; see stem_prefill."""

    q: Tensor
    k: Tensor
    v: Tensor
    quantized: QuantizedKV | None
    start: int
    block_size: int
    scale: float | None
    window: int | None
    sinks: Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + self.q.shape[2]

    def attend(self, selection: BlockSelection | None, first: int | None = None, last: int | None = None) -> Tensor:
        """[N, H, rows, D] of the queries [first, last), of all by default; `selection` is theirs."""
        first, last = self.start if first is None else first, self.end if last is None else last
        q = self.q[:, :, first - self.start : last - self.start]
        with_lse = self.sinks is not None
        if self.quantized is None:
            found = block_sparse_attention(
                q, self.k, self.v, selection, query_start=first, block_size=self.block_size, scale=self.scale,
                window=self.window, return_lse=with_lse,
            )  # fmt: skip
        else:
            kv, scales = self.quantized, self.quantized.scales
            found = block_sparse_attention_fp8(
                quantize_heads(q, scales.q, scales.q_mean), kv.k[None], kv.vt[None], scales, selection,
                query_start=first, block_size=self.block_size, scale=self.scale, window=self.window,
                bias=None if kv.bias is None else kv.bias[None], dtype=q.dtype, return_lse=with_lse,
            )  # fmt: skip
        if isinstance(found, Tensor):
            return found
        return _leave_to_sinks(*found, self.sinks)

    def sampled(self, probe: ErrorProbe) -> Iterator[tuple[int, int, int]]:
        """(index, first token, token behind the last) of the sampled blocks in this chunk."""
        for index in probe.within(self.start, self.end):
            yield index, *probe.tokens(index, self.end)

    def measure_only(self, probe: ErrorProbe, selection: BlockSelection) -> None:
        """As a chunk measures whose output nobody needs: the sampled rows are all that is computed."""
        for index, first, last in self.sampled(probe):
            row = (first - self.start) // self.block_size
            part = BlockSelection(selection.indices[:, :, row : row + 1], selection.counts[:, :, row : row + 1])
            probe.add(index, self.attend(part, first, last), self.attend(None, first, last))


def empty_bias(scales: HeadScales, tokens: int, device: torch.device | None = None) -> Tensor:
    """Room for what the mean query adds to the scores of a document's keys (kernels.fp8_heads.key_bias).

    device: None is that of the scales.
    """
    shape = bias_shape(len(scales.q), len(scales.k), tokens)
    return torch.empty(shape, dtype=FP8, device=scales.k.device if device is None else device)


def _leave_to_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """out [N, H, L, D] of a softmax over keys alone, changed in place into that of the keys and the heads' sinks [H].

    lse: float32 [N, H, L], of the keys' scores. The keys' part of exp(lse) + exp(sink) is sigmoid(lse - sink).
    """
    assert sinks is not None
    return out.mul_(torch.sigmoid(lse - sinks.float()[:, None])[..., None])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    stem_context: StemContext | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' AttentionInterface calls it, registered under the name "stem".

    query [N, H, Lq, D], key and value [N, Hkv, Lk, D]: positions encoded, cache merged. attention_mask is None, or bool
    [N, Lk] marking padding (see stem_core.patch). s_aux: the heads' sinks [H] (see stem_prefill).
    Returns ([N, Lq, H, D], None).
    Raises RuntimeError for a module that `patch_model` has not seen, ValueError for what the kernels do not compute and
    for any argument that is not known to leave the computation alone.
    """
    policy: LayerPolicy | None = getattr(module, "stem_policy", None)
    if policy is None:
        raise RuntimeError(
            "this model uses attention 'stem' without patch_model: call stem_core.patch_model(model, config)"
        )
    if softcap is not None:
        raise ValueError("Stem attention does not compute logit soft-capping; run this model with its own attention")
    _check_sinks(module, s_aux, query.shape[1])
    _refuse_unknown(others)
    if dropout:
        raise ValueError(f"Stem attention is for inference; got dropout={dropout}: call model.eval()")

    call = _Call(policy, query, key, value, scaling, sliding_window, s_aux)
    if isinstance(stem_context, DecodeContext):
        return call.decode_rows(stem_context), None
    if isinstance(stem_context, PrefillContext):
        out = call.prefill_chunk(stem_context)
    elif attention_mask is None:
        out = call.whole_cache()
    else:
        out = call.padded_batch(attention_mask)
    return out.transpose(1, 2), None


@dataclass(frozen=True)
class _Call:
    """What a layer hands to its attention; see attention_forward."""

    policy: LayerPolicy
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    window: int | None
    sinks: Tensor | None

    def decode_rows(self, context: DecodeContext) -> Tensor:
        """Each token of q [N, H, L, D] is a row -> [N, L, H, D]."""
        rows = self.q.transpose(1, 2).flatten(0, 1)
        if rows.shape[0] == 1 < context.starts.shape[0]:
            context = context.last_row()
        documents = context.on(rows.device)
        options: dict[str, Any] = {"max_length": context.max_length, "prefixes": context.prefixes_on(rows.device)}
        options |= {"scale": self.scale, "window": self.window, "sinks": self.sinks}
        quantized = context.quantized.get(self.policy.layer)
        if quantized is None:
            out = decode_attention(rows, self.k[0], self.v[0], *documents, **options)
        else:
            keys, values, scales = quantized.k, quantized.vt, quantized.scales
            out = decode_attention_fp8(rows, keys, values, scales, *documents, **options)
        return out.unflatten(0, (self.q.shape[0], self.q.shape[2]))

    def prefill_chunk(self, context: PrefillContext) -> Tensor:
        """The chunk at context.start of a document's prefill."""
        q, k, v, layer = self.q, self.k, self.v, self.policy.layer
        context.windows[layer], context.queries[layer] = self.window, q.shape[2]
        if context.attention_keys is not None:
            context.attention_keys[layer] = k
        window = cutting_window(context.prompt_length, self.window)
        config = None if context.dense else self.policy.config
        budget = replace(self.policy, config=config).budget(context.prompt_length, window)
        quantized = context.quantized.get(layer)
        if quantized is not None and quantized.scales.q_mean is not None:
            quantized = replace(quantized, bias=self.key_bias(context, quantized.scales))
        attend = partial(
            stem_prefill, q, k, v, scale=self.scale, window=window, sinks=self.sinks, quantized=quantized
        )  # fmt: skip
        known = k.shape[2] + (0 if quantized is None else context.start)
        last = min(known, context.prompt_length) - 1
        # The last query of the last chunk alone: densely, as in decoding. Gemma 4 hands layers without keys of their
        # own the queries that logits_to_keep asks for: this is known of a call, by its shapes, not of a layer, whose
        # every query comes when every row is asked for.
        if q.shape[2] == 1 and last > context.start:
            return attend(None, LayerPolicy(None, layer).budget(context.prompt_length, window), start=last)
        select = stem_selection if context.select is None else partial(context.select, layer)
        keys = None
        if config is not None and budget.budgets is not None:
            keys = context.keys.get(layer)
            if context.start == 0:
                keys = new_key_state(config, k, context.prompt_length)
                if keys is not None:
                    context.keys[layer] = keys
        start, end, probe = context.start, context.start + q.shape[2], context.probe
        if layer == context.last_layer and end < context.prompt_length:
            sampled = probe is not None and budget.budgets is not None and bool(probe.within(start, end))
            if config is not None and (keys is not None or sampled):
                # The last chunk's scores need the key side of this one's.
                selection = select(
                    q, k, v, config, budget, start=start, scale=self.scale, keys=keys, quantized=quantized
                )
                if probe is not None and sampled:
                    chunk = _Chunk(q, k, v, quantized, start, config.block_size, self.scale, window, self.sinks)
                    chunk.measure_only(probe, selection)
            raise PromptGoesOn
        return attend(config, budget, start=start, keys=keys, probe=probe, select=select)

    def key_bias(self, context: PrefillContext, scales: HeadScales) -> Tensor:
        """What the mean query adds to the scores of the document's keys so far; this chunk's are new."""
        bias = context.bias.get(self.policy.layer)
        if bias is None:
            if context.start:
                raise RuntimeError(
                    f"the prefill begins at token {context.start} in fp8 and does not know what the mean query adds to "
                    "the keys before it (PrefillContext.bias): begin at 0"
                )
            bias = context.bias[self.policy.layer] = empty_bias(scales, context.prompt_length)
        key_bias(self.k, scales, bias, context.start)
        return bias

    def whole_cache(self) -> Tensor:
        """Plain `model(...)` and `model.generate(...)`: a prompt in one piece, or a few tokens after a cache.

        Only a prompt in one piece is sparse: what continues a cache (decoding, a second turn, assisted decoding)
        attends densely, since its rows need not begin at a block boundary and the full prompt's length is not known.
        """
        q, k, v = self.q, self.k, self.v
        if q.shape[2] == k.shape[2]:
            window = cutting_window(q.shape[2], self.window)
            budget = self.policy.budget(q.shape[2], window)
            return stem_prefill(q, k, v, self.policy.config, budget, scale=self.scale, window=window, sinks=self.sinks)
        if self.sinks is not None:  # torch's attention has none, and does not give the log-sum-exp
            start = k.shape[2] - q.shape[2]
            return _Chunk(q, k, v, None, start, DENSE_BLOCK_SIZE, self.scale, self.window, self.sinks).attend(None)
        return _dense_continuation(q, k, v, self.scale, self.window)

    def padded_batch(self, mask: Tensor) -> Tensor:
        """Each row of a padded batch on its own tokens alone, so that its result does not depend on its neighbours.

        mask: bool [N, Lk]. Padding may stand at either end of a row; outputs at padded queries are zero.
        """
        q, k, v = self.q, self.k, self.v
        out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device)
        out = out.transpose(1, 2)
        offset = k.shape[2] - q.shape[2]
        for n in range(q.shape[0]):
            real = mask[n].nonzero()[:, 0]
            if len(real) == 0:
                continue
            first, last = int(real[0]), int(real[-1]) + 1
            if last - first != len(real):
                raise ValueError(
                    f"row {n} of attention_mask has padding between tokens; only padding at its ends is supported"
                )
            rows = slice(max(0, first - offset), max(0, last - offset))
            if rows.start == rows.stop:
                continue
            part = slice(n, n + 1)
            row = replace(self, q=q[part, :, rows], k=k[part, :, first:last], v=v[part, :, first:last])
            out[part, :, rows] = row.whole_cache()
        return out


def _dense_continuation(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Queries are the last Lq of the Lk tokens. Rows go in pieces, so that the mask stays small."""
    Lq, Lk = q.shape[2], k.shape[2]
    out = torch.empty(q.shape[0], Lq, q.shape[1], q.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
    positions = torch.arange(Lk, device=q.device)
    for begin in range(0, Lq, 1024):
        rows = positions[Lk - Lq + begin : Lk - Lq + min(Lq, begin + 1024), None]
        visible = positions <= rows
        if window is not None:
            visible &= positions > rows - window
        out[:, :, begin : begin + 1024] = nn.functional.scaled_dot_product_attention(
            q[:, :, begin : begin + 1024], k, v, attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out
