"""A model spread over devices: which layer lies where, and how activations get there.

The layers go to the devices in the model's order, in contiguous groups (stages). What stands before them lies on the
first device, and so does the output head: it reads one token of each document, while the chunk that it is taken from
stays where it is; tied weights need no second copy; and the next token comes out where its embedding is looked up.
Launches wait for nothing, so that while one stage works on a chunk of a prompt, the one before it works on the next.

accelerate could connect the stages, too: but its hooks replace the forward of every module, which leaves nothing to
fuse, and they copy what all layers share (rotary embeddings) once for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.config import EngineError
from pipeline.engine.devices import tensor_bytes, weight_bytes
from stem_core.context import Copies


@dataclass(frozen=True)
class Placement:
    """Where a model's parts lie.

    devices: of the stages, in order; the same device may stand there several times.
    parts: stage of every part by name (a layer, another module, a parameter of a module that contains the layers);
    together they hold all of the model. A model that lies on one device is one part, "".
    counts: layers of each stage. layer_type: class of the first layer. Both only where there are several stages.
    """

    devices: tuple[torch.device, ...]
    parts: dict[str, int]
    counts: tuple[int, ...] = ()
    layer_type: type[nn.Module] | None = None

    @cached_property
    def layer_devices(self) -> tuple[torch.device, ...]:
        """The device of each layer."""
        return tuple(device for device, count in zip(self.devices, self.counts, strict=True) for _ in range(count))

    def device_map(self) -> dict[str, torch.device]:
        """The device of every part, by name."""
        return {name: self.devices[stage] for name, stage in self.parts.items()}

    def device_of(self, name: str) -> torch.device:
        """The device of a module or parameter, inside a part."""
        return self.devices[next(self.parts[part] for part in _prefixes(name) if part in self.parts)]

    def weight_bytes(self, model: nn.Module) -> list[int]:
        """Parameters and buffers of each stage, tied ones once."""
        return _bytes_by_stage(model, self.parts, len(self.devices))


def whole(device: torch.device) -> Placement:
    """All of a model on one device."""
    return Placement((device,), {"": 0})


def place(model: nn.Module, devices: Sequence[torch.device], rooms: Sequence[int]) -> Placement:
    """Divide a model, which may be on the device "meta", over `devices`.

    rooms: bytes on each device for weights and KV. The split leaves as much as can be for the KV of a layer where there
    is least. Raises EngineError for a model that cannot be divided so; one device takes any.
    """
    if len(devices) == 1:
        return whole(devices[0])
    layers = _layer_list(model)
    modules = list(model.get_submodule(layers).children())
    if len(modules) < len(devices):
        raise EngineError(f"a model of {len(modules)} layers cannot be spread over {len(devices)} GPUs: use fewer")
    if any(getattr(module, "is_kv_shared_layer", False) for module in model.modules()):
        raise EngineError(
            "this model's layers take keys and values from one another, so that it cannot be spread over GPUs: run it "
            "on one GPU (gpus_per_worker 1)"
        )
    last = len(devices) - 1
    parts = {name: last * at_end for name, at_end in _other_parts(model, layers)}
    fixed = _bytes_by_stage(model, parts, len(devices))
    sizes = [weight_bytes(module) for module in modules]
    counts = balance(sizes, [room - taken for room, taken in zip(rooms, fixed, strict=True)])
    stages = [stage for stage, count in enumerate(counts) for _ in range(count)]
    parts |= {f"{layers}.{index}": stage for index, stage in enumerate(stages)}
    _check_ties(model, parts)
    return Placement(tuple(devices), parts, tuple(counts), type(modules[0]))


def balance(sizes: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """How many of the layers, in order, each device takes, at least one.

    sizes: bytes of each layer. rooms: bytes on each device. What a device has left for each of its layers is largest
    where it is least; of equals the most even split.
    """
    total = [0, *accumulate(sizes)]

    def left(device: int, first: int, last: int) -> tuple[float, int]:
        return (rooms[device] - total[last] + total[first]) / (last - first), first - last

    # best[n]: how the first n layers are divided over the devices so far, and the least that is left anywhere.
    best: dict[int, tuple[tuple[float, int], list[int]]] = {0: ((float("inf"), 0), [])}
    for device in range(len(rooms)):
        behind = len(rooms) - device - 1
        found: dict[int, tuple[tuple[float, int], list[int]]] = {}
        for first, (least, counts) in best.items():
            for last in range(first + 1, len(sizes) - behind + 1):
                worst = min(least, left(device, first, last))
                if last not in found or worst > found[last][0]:
                    found[last] = worst, [*counts, last - first]
        best = found
    return best[len(sizes)][1]


def move(model: nn.Module, placement: Placement) -> None:
    """Bring every part to its device; one that is there stays as it is, and tied weights stay tied."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, device in placement.device_map().items():
        if name in modules:
            modules[name].to(device)
        else:
            parent, _, own = name.rpartition(".")
            tensor = getattr(modules[parent], own)
            tensor.data = tensor.data.to(device)


