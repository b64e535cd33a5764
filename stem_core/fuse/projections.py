"""Linears that read one input, run as one GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.quantize import FP8, QuantizedRows, quantize_rows
from stem_core.errors import first_line
from stem_core.fp8.linear import Fp8Linear, scaled_linear
from stem_core.fuse.session import Session, activations_like, has_own_forward, row_error, tolerance, trial_input

KIND = "qkv_projection"
QKV = ("q_proj", "k_proj", "v_proj")


class StackedLinear:
    """The linears' weights in one tensor [sum of outputs, inputs]; their own parameters become views of it.

    linears: plain ones, or fp8 ones, whose scales are stacked too.
    """

    def __init__(self, linears: Sequence[Any]) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.fp8 = isinstance(linears[0], Fp8Linear)
        self.fast_accumulation = self.fp8 and linears[0].fast_accumulation
        self.tensors: dict[str, Tensor] = {}
        self._pointers: list[tuple[nn.Module, str, int]] = []
        for name in ("weight", "weight_scale", "bias"):
            if getattr(linears[0], name, None) is None:
                continue
            parameters = [getattr(linear, name) for linear in linears]
            outputs = 1 if name == "weight_scale" else 0
            stacked = torch.cat([parameter.detach().view(_bits(parameter)) for parameter in parameters], dim=outputs)
            self.tensors[name] = stacked.view(parameters[0].dtype)
            parts = self.tensors[name].split(self.sizes, dim=outputs)
            for linear, parameter, part in zip(linears, parameters, parts, strict=True):
                parameter.data = part
                self._pointers.append((linear, name, parameter.data_ptr()))

    def undo(self) -> None:
        """Give each linear its own memory again, with the values that it has now."""
        for linear, name, pointer in self._pointers:
            parameter = getattr(linear, name)
            if parameter.data_ptr() == pointer:
                parameter.data = parameter.data.clone()

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """x [..., inputs] -> [..., sum of outputs]; fp8 rows go with fp8 linears only.

        Raises RuntimeError if a linear's weight was replaced since."""
        for linear, name, pointer in self._pointers:
            if getattr(linear, name).data_ptr() != pointer:
                raise RuntimeError(
                    f"the {name} of a fused linear was moved or replaced after fuse_model: call unfuse_model before "
                    "changing the model, and fuse_model after"
                )
        weight, bias = self.tensors["weight"], self.tensors.get("bias")
        if self.fp8:
            rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
            scale = self.tensors["weight_scale"]
            return scaled_linear(rows, weight, scale, bias, fast_accumulation=self.fast_accumulation)
        assert isinstance(x, Tensor)
        return F.linear(x, weight, bias)


def _bits(tensor: Tensor) -> torch.dtype:
    """fp8 is concatenated as bytes."""
    return torch.uint8 if tensor.dtype == FP8 else tensor.dtype


class SharedProjection:
    """The first linear called with an input computes them all; the others, called with the same one, take theirs."""

    def __init__(self, stacked: StackedLinear) -> None:
        self.stacked = stacked
        self._pending: tuple[Any, tuple[Tensor, ...], set[int]] | None = None

    def take(self, index: int, x: Any) -> Tensor:
        """Output of linear `index` for x [..., inputs]: a view of the stacked output."""
        pending = self._pending
        # Asked twice for one output: the input may have changed in place meanwhile.
        if pending is None or pending[0] is not x or index not in pending[2]:
            outputs = self.stacked(x).split(self.stacked.sizes, dim=-1)
            pending = (x, outputs, set(range(len(self.stacked.sizes))))
            self._pending = pending
        pending[2].remove(index)
        if not pending[2]:
            self._pending = None
        return pending[1][index]


def stackable(linears: Sequence[Any]) -> str:
    """Why the modules cannot be stacked; empty if they can."""
    if type(linears[0]) not in (nn.Linear, Fp8Linear) or any(
        type(linear) is not type(linears[0]) for linear in linears
    ):
        return "the projections are not plain linears of one kind"
    if any(has_own_forward(linear) or linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
        return "a projection has hooks or a forward of its own"
    first = linears[0]
    for linear in linears[1:]:
        if linear.in_features != first.in_features or (linear.bias is None) != (first.bias is None):
            return "the projections differ in inputs or bias"
        if getattr(linear, "fast_accumulation", None) != getattr(first, "fast_accumulation", None):
            return "the projections accumulate differently"
        if linear.weight.dtype != first.weight.dtype or linear.weight.device != first.weight.device:
            return "the projections differ in dtype or device"
    if len({linear.weight.data_ptr() for linear in linears}) != len(linears):
        return "the projections share their weights"
    return ""


def fuse_attention_projections(model: nn.Module, session: Session) -> None:
    """One GEMM for q_proj, k_proj and v_proj of every module that has them; for the last two if q_proj is of another
    kind, as where k and v stay in 16 bits (stem_core.fp8.sensitive_linears)."""
    for name, module in model.named_modules():
        linears = [getattr(module, part, None) for part in QKV]
        if not all(isinstance(linear, nn.Module) for linear in linears):
            continue
        reason = stackable(linears)
        if reason and not stackable(linears[1:]):
            linears, reason = linears[1:], ""
        if getattr(module, "is_kv_shared_layer", False):
            reason = "it takes keys and values of another layer"
        if not reason:
            reason = _fuse(linears, activations_like(model, module), session)
            free_blocks(linears[0])
        if reason:
            session.skipped(KIND, name, reason)
        else:
            session.fused(KIND, name)


def _fuse(linears: list[Any], like: Tensor, session: Session) -> str:
    x = trial_input(8, linears[0].in_features, like=like)
    try:
        wanted = [linear(x) for linear in linears]
    except (RuntimeError, ValueError) as problem:
        return first_line(problem)
    mark = session.mark()
    stacked = StackedLinear(linears)
    session.on_undo(stacked.undo)
    shared = SharedProjection(stacked)
    for index, linear in enumerate(linears):
        session.replace_forward(linear, partial(shared.take, index))
    try:
        error = max(row_error(linear(x), want) for linear, want in zip(linears, wanted, strict=True))
    except (RuntimeError, ValueError) as problem:
        session.undo_to(mark)
        return first_line(problem)
    if error > tolerance(x.dtype):
        session.undo_to(mark)
        return f"one GEMM differs from several (relative error {error:.1e})"
    return ""


def free_blocks(linear: Any) -> None:
    """Return the memory of the separate weights to the device: the next, larger, stacked weight does not fit in it."""
    if linear.weight.device.type == "cuda":
        torch.cuda.empty_cache()
