"""What the layers of a prefill measure of their output error, on its way to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipeline.engine.model.runner import ModelRunner
from stem_core.output_error import ErrorProbe, sampled_blocks


class ProbeReadings:
    """Brings a prefill's measures to the host, each chunk's while later ones run.

    probe: what the layers add to. devices: of the layers that do. limit: StemConfig.max_output_error.
    After each chunk comes send(); read() waits for all but the newest ones.
    """

    def __init__(self, probe: ErrorProbe, devices: Iterable[torch.device], limit: float) -> None:
        self.probe = probe
        self.limit = limit
        # Chunks measure different blocks, so that no place is written twice.
        self._host: dict[torch.device, Tensor] = {
            device: torch.zeros(len(probe.blocks), dtype=torch.float32, pin_memory=device.type == "cuda")
            for device in devices
        }
        self._sent: deque[tuple[range, list[torch.cuda.Event]]] = deque()

    def send(self, start: int, end: int) -> None:
        """Queue the copy of what the chunk of tokens [start, end) measured."""
        sample = self.probe.within(start, end)
        events: list[torch.cuda.Event] = []
        for device, sums in self.probe.sums.items() if sample else ():
            part = slice(sample.start, sample.stop)
            self._host[device][part].copy_(sums[part], non_blocking=True)
            if device.type == "cuda":
                events.append(torch.cuda.current_stream(device).record_event())
        self._sent.append((sample, events))

    def read(self, newest: int) -> Iterator[tuple[int, float]]:
        """(index of a sampled block, its error, mean over rows and layers) of all but the newest sends."""
        while len(self._sent) > newest:
            sample, events = self._sent.popleft()
            for event in events:
                event.synchronize()
            for index in sample:
                yield index, sum(float(host[index]) for host in self._host.values()) / self.probe.layers[index]


def probe_readings(runner: ModelRunner, prompt_tokens: int) -> ProbeReadings | None:
    """For a prompt of so many tokens; None where nothing is measured: no max_output_error, or no sparse layer."""
    sparse = [
        (policy, budget)
        for policy, window in runner.layers
        if (budget := policy.budget(prompt_tokens, window)).budgets is not None
    ]
    if not sparse:
        return None
    config = sparse[0][0].config
    assert config is not None
    blocks = sampled_blocks(sparse[0][1], config)
    devices = dict.fromkeys(runner.layer_devices[policy.layer] for policy, _ in sparse)
    if not blocks:
        return None
    return ProbeReadings(ErrorProbe(blocks, config.block_size), devices, config.max_output_error)
