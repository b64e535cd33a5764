"""Rotary embeddings through kernels.rope.

Attention modules call `apply_rotary_pos_emb`, a global of their modeling file. Patching that global would change every
model of the family in the process. Instead each fused module gets a copy of its class's forward, the same code with a
namespace of its own in which that one name is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kernels.rope import apply_rope
from stem_core.errors import first_line
from stem_core.fuse.session import Session, activations_like, has_own_forward, row_error, tolerance, trial_input

KIND = "rope"
NAME = "apply_rotary_pos_emb"


class RopeDispatch:
    """Calls the kernel for what was verified, the modeling file's function for anything else.

    verified: (head_dim, rotated dimensions, dtype of q, dtype of cos). own_calls: calls that the kernel did not serve.
    """

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]], impl: str) -> None:
        self.original = original
        self.impl = impl
        self.verified: set[tuple[int, int, torch.dtype, torch.dtype]] = set()
        self.own_calls = 0

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key = (q.shape[-1], cos.shape[-1], q.dtype, cos.dtype)
        if args or kwargs or key not in self.verified or q.ndim != 4 or cos.ndim != 3:
            self.own_calls += 1
            return self.original(q, k, cos, sin, *args, **kwargs)
        return apply_rope(q, k, cos, sin, impl=self.impl)

    def verify(self, head_dim: int, rotated: int, like: Tensor) -> str:
        """Compare on random input and remember what agrees. Returns why nothing does; empty if something does."""
        reason = ""
        q, k = (trial_input(2, 7, h, head_dim, like=like, seed=h).transpose(1, 2) for h in (4, 2))
        for dtype in {like.dtype, torch.float32}:
            # Halves that differ, unlike a model's, tell pairings apart.
            cos, sin = (trial_input(2, 7, rotated, like=like, seed=s).to(dtype) for s in (8, 9))
            try:
                wanted = self.original(q, k, cos, sin)
                got = apply_rope(q, k, cos, sin, impl=self.impl)
            except (RuntimeError, ValueError, TypeError) as error:
                reason = reason or first_line(error)
                continue
            error_of = max(row_error(g, w) for g, w in zip(got, wanted, strict=True))
            if error_of <= tolerance(like.dtype):
                self.verified.add((head_dim, rotated, like.dtype, dtype))
            else:
                reason = reason or f"its {NAME} is not rotate-half (relative error {error_of:.1e})"
        return "" if self.verified else reason


def fuse_rope(model: nn.Module, session: Session) -> None:
    """Give every attention module a forward whose apply_rotary_pos_emb is the kernel."""
    sizes = _rotated_dimensions(model)
    forwards: dict[tuple[type, int, torch.dtype], FunctionType | str] = {}
    for name, module in model.named_modules():
        head_dim = getattr(module, "head_dim", None)
        function = type(module).forward
        if "Attention" not in type(module).__name__ or not isinstance(head_dim, int):
            continue
        like = activations_like(model, module)
        key = (type(module), head_dim, like.dtype)
        if has_own_forward(module):
            session.skipped(KIND, name, "its forward is replaced already")
            continue
        if key not in forwards:
            forwards[key] = _forward_with_kernel(function, head_dim, sizes, like, session)
        forward = forwards[key]
        if isinstance(forward, str):
            session.skipped(KIND, name, forward)
        else:
            session.replace_forward(module, MethodType(forward, module))
            session.fused(KIND, name)


def _rotated_dimensions(model: nn.Module) -> set[int]:
    """Twice the frequencies of each rotary module's buffers."""
    return {
        2 * buffer.numel()
        for module in model.modules()
        if "Rotary" in type(module).__name__
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    }


def _forward_with_kernel(
    function: Any, head_dim: int, sizes: set[int], like: Tensor, session: Session
) -> FunctionType | str:
    """The class's forward in a namespace of its own, or why there is none."""
    if not isinstance(function, FunctionType) or NAME not in function.__code__.co_names:
        return f"its forward does not call {NAME}"
    original = function.__globals__.get(NAME)
    if not callable(original):
        return f"its forward does not call {NAME}"
    dispatch = RopeDispatch(original, session.impl)
    reasons = [dispatch.verify(head_dim, size, like) for size in sorted(sizes) if size <= head_dim]
    if not dispatch.verified:
        return reasons[0] if reasons else "the model has no rotary module with frequencies for its head size"
    session.unfused_calls.append(lambda: dispatch.own_calls)
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, NAME: dispatch},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__qualname__ = function.__qualname__
    return copy
