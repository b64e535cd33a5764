"""A cluster of three raylets on this machine: one is killed in the middle of a job, another joins. argv: folder, model.

Run as a process of its own (tests/faults/test_nodes.py): the tests' own cluster is in theirs. The model is a small
random one unless a folder is named.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from patience import patient

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}

from ray.cluster_utils import Cluster

from pipeline import read_results
from tools.faults import processes
from tools.faults.processes import LOG
from tools.faults.runs import prepare

DOCUMENTS = 400
# The head notices a killed raylet by its silence; usually after 15 s.
SOON = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def main(folder: Path, model: Path | None = None) -> None:
    """Run a job on a head and two nodes, kill one, add one; print what became of it as JSON."""
    os.environ[LOG] = str(folder / "engine.log")  # the nodes' workers inherit it
    store = {"object_store_memory": 80 << 20}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SOON}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=head | store)
    nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(2)]
    place = prepare(
        folder, DOCUMENTS, "auto", model=model, ray_address=cluster.address, max_new_tokens=16, engine="WaitsForNode"
    )
    begun, limit = time.monotonic(), patient(240)
    with processes.driver(place.arguments, place.log, place.engine_log) as driver:

        def wait_for(what: str, happened: Callable[[], bool]) -> None:
            while not happened():
                if driver.poll() is not None or time.monotonic() - begun > limit:
                    raise SystemExit(f"the job did not get to {what}: {place.log.read_text()}")
                time.sleep(0.1)

        wait_for("100 documents", lambda: place.documents_taken >= 100)
        wait_for("two workers", lambda: len(list((folder / "model").glob("works-*"))) == 2)
        (folder / "model" / "left").touch()
        os.kill(nodes[0].all_processes["raylet"][0].process.pid, signal.SIGKILL)
        wait_for("its loss", lambda: "the cluster has shrunk" in place.log.read_text(errors="replace"))
        cluster.add_node(num_cpus=1, **store)
        code = driver.wait(timeout=limit - (time.monotonic() - begun))
    count = place.count()
    cluster.shutdown()
    rows = Counter(name.rpartition("/")[2] for name in read_results(place.output, ["worker"])["worker"].to_pylist())
    print(json.dumps({
        "code": code, "statuses": count.statuses, "lost": count.lost, "doubled": count.doubled, "again": count.again,
        "rows_by_worker": rows, "late_worker": (folder / "model" / "joined").read_text(),
        "seconds": time.monotonic() - begun, "log": place.log.read_text(errors="replace"),
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(Path, sys.argv[2:]))
