"""A cluster of three raylets on this machine: one leaves in the middle of a job, another joins. argv: folder.

Run as a process of its own (tests/faults/test_nodes.py): the tests' own cluster is in theirs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}

from ray.cluster_utils import Cluster

from jobs.faults import processes
from jobs.faults.processes import LOG
from jobs.faults.runs import prepare


def main(folder: Path) -> None:
    """Run a job on two nodes, take one away, add one; print what became of it as JSON."""
    os.environ[LOG] = str(folder / "engine.log")  # the nodes' workers inherit it
    store = {"object_store_memory": 80 << 20}
    cluster = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={"num_cpus": 0, "include_dashboard": False} | store,
    )
    nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(2)]
    place = prepare(folder, 1500, 2, ray_address=cluster.address, max_new_tokens=16)
    with processes.driver(place.arguments, place.log, place.engine_log) as driver:
        until = time.monotonic() + 240

        def wait_for(documents: int) -> int:
            while driver.poll() is None and time.monotonic() < until:
                seen = place.engine_log.read_bytes().count(b"\n") if place.engine_log.exists() else 0
                if seen >= documents:
                    return seen
                time.sleep(0.1)
            raise SystemExit(f"the job did not get to {documents} documents: {place.log.read_text()}")

        at_loss = wait_for(100)
        cluster.remove_node(nodes[0], allow_graceful=False)
        wait_for(at_loss + 100)
        cluster.add_node(num_cpus=1, **store)
        code = driver.wait(timeout=max(1.0, until - time.monotonic()))
    count = place.count()
    cluster.shutdown()
    print(json.dumps({"code": code, "statuses": count.statuses, "lost": count.lost, "doubled": count.doubled,
                      "again": count.again, "log": place.log.read_text(errors="replace")}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
