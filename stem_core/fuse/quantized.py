"""Norms that write fp8 rows straight for the fp8 linears behind them.

Which modules read a norm's output is seen, not assumed: one short prompt runs through the model, and every module that
is handed the very tensor that a norm returned is noted. Then each norm in question is switched, and the layer around it
must give the same output; what does more with the rows than pass them on fails on them, since they are no tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stem_core.errors import first_line
from stem_core.fp8.linear import Fp8Linear
from stem_core.fuse.mlp import mlp_forward, takes_fp8
from stem_core.fuse.norms import norm_forward
from stem_core.fuse.session import Session, row_error, tolerance

KIND = "fp8_norm"
PROBE_TOKENS = 8


def fuse_quantised_norms(model: nn.Module, session: Session) -> None:
    """Switch every fused norm whose output goes to fp8 linears only."""
    if not any(isinstance(module, Fp8Linear) for module in model.modules()):
        return
    try:
        probe = _Probe(model, session.norms)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        session.skipped(KIND, "", f"the model does not run on a prompt alone: {first_line(error)}")
        return
    for name in session.norms:
        readers = probe.readers[name]
        takers = [reader for reader in readers if _takes_fp8(model.get_submodule(reader))]
        if not takers:
            continue
        # A container (an attention module, an MLP) passes its input on to the takers inside it.
        others = [
            reader for reader in readers if reader not in takers and not any(t.startswith(f"{reader}.") for t in takers)
        ]
        reason = f"it is also read by {others[0].rpartition('.')[2]}" if others else ""
        if not reason:
            reason = _switch(model, name, probe, session)
        if reason:
            session.skipped(KIND, name, reason)
        else:
            session.fused(KIND, name)


def _takes_fp8(module: Any) -> bool:
    if isinstance(module, Fp8Linear):
        return True
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is mlp_forward and takes_fp8(module)


def _switch(model: nn.Module, name: str, probe: _Probe, session: Session) -> str:
    """Let the norm write fp8 rows if its layer gives the same output; returns why not, or an empty string."""
    layer = name.rpartition(".")[0]
    if layer not in probe.calls:
        return "its layer was not called"
    args, kwargs = probe.calls[layer]
    run = model.get_submodule(layer)
    norm = model.get_submodule(name)
    wanted = _first(run(*args, **kwargs))
    before = norm.forward
    switched = partial(norm_forward, norm, session.norms[name], session.impl, True)
    norm.forward = switched  # type: ignore[method-assign]
    try:
        error = row_error(_first(run(*args, **kwargs)), wanted)
        reason = f"its layer's output changes (relative error {error:.1e})" if error > tolerance(wanted.dtype) else ""
    except (RuntimeError, ValueError, TypeError, AttributeError) as problem:
        reason = f"its layer does more with it than pass it to linears: {first_line(problem)}"
    if reason:
        norm.forward = before  # type: ignore[method-assign]
    return reason


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class _Probe:
    """One prompt through the model.

    readers: by norm, the modules handed its output. calls: by module that holds a norm, the arguments of its call.
    """

    def __init__(self, model: nn.Module, norms: dict[str, Any]) -> None:
        self.readers: dict[str, list[str]] = {name: [] for name in norms}
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        # The outputs are kept, so that no two of them share an id.
        self._outputs: dict[int, tuple[str, Any]] = {}
        layers = {name.rpartition(".")[0] for name in norms}
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name, name in layers), with_kwargs=True))
            if name in norms:
                handles.append(module.register_forward_hook(self._leaving(name)))
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(embedding.num_embeddings, (1, PROBE_TOKENS), generator=generator)
        # Some rotary modules change with what they are given (LongRoPE): they are put back.
        rotary = [module for module in model.modules() if "Rotary" in type(module).__name__]
        states = [(module, dict(vars(module)), dict(module._buffers)) for module in rotary]
        try:
            model(input_ids=ids.to(embedding.weight.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
            for module, attributes, buffers in states:
                vars(module).clear()
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)

    def _entering(self, name: str, is_layer: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                if id(value) in self._outputs:
                    self.readers[self._outputs[id(value)][0]].append(name)
            if is_layer:
                self.calls[name] = (args, kwargs)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._outputs[id(output)] = (name, output)

        return hook
