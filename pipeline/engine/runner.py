"""The transformers model as the engine calls it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.engine.arena import LayerShape
from pipeline.engine.cache import EngineCache, ProbeCache
from pipeline.engine.rope import prepare_rope
from stem_core.attention import LayerPolicy
from stem_core.config import StemConfig
from stem_core.context import PrefillContext, StemContext
from stem_core.fuse import fuse_model
from stem_core.patch import layer_policies, patch_model


class ModelRunner:
    """A patched model on its device, its elementwise operations fused (`fuse` as in EngineConfig).

    Raises stem_core's UnsupportedModelError or EngineError for a model whose attention or rotary embedding cannot run
    here, UnsupportedCacheError for one that caches more than keys and values.

    shapes: what each layer caches. layers: policy and sliding window of each attention layer, in the model's order.
    """

    def __init__(self, model: nn.Module, attention: StemConfig | None, fuse: bool | None = None) -> None:
        self.device = next(model.parameters()).device
        if self.device.type == "cuda" if fuse is None else fuse:
            fuse_model(model)
        self.model = patch_model(model, attention)
        self.dtype = next(model.parameters()).dtype
        self.vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        self._rope = prepare_rope(model)
        self.shapes, self.layers = self._probe()

    @torch.inference_mode()
    def logits(
        self, input_ids: Tensor, position_ids: Tensor, cache: EngineCache, context: StemContext, bounds: Tensor
    ) -> Tensor:
        """One forward pass. input_ids, position_ids int64 [N, L] -> logits [N, V] of each row's last token.

        bounds: int64 [N], tokens that each row's document can come to, prompt and output.
        """
        self._rope.rows = bounds
        out = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            stem_context=context,
        )
        return out.logits[:, -1]

    def _probe(self) -> tuple[dict[int, LayerShape], list[tuple[LayerPolicy, int | None]]]:
        """`shapes` and `layers`, seen by running a prompt of two tokens.

        A window is what the model passes to the attention; some families keep no attribute that tells.
        """
        cache = ProbeCache()
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        positions = torch.arange(2, device=self.device)[None]
        context = PrefillContext(prompt_length=2)
        self.logits(ids, positions, cache, context, torch.full_like(ids[:, 0], 2))
        policies = {policy.layer: policy for policy in layer_policies(self.model)}
        return cache.shapes, [(policies[layer], window) for layer, window in context.windows.items()]