def connect(model: nn.Module, placement: Placement) -> None:
    """Hand activations from stage to stage: every part's tensors are brought to its device before it runs.

    While it runs, its GPU is the current one: a few of torch's operations launch on the current GPU whichever their
    arguments are on (torch.ldexp does in 2.11), and read and write there out of turn.
    """
    if "" in placement.device_map():
        return  # all of it is on one device
    relay = Relay()
    model.register_forward_pre_hook(relay.begin)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, device in placement.device_map().items():
        if name in modules:
            enter, leave = relay.to(device)
            modules[name].register_forward_pre_hook(enter, with_kwargs=True)
            modules[name].register_forward_hook(leave, always_call=True)


class Relay:
    """Brings tensors to devices. What all layers share is copied once for each device and forward pass."""

    def __init__(self) -> None:
        # By the id of the tensor, which its Copies hold on to.
        self._shared: dict[int, Copies] = {}

    def begin(self, *ignored: Any) -> None:
        """A forward pass begins."""
        self._shared.clear()

    def to(self, device: torch.device) -> tuple[Any, Any]:
        """The hooks before and behind a part on `device`."""
        before: list[int] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Hidden states come first and are not seen again: nothing is to hold on to them.
            first = tuple(self._brought(value, device, shared=False) for value in args[:1])
            rest = tuple(self._brought(value, device, shared=True) for value in args[1:])
            named = {name: self._brought(value, device, name != "hidden_states") for name, value in kwargs.items()}
            if device.type == "cuda":
                before.append(torch.cuda.current_device())
                torch.cuda.set_device(device)
            return (*first, *rest), named

        def leave(*ignored: Any) -> None:
            if before:
                torch.cuda.set_device(before.pop())

        return enter, leave

    def _brought(self, value: Any, device: torch.device, shared: bool) -> Any:
        """Tensors, in tuples and lists too, on `device`; anything else as it is: contexts and caches see to theirs."""
        if isinstance(value, Tensor):
            if value.device == device:
                return value
            if not shared:
                return value.to(device, non_blocking=True)
            if id(value) not in self._shared:
                self._shared[id(value)] = Copies(value)
            return self._shared[id(value)].on(device)
        if type(value) in (tuple, list):
            return type(value)(self._brought(item, device, shared) for item in value)
        return value


def _layer_list(model: nn.Module) -> str:
    """The name of the list of decoder layers: the one that holds most."""
    lists = {name: weight_bytes(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise EngineError("this model has no list of layers that could be spread over GPUs: run it on one GPU")
    return max(lists, key=lambda name: lists[name])


def _other_parts(model: nn.Module, layers: str) -> list[tuple[str, bool]]:
    """All but the layers, and whether it goes to the last device: what follows the layers and has parameters (a norm)
    does, what has buffers alone (rotary frequencies) serves all layers from the first one.
    """
    found: list[tuple[str, bool]] = []
    parent, path = model, ""
    steps = layers.split(".")
    for depth, step in enumerate(steps):
        prefix = f"{path}." if path else ""
        own = [*parent._parameters.items(), *parent._buffers.items()]
        found += [(prefix + name, False) for name, tensor in own if tensor is not None]
        behind = False
        for name, child in parent.named_children():
            if name == step:
                behind = depth == len(steps) - 1
            else:
                found.append((prefix + name, behind and next(child.parameters(), None) is not None))
        parent, path = parent.get_submodule(step), prefix + step
    return found


def _bytes_by_stage(model: nn.Module, parts: dict[str, int], stages: int) -> list[int]:
    held: list[list[Tensor]] = [[] for _ in range(stages)]
    for name, tensor in _tensors(model):
        part = next((p for p in _prefixes(name) if p in parts), None)
        if part is not None:
            held[parts[part]].append(tensor)
    return [tensor_bytes(tensors) for tensors in held]


def _check_ties(model: nn.Module, parts: dict[str, int]) -> None:
    """Raise EngineError where parts of different stages share a parameter."""
    owners: dict[int, tuple[str, int]] = {}
    for name, tensor in _tensors(model):
        stage = next(parts[p] for p in _prefixes(name) if p in parts)
        other, first = owners.setdefault(id(tensor), (name, stage))
        if first != stage:
            raise EngineError(f"{other} and {name} are one weight, but would lie on different GPUs: run it on one GPU")


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _prefixes(name: str) -> list[str]:
    """name, and the names of the modules that it is in, innermost first; the model's own, "", at the end."""
    steps = name.split(".")
    return [".".join(steps[:n]) for n in range(len(steps), -1, -1)]
