"""Several devices on one CPU: tensors with real values that say which device they are on, and refuse to be mixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.engine.model.placement import Placement

CPU = torch.device("cpu")


def chips(count: int) -> list[torch.device]:
    """Devices of a kind that torch knows the name of and nothing else: all that runs there runs in Placed."""
    return [torch.device("meta", index) for index in range(count)]


class Placed(Tensor):
    """A CPU tensor that says it is on another device."""

    inner: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta", dispatch_device=True, requires_grad=False,
        )  # fmt: skip
        made.inner, made.place = inner, device
        return made

    def tolist(self) -> Any:
        """As a list; torch's own refuses subclasses."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Devices.run(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """Inside, tensors are made on the devices asked for. Operations on two devices at once raise AssertionError, copies
    excepted: `copies` counts those from chip to chip, by (from, to).
    """

    copies: dict[tuple[int, int], int] = {}  # noqa: RUF012 - of the Devices that was entered last

    def __enter__(self) -> Devices:
        Devices.copies = {}
        self._tensor = torch.tensor
        # torch.tensor() makes its result where no mode sees it.
        torch.tensor = lambda data, device=None, **kw: self._tensor(data, **kw).to(device or CPU)  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.tensor = self._tensor  # type: ignore[assignment]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    @staticmethod
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].place
        leaves = tree_leaves((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        # A 0-dimensional host tensor rides along as a kernel's argument.
        devices = {_device(t) for t in tensors if isinstance(t, Placed) or t.ndim > 0}
        if len(devices) > 1 and "copy_" not in func.__name__:
            raise AssertionError(f"{func} works across {sorted(map(str, devices))}")
        source = next((t.place for t in tensors if isinstance(t, Placed)), CPU)
        target = next((a for a in leaves if isinstance(a, torch.device)), source)
        if CPU not in (source, target) and source != target:
            key = (source.index, target.index)
            Devices.copies[key] = Devices.copies.get(key, 0) + 1
        if CPU not in (source, target) and "ldexp" in func.__name__:
            raise AssertionError(f"{func} launches on the current GPU, whichever its arguments are on")
        plain = tree_map(_plain, (args, kwargs))
        out = func(*plain[0], **plain[1])
        written = func._schema.arguments and func._schema.arguments[0].alias_info
        if written and written.is_write:
            return args[0]
        return out if target == CPU else tree_map(lambda t: Placed(t, target) if isinstance(t, Tensor) else t, out)


def _device(tensor: Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, Placed) else CPU


def _plain(value: Any) -> Any:
    if isinstance(value, Placed):
        return value.inner
    return CPU if isinstance(value, torch.device) else value


def put(model: nn.Module, placement: Placement) -> nn.Module:
    """Parameters and buffers to their chips, tied ones together. (Module.to() does it for real devices.)"""
    moved: dict[int, Any] = {}
    for name, module in model.named_modules():
        for group in (module._parameters, module._buffers):
            for own, tensor in group.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    value = Placed(tensor.detach(), placement.device_of(f"{name}.{own}" if name else own))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    # The old one is kept, so that no id comes again.
                    moved[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value, tensor
                group[own] = moved[id(tensor)][0]
    return model
