"""The attention of an evaluation: prefill under any arm, and dense decoding of many answers to shared documents.

Registered beside the product's own with transformers' AttentionInterface; what to do travels with each call of the
model as `evaluation=`. Prefill calls the product's kernels with the arm's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluate.arms import Arm
from jobs.evaluate.beyond import mean_corrected
from jobs.evaluate.probe import Probe
from jobs.evaluate.scores import Place
from kernels.block_sparse_attention import block_sparse_attention
from pipeline.engine.kv.cache import EngineCache
from stem_core.attention import cutting_window
from stem_core.patch import patch_model, unpatch_model

ATTENTION_NAME = "evaluate"


@dataclass
class Chunk:
    """Prefill of the tokens [start, start + L) of a prompt of `prompt_length` tokens. probe: measures, if given."""

    arm: Arm
    prompt_length: int
    start: int
    probe: Probe | None = None


@dataclass
class Answers:
    """Decoding: `tails.seen[r]` tokens of row r's own are cached already, behind its entry's shared tokens."""

    documents: DocumentKeys
    tails: TailKeys


class DocumentKeys(EngineCache):
    """Keys and values of several documents, [entries, Hkv, room, D] in each layer; one is written at a time.

    Behind `shared[e]` tokens, which the entry's answers have in common, there is room for the rest of one prompt.
    """

    def __init__(self, entries: int, room: int, shared: Tensor) -> None:
        super().__init__(seen=0)
        self.entry = 0
        self.shared = shared
        self.most_shared = max(1, int(shared.max()))  # known on the host, where every layer of a step wants it
        self._size = (entries, room)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """k, v [1, Hkv, L, D] of the tokens [seen, seen + L) of the current entry; returns it as far as it is known."""
        if layer_idx not in self.layers:
            entries, room = self._size
            self.layers[layer_idx] = tuple(x.new_zeros(entries, x.shape[1], room, x.shape[3]) for x in (k, v))  # type: ignore[assignment]
        end = self.seen + k.shape[2]
        known = []
        for stored, new in zip(self.layers[layer_idx], (k, v), strict=True):
            stored[self.entry, :, self.seen : end] = new[0]
            known.append(stored[self.entry : self.entry + 1, :, :end])
        return known[0], known[1]

    def widen(self) -> None:
        """Hold everything in float32 from now on: many decode steps read what is converted once."""
        for layer, stored in self.layers.items():
            self.layers[layer] = (stored[0].float(), stored[1].float())


class TailKeys(EngineCache):
    """What follows the shared tokens: question and answer of every row, [rows, Hkv, room, D] in each layer.

    seen: int64 [rows], tokens cached. Row r belongs to the document entry r // rows_per_entry.
    """

    def __init__(self, rows: int, room: int, device: torch.device) -> None:
        super().__init__(seen=0)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._room = room
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, row: int, documents: DocumentKeys, first: int, last: int) -> None:
        """Copy the tokens [first, last) of the current document entry to a row, as its question."""
        for layer, stored in documents.layers.items():
            if layer not in self.layers:
                self.layers[layer] = tuple(
                    x.new_zeros(len(self.tokens), x.shape[1], self._room, x.shape[3]) for x in stored
                )  # type: ignore[assignment]
            for mine, theirs in zip(self.layers[layer], stored, strict=True):
                mine[row, :, : last - first] = theirs[documents.entry, :, first:last]
        self.tokens[row] = last - first

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """k, v [rows, Hkv, L, D] go behind each row's tokens; returns the layer's whole tails."""
        rows = torch.arange(len(self.tokens), device=k.device)[:, None]
        places = self.tokens[:, None] + torch.arange(k.shape[2], device=k.device)
        for stored, new in zip(self.layers[layer_idx], (k, v), strict=True):
            stored[rows, :, places.clamp(max=self._room - 1)] = new.transpose(1, 2)
        return self.layers[layer_idx]


def evaluation_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    evaluation: Chunk | Answers | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [N, H, L, D], key and value from the cache; returns ([N, L, H, D], None)."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if isinstance(evaluation, Answers):
        return _answers(query, evaluation, layer, scaling, sliding_window).transpose(1, 2), None
    if not isinstance(evaluation, Chunk):
        raise RuntimeError("this model is set up for jobs.evaluate and takes an `evaluation` with every call")
    window = cutting_window(evaluation.prompt_length, sliding_window)
    place = Place(layer, evaluation.start, evaluation.prompt_length, scaling)
    selection = None if window is not None else evaluation.arm.select(query, key, value, place)
    if evaluation.probe is not None and window is None:
        evaluation.probe.see(query, key, place, selection, evaluation.arm.block_size)
    if selection is None and window is None and evaluation.start == 0 and query.device.type == "cpu":
        # The plain-torch reference of dense attention is several times slower than torch's own.
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        size = evaluation.arm.block_size
        found = block_sparse_attention(
            query,
            key,
            value,
            selection,
            query_start=evaluation.start,
            block_size=size,
            scale=scaling,
            window=window,
            return_lse=evaluation.arm.mean,
        )
        out = found[0] if isinstance(found, tuple) else found
        if selection is not None and isinstance(found, tuple):
            out = mean_corrected(*found, query, key, value, selection, place, size)
    return out.transpose(1, 2), None


def _answers(q: Tensor, answers: Answers, layer: int, scale: float | None, window: int | None) -> Tensor:
    """Dense attention of q [rows, H, L, D] to shared document and own tail, in float32; -> [rows, H, L, D]."""
    rows, H, L, D = q.shape
    scale = D**-0.5 if scale is None else scale
    documents, tails = answers.documents, answers.tails
    k, v = documents.layers[layer]
    entries, kv_heads, width, _ = k.shape
    tail_k, tail_v = tails.layers[layer]
    grouped = q.float().mul(scale).reshape(rows, kv_heads, -1, D)

    # All rows of an entry at once: [entries, Hkv, rows of the entry * G * L, D] against the document's keys.
    asked = grouped.view(entries, rows // entries, kv_heads, -1, D).transpose(1, 2).flatten(2, 3)
    shared = documents.most_shared
    far = (asked @ k[:, :, :shared].float().mT).view(entries, kv_heads, rows // entries, -1, shared)
    far = far.transpose(1, 2).reshape(rows, kv_heads, -1, L, shared)
    near = (grouped @ tail_k.float().mT).view(rows, kv_heads, -1, L, tail_k.shape[2])

    own = documents.shared.repeat_interleave(rows // entries)
    step = torch.arange(L, device=q.device)
    position = tails.tokens[:, None] + step  # of each query, counted from the end of the shared tokens
    places = torch.arange(tail_k.shape[2], device=q.device)
    hidden_near = places > position[..., None]
    hidden_far = (torch.arange(shared, device=q.device) >= own[:, None])[:, None].expand(-1, L, -1)
    if window is not None:
        hidden_near |= places <= position[..., None] - window
        far_place = torch.arange(shared, device=q.device) - own[:, None]
        hidden_far = hidden_far | (far_place[:, None] <= position[..., None] - window)
    far.masked_fill_(hidden_far[:, None, None], -torch.inf)
    near.masked_fill_(hidden_near[:, None, None], -torch.inf)

    top = torch.maximum(far.amax(-1), near.amax(-1))[..., None]
    far, near = (far - top).exp_(), (near - top).exp_()
    total = far.sum(-1) + near.sum(-1)
    far = far.view(entries, rows // entries, kv_heads, -1, shared).transpose(1, 2).flatten(2, 3)
    out = (far @ v[:, :, :shared].float()).view(entries, kv_heads, rows // entries, -1, D).transpose(1, 2)
    out = out.reshape(rows, kv_heads, -1, D) + near.flatten(2, 3) @ tail_v.float()
    return (out.reshape(rows, H, L, D) / total.reshape(rows, H, L, 1)).to(q.dtype)


def prepare_model(model: nn.Module) -> nn.Module:
    """Switch a model to the evaluation's attention. Raises stem_core's UnsupportedModelError as patch_model does."""
    from transformers import AttentionInterface

    unpatch_model(patch_model(model, None))  # says what the kernels do not compute
    AttentionInterface.register(ATTENTION_NAME, evaluation_attention)
    model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    return model
