"""Whether the parts of Ray that a driver cannot do without are still there.

Ray's own way to tell is to end the driver's process after a minute, with all that was not written; so the driver looks
for itself and ends in its own words.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping

import ray

from pipeline.errors import JobError

EVERY = 0.5
# How long one may be away before it counts as lost. A private cluster has nobody who starts it again, and says so at
# length after a second; elsewhere the control service may come back, for which Ray allows it a minute.
PRIVATE_SECONDS = 0.0
SHARED_SECONDS = 45.0
Address = tuple[str, int]


class ClusterLostError(JobError):
    """Ray is gone; nothing more can be asked of it."""


class Heartbeat:
    """Looks now and then whether somebody listens at each address, by name; `check` raises ClusterLostError if not."""

    def __init__(
        self, addresses: Mapping[str, Address], patience: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._patience, self._clock = patience, clock
        self._addresses = dict(addresses)
        self._heard = dict.fromkeys(addresses, clock())
        self._next = clock() + EVERY

    def check(self) -> None:
        """Look, if it is time to."""
        if self._clock() < self._next:
            return
        for name, address in self._addresses.items():
            if _listens(address):
                self._heard[name] = self._clock()
            elif self._clock() - self._heard[name] >= self._patience:
                raise ClusterLostError(
                    f"Ray failed: its {name} is gone; what is finished is written, run the same command again"
                )
        self._next = self._clock() + EVERY


def heartbeat(local: bool) -> Heartbeat:
    """The heartbeat of the cluster that this process is connected to."""
    addresses: dict[str, Address] = {}
    with contextlib.suppress(Exception):  # Ray's client has neither, and tells by itself
        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        addresses["control service (GCS)"] = host.strip("[]"), int(port)
        for node in ray.nodes():
            if node["NodeID"] == context.get_node_id():
                addresses["node manager (raylet)"] = node["NodeManagerAddress"], int(node["NodeManagerPort"])
    return Heartbeat(addresses, PRIVATE_SECONDS if local else SHARED_SECONDS)


def _listens(address: Address) -> bool:
    """Whether a port is open; a machine that is too busy to say so counts as one that does."""
    try:
        socket.create_connection(address, timeout=1.0).close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return True
