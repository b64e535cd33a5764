"""Fused kernels in a transformers model: norms, gated MLPs, projections and rotary embeddings, instance by instance.

Every replacement is compared with the module's own forward on random input before it stays; one that differs is
undone, and `describe_fusion` says why.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import nn

from stem_core.fuse.mlp import fuse_mlps
from stem_core.fuse.norms import fuse_norms
from stem_core.fuse.projections import fuse_attention_projections
from stem_core.fuse.quantized import fuse_quantised_norms
from stem_core.fuse.rope import fuse_rope
from stem_core.fuse.session import Fusion, Session

__all__ = ["Fusion", "describe_fusion", "fuse_model", "fusions", "unfuse_model"]

Model = TypeVar("Model", bound=nn.Module)

_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


@torch.no_grad()
def fuse_model(model: Model, *, projections: bool = True, impl: str = "auto") -> Model:
    """Run the model's elementwise operations through our kernels. Changes the model in place and returns it.

    model: a transformers decoder on its device, in eval mode; for inference only. Before or after `patch_model`.
    projections: also run q/k/v, and gate/up, as one GEMM each. Their weights are copied into one tensor, of which the
        old parameters become views: values, names and state_dict stay. Moving or converting the model afterwards
        needs `unfuse_model` first (the fused forward raises RuntimeError otherwise).
    impl: of the kernels, see kernels.dispatch.
    Where `quantize_linears` ran before, norms and activations write fp8 rows for the linears that read them.
    What cannot be fused keeps its own forward; `describe_fusion(model)` lists it with the reason.
    Raises ValueError for a model that is fused already, or in training mode.
    """
    if model in _sessions:
        raise ValueError("this model is fused already: call unfuse_model(model) first")
    if model.training:
        raise ValueError("fuse_model is for inference: call model.eval() first")
    session = _sessions[model] = Session(impl)
    try:
        fuse_norms(model, session)
        fuse_mlps(model, session, stack=projections)
        if projections:
            fuse_attention_projections(model, session)
        fuse_rope(model, session)
        fuse_quantised_norms(model, session)
    except BaseException:
        unfuse_model(model)
        raise
    return model


def unfuse_model(model: Model) -> Model:
    """Give a fused model its own forwards back; a model that is not fused stays as it is."""
    session = _sessions.pop(model, None)
    if session is not None:
        session.undo_all()
    return model


def fusions(model: nn.Module) -> list[Fusion]:
    """Every module that `fuse_model` considered; empty for a model that is not fused."""
    session = _sessions.get(model)
    return [] if session is None else list(session.fusions)


def describe_fusion(model: nn.Module) -> dict[str, Any]:
    """Counts for a report; all empty for a model that is not fused.

    {"fused": {kind: n}, "skipped": {kind: {reason: n}}, "unfused_calls": calls of fused modules, so far, with tensors
    that no kernel was verified for, which the model's own code served}
    """
    fused: Counter[str] = Counter()
    skipped: dict[str, Counter[str]] = {}
    for fusion in fusions(model):
        if fusion.reason:
            skipped.setdefault(fusion.kind, Counter())[fusion.reason] += 1
        else:
            fused[fusion.kind] += 1
    session = _sessions.get(model)
    return {
        "fused": dict(fused),
        "skipped": {kind: dict(reasons) for kind, reasons in skipped.items()},
        "unfused_calls": sum(count() for count in session.unfused_calls) if session else 0,
    }
