"""The transformers model as the engine calls it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from kernels import compile_ahead
from kernels.decode_attention import Prefixes
from kernels.fp8_heads import FP8
from pipeline.engine.kv.arena import ALIGNMENT, Arena, Extent, Fp8Arena, LayerShape
from pipeline.engine.kv.cache import DecodeCache, EngineCache, PrefillCache, ProbeCache, TailCache
from pipeline.engine.kv.states import StateShapes, StateSlots, slots_for
from pipeline.engine.laps import Laps
from pipeline.engine.model.last_layer import answer_for_the_end
from pipeline.engine.model.precision import check_fp8_attention, check_wide_layers, model_precision
from pipeline.engine.model.requirements import (
    check_head_sizes,
    check_layers,
    check_state,
    check_windows,
    kept_tensors,
    named_failures,
)
from pipeline.engine.model.rope import prepare_rope
from stem_core.config import StemConfig
from stem_core.context import DecodeContext, PrefillContext, StemContext
from stem_core.fuse import fuse_model
from stem_core.kv_scales import MOST_FP8_HEAD, Calibration, calibrate
from stem_core.patch import UnsupportedModelError, keep_dense, layer_policies, patch_model
from stem_core.policy import LayerPolicy

# Prompts that give the fp8 scales: how many, of how many tokens, from which seed.
CALIBRATION_PROMPTS = 3
CALIBRATION_TOKENS = 512
CALIBRATION_SEED = 20261123


class ModelRunner:
    """A patched model on its device or devices, its elementwise operations fused (`fuse` as in EngineConfig).

    Raises stem_core's UnsupportedModelError or EngineError for a model whose attention or rotary embedding cannot run
    here, or that keeps more of a document than the engine does (pipeline.engine.model.requirements),
    UnsupportedCacheError for one that asks for it.

    device: of token ids and logits. devices: all of the model, in the order of its layers. layer_devices: by layer.
    precision: as the model was loaded. In fp8 attention and KV are in fp8 too, except in layers that this would harm
        (wide ones, see stem_core.kv_scales).
    shapes: what each attention layer caches. states: what layers of linear attention keep of a document. sources: by
        layer without keys and values of its own, whose it reads (shared KV).
    layers: policy and sliding window of each attention layer that reads a whole prompt, in the model's order. Layers of
        shared KV may read its last token alone: then they are dense, and run in the last chunk only.
    weights: what they were dequantised from when they were loaded ("GGUF"); "" if they are as stored.
    calibration: scales of keys, values and queries in fp8, and which layers are wide; empty in other precisions.
    laps: where the seconds went until it could be called.
    compile_kernels: on a GPU, called with the runner once its layers are known, and before it reads prompts for the
        scales, if Triton's cache on the disk lacked kernels of this model.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: StemConfig | None,
        fuse: bool | None = None,
        laps: Laps | None = None,
        compile_kernels: Callable[[ModelRunner], None] | None = None,
    ) -> None:
        self.laps = laps or Laps()
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        self.device, self.dtype = embedding.weight.device, embedding.weight.dtype
        self.vocabulary: int = embedding.num_embeddings
        self.precision = model_precision(model)
        self.weights = ""
        if self.device.type == "cuda" or self.precision.fp8 if fuse is None else fuse:
            fuse_model(model)
        self.model = patch_model(model, attention)
        self._rope = prepare_rope(model)
        counting = nullcontext(compile_ahead.Compiled()) if compile_kernels is None else compile_ahead.counting()
        with counting as compiled:
            self._probe()
        if self.last_layer is not None:
            answer_for_the_end(self.model, self.last_layer)
        self.laps.end("patch")
        self.devices = tuple(dict.fromkeys([self.device, *self.layer_devices.values()]))
        self.calibration = Calibration()
        if self.precision.fp8:
            check_fp8_attention(self.shapes, attention, self.sources)
        if compile_kernels is not None and compiled.made:
            compile_kernels(self)
            self.laps.end("kernels")
        if self.precision.fp8:
            self.calibration = self._calibrate()
            check_wide_layers(self.calibration, self.precision)
            self.laps.end("calibration")

    def attend(self, attention: StemConfig | None) -> None:
        """Change the attention of prefill. Raises EngineError for blocks that the precision cannot take."""
        if self.precision.fp8:
            check_fp8_attention(self.shapes, attention, self.sources)
        patch_model(self.model, attention)
        self._probe()

    def is_fp8(self, layer: int) -> bool:
        """Whether the attention and KV of a layer are in fp8."""
        return self.calibration.scales.get(layer) is not None

    def bytes_per_token(self, device: torch.device | None = None) -> int:
        """Keys and values of all layers, or of those on a device."""
        return sum(
            shape.bytes_per_token(FP8 if self.is_fp8(layer) else self.dtype)
            for layer, shape in self.shapes.items()
            if device is None or self.layer_devices[layer] == device
        )

    def state_bytes(self, documents: int, device: torch.device | None = None) -> int:
        """States of all layers, or of those on a device, in an arena for so many documents."""
        return slots_for(documents) * sum(
            shape.nbytes
            for key, shape in self.states.items()
            if device is None or self.layer_devices[key.layer] == device
        )

    def new_arena(self, tokens: int, documents: int = 1) -> Arena:
        """An arena of `tokens` tokens, each layer's part in the layer's precision and on its device.

        documents: how many may have states in it at once, of a model that has any.
        """
        arena: Arena
        if self.precision.fp8:
            arena = Fp8Arena(self.shapes, tokens, self.calibration.scales, self.dtype, self.layer_devices, self.device)
        else:
            arena = Arena(self.shapes, tokens, self.dtype, self.layer_devices, self.device)
        if self.states:
            units = arena.capacity // ALIGNMENT
            arena.states = StateSlots(self.states, documents, units, ALIGNMENT, self.layer_devices, self.device)
        return arena

    @property
    def last_layer(self) -> int | None:
        """The attention layer behind which nothing is kept of a document; None where a layer with states follows."""
        last = self.layers[-1][0].layer
        return None if any(key.layer >= last for key in self.states) else last

    def on_device(self, ids: np.ndarray) -> Tensor:
        """Token ids int64 [L] as the model takes them, [1, L]. Waits for nothing."""
        tensor = torch.from_numpy(ids)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)[None]

    @torch.inference_mode()
    def logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache: EngineCache,
        context: StemContext,
        bounds: Tensor,
        rows: Tensor | None = None,
        every_token: bool = False,
    ) -> Tensor:
        """One forward pass. input_ids, position_ids int64 [N, L] -> logits [N, V] of each row's last token.

        bounds: int64 [N], tokens that each row's document can come to, prompt and output.
        rows: int64 [R]: with N = 1, the logits [R, V] of these tokens instead.
        every_token: logits [N, L, V] of all of them instead.
        """
        self._rope.rows = bounds
        out = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=input_ids.shape[1] if every_token else 1 if rows is None else rows,
            stem_context=context,
        )
        if every_token:
            return out.logits
        return out.logits[:, -1] if rows is None else out.logits[0]

    def prefill(
        self,
        ids: Tensor,
        arena: Arena,
        extent: Extent,
        context: PrefillContext,
        bound: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Read a chunk of a document, its tokens [context.start, context.start + L), into its extent.

        ids: int64 [1, L]. bound: int64 [1], rows: int64 [R], as for logits(). Returns logits [1, V] of the last token,
        or [R, V] of the rows.
        """
        positions = torch.arange(context.start, context.start + ids.shape[1], device=ids.device)[None]
        cache = PrefillCache(arena, extent, seen=context.start, tokens=ids.shape[1])
        first = extent.start + context.start
        arena.ids[first : first + ids.shape[1]] = ids[0]
        return self.logits(ids, positions, cache, context, bound, rows)

    def uncached(self, ids: Tensor) -> Tensor:
        """A whole document read densely, without a cache and with the positions that the model itself gives its tokens.

        ids: int64 [1, L]. Returns logits [1, V] of the last token. Attention is not in fp8, whatever the precision.
        """
        self._rope.rows = torch.full_like(ids[:, 0], ids.shape[1])
        context = PrefillContext(prompt_length=ids.shape[1], dense=True)
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1, stem_context=context).logits[:, -1]

    def read_behind(
        self,
        ids: Tensor,
        arena: Arena,
        prefix: Extent,
        prefix_tokens: int,
        extent: Extent,
        seen: int,
        bound: Tensor,
        max_length: int,
        every_token: bool = False,
    ) -> Tensor:
        """Read a chunk of what stands behind a prefix: tokens [seen, seen + L) into an extent of their own, densely.

        ids: int64 [1, L]. prefix: where the prefix's prefix_tokens tokens lie, at most max_length. bound: int64 [1], as
        for logits(). Returns logits [1, V] of the last token, or [L, V] of each. Every token is a row of decode
        attention, and all of them are one group: the prefix's keys are read once for many.
        """
        rows, device = ids.shape[1], ids.device
        positions = torch.arange(seen, seen + rows, device=device)
        prefixes = Prefixes.of_all(rows, prefix.start, prefix_tokens, max_length, device)
        context = DecodeContext(
            starts=torch.full_like(positions, extent.start),
            lengths=(positions + 1).to(torch.int32),
            max_length=seen + prefixes.members.shape[1],  # by nobody's room for an output
            quantized=arena.quantized(),
            prefixes=prefixes,
        )
        cache = TailCache(arena, extent, prefix_tokens, seen, rows)
        arena.ids[extent.start + seen : extent.start + seen + rows] = ids[0]
        logits = self.logits(ids, positions[None] + prefix_tokens, cache, context, bound, every_token=every_token)
        return logits[0] if every_token else logits

    def decode(
        self,
        tokens: Tensor,
        starts: Tensor,
        lengths: Tensor,
        bounds: Tensor,
        arena: Arena,
        max_length: int,
        prefixes: Prefixes | None = None,
    ) -> Tensor:
        """One step of S rows: each reads its newest token, behind what its extent holds of it. Waits for nothing.

        All int64 [S]. tokens: the newest ones. starts: of the extents in the arena; rows may share one, but
        not of a model with states. lengths: of the
        documents, their newest token counted, at most `max_length`; 0 for an idle row, which writes to the arena's
        scratch token. bounds: as for logits(). prefixes: of documents that begin in another extent, with lengths that
        are counted in `lengths`; those of idle rows are passed over. Returns logits [S, V].
        """
        positions = (lengths - 1).clamp(min=0)
        own, slots = lengths, starts + positions
        if prefixes is not None:
            before = prefixes.lengths.masked_fill(lengths == 0, 0)
            prefixes = Prefixes(prefixes.starts, before, prefixes.members, prefixes.max_length)
            own, slots = lengths - before, slots - before
        slots = slots.masked_fill(lengths == 0, arena.scratch)
        context = DecodeContext(
            starts=starts,
            lengths=own.to(torch.int32),
            max_length=max_length,
            quantized=arena.quantized(),
            prefixes=prefixes,
        )
        states = None if arena.states is None else arena.states.rows(starts, lengths)
        cache = DecodeCache(arena, slots, states)
        arena.ids.index_copy_(0, slots, tokens.to(torch.int32))
        logits = self.logits(tokens[:, None], positions[:, None], cache, context, bounds)
        cache.finish()
        return logits

    def verify(
        self,
        tokens: Tensor,
        counts: Tensor,
        starts: Tensor,
        lengths: Tensor,
        bounds: Tensor,
        arena: Arena,
        max_length: int,
        prefixes: Prefixes | None = None,
    ) -> Tensor:
        """As decode(), of S rows that read their newest token and drafts of what may follow it. Waits for nothing.

        tokens: int64 [S, L], the newest tokens and, behind each, its drafts. counts: int64 [S], how many of these are
        drafts. The others as for decode(); `lengths` are without drafts. Drafts that are wrong leave keys and values
        behind a document's newest token, where nobody reads until the next step writes there.
        Returns logits [S, L, V]; those behind a row's drafts mean nothing.

        All tokens of a row attend to one stretch of keys, each up to its own place, as rows that share a prefix do:
        the keys are read once for all of them. With `prefixes` those are what is shared, by the tokens of all rows that
        share one, and each token reads what its row has behind it. Not for models that keep states.
        """
        S, L = tokens.shape
        after = torch.arange(L, device=tokens.device)
        positions = (lengths - 1).clamp(min=0)[:, None] + after
        real = (lengths > 0)[:, None] & (after <= counts[:, None])
        seen = torch.where(real, positions + 1, 0)
        begins = starts.repeat_interleave(L)
        slots = begins.view(S, L) + positions
        if prefixes is None:
            of_row = torch.arange(S * L, dtype=torch.int32, device=tokens.device).view(S, L)
            prefixes = Prefixes(begins, seen.flatten().to(torch.int32), of_row, max_length)
            own, longest = torch.zeros_like(seen), 1
        else:
            before = torch.where(real, prefixes.lengths[:, None], 0)
            own, longest, slots = seen - before, max_length, slots - before
            members = prefixes.members[:, :, None]
            expanded = torch.where(members < 0, members, members * L + after.to(torch.int32)).flatten(1)
            prefixes = Prefixes(
                prefixes.starts.repeat_interleave(L),
                before.flatten().to(torch.int32),
                expanded,
                prefixes.max_length,
            )
        slots = slots.masked_fill(~real, arena.scratch).flatten()
        context = DecodeContext(
            starts=begins,
            lengths=own.flatten().to(torch.int32),
            max_length=longest,
            quantized=arena.quantized(),
            prefixes=prefixes,
        )
        arena.ids.index_copy_(0, slots, tokens.flatten().to(torch.int32))
        positions = torch.where(real, positions, 0)
        return self.logits(tokens, positions, DecodeCache(arena, slots), context, bounds, None, True)

    def _calibrate(self) -> Calibration:
        """Static fp8 scales of every layer, or that it is wide, from fixed prompts."""
        config = self.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
        prompts = calibration_prompts(self.vocabulary, getattr(config, "bos_token_id", None), limit)
        self._rope.rows = torch.full((1,), max(map(len, prompts)), device=self.device)
        large = [layer for layer, shape in self.shapes.items() if shape.head_dim > MOST_FP8_HEAD]
        return calibrate(self.model, prompts, wide=large, context=limit or 0)

    def _probe(self) -> None:
        """Set `shapes`, `states`, `sources`, `layers` and `layer_devices`, as seen by running a prompt of two tokens.

        A window is what the model passes to the attention; some families keep no attribute that tells.
        """
        cache = ProbeCache()
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        positions = torch.arange(2, device=self.device)[None]
        context = PrefillContext(prompt_length=2, attention_keys={})
        before = kept_tensors(self.model)
        try:
            with named_failures(self.model):
                self.logits(ids, positions, cache, context, torch.full_like(ids[:, 0], 2))
        except UnsupportedModelError:
            check_head_sizes(cache.shapes, cache.devices)  # a kernel that does not hold them says so in its own words
            raise
        self.sources = check_layers(
            self.model, context.queries, cache.updates, tokens=2, attention_keys=context.attention_keys, own=cache.keys
        )
        check_windows(self.model, context.windows)
        check_state(self.model, before)
        check_head_sizes(cache.shapes, cache.devices)
        self.shapes: dict[int, LayerShape] = cache.shapes
        self.states: StateShapes = cache.states
        self.layer_devices: dict[int, torch.device] = dict(cache.devices)
        self.layer_devices |= {layer: cache.devices[source] for layer, source in self.sources.items()}
        keep_dense(self.model, [layer for layer, count in context.queries.items() if count == 1])
        policies = {policy.layer: policy for policy in layer_policies(self.model)}
        whole = [layer for layer, count in context.queries.items() if count > 1]
        self.layers: list[tuple[LayerPolicy, int | None]] = [
            (policies[layer], context.windows[layer]) for layer in whole
        ]


def calibration_prompts(vocabulary: int, bos: int | None, limit: int | None = None) -> list[list[int]]:
    """CALIBRATION_PROMPTS rows of token ids below `vocabulary`, of CALIBRATION_TOKENS tokens or `limit` if it is less.

    Always the same ones. Random ids, not text: the engine has no tokenizer, and what a scale needs is the size of a
    head's values, not their meaning. Weights and norms set that size; the largest keys stand on the first token, which
    is why two of the prompts begin with the beginning-of-sequence token, as production prompts do, and one with any
    token. Scales are powers of two with room for values 16 times as large as those seen (stem_core.kv_scales), and e4m3
    loses nothing by room. On the bundled model they come to those from its own reports within a factor of 2
    (tests/pipeline/test_engine_fp8.py).
    """
    length = min(CALIBRATION_TOKENS, limit or CALIBRATION_TOKENS)
    generator = np.random.default_rng(CALIBRATION_SEED)
    prompts = generator.integers(0, vocabulary, size=(CALIBRATION_PROMPTS, length))
    if isinstance(bos, int) and bos < vocabulary:
        prompts[:-1, 0] = bos
    return prompts.tolist()
