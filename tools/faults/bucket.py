"""The demo documents in an S3-compatible server on this machine: read there, written there, killed halfway, resumed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pyarrow.fs import FileSystem

from pipeline import read_results
from pipeline.errors import JobError
from pipeline.imports import ROOT
from pipeline.results.parts import part_names
from pipeline.results.store import Store
from tools.faults import processes
from tools.faults.runs import refuse_used

DOCUMENTS = ROOT / "examples" / "documents"
KEYS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_REGION": "us-east-1"}


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A moto server on a free port of the loopback; its address, for endpoint_override."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/"):
                    break
                if process.poll() is not None or time.monotonic() > until:
                    raise JobError("the S3 server does not start; it needs: pip install 'moto[server]'")
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


@contextlib.contextmanager
def credentials() -> Iterator[None]:
    """Keys for that server, in the environment of this process and those that it starts."""
    before = {name: os.environ.get(name) for name in KEYS}
    os.environ.update(KEYS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def upload(folder: Path, endpoint: str, bucket: str = "demo") -> tuple[str, str]:
    """Put a folder's files into a new bucket; the URIs of input and output."""
    query = f"?endpoint_override={endpoint}&scheme=http&allow_bucket_creation=true"
    files, _ = FileSystem.from_uri(f"s3://{bucket}{query}")
    files.create_dir(bucket)
    for path in sorted(folder.iterdir()):
        with files.open_output_stream(f"{bucket}/docs/{path.name}") as stream:
            stream.write(path.read_bytes())
    plain = f"?endpoint_override={endpoint}&scheme=http"
    return f"s3://{bucket}/docs{plain}", f"s3://{bucket}/out{plain}"


def bucket(folder: Path) -> int:
    """Run the demo from and to the server, kill the driver when the first part is there, run it again; 0 if exact."""
    refuse_used(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with credentials(), server() as endpoint:
        source, output = upload(DOCUMENTS, endpoint)
        log, engine_log = folder / "driver.log", folder / "engine.log"
        arguments = ["--config", str(ROOT / "examples" / "demo.yaml"), f"--input={source}", f"--output={output}"]
        arguments += ["--flush-documents", "2", "--device", "cpu", "--workers", "1"]
        store = Store(output)
        with processes.driver(arguments, log, engine_log) as first:
            while first.poll() is None and not part_names(store):
                time.sleep(0.1)
            below = processes.descendants(first.pid)
            processes.kill(first.pid, signal.SIGKILL)
            first.wait()
        processes.left_over(below, 15.0)
        before = {row["document_id"]: row for row in read_results(output).to_pylist()}
        with processes.driver(arguments, log, engine_log) as second:
            code = second.wait()
        rows = read_results(output).to_pylist()
    after = {row["document_id"]: row for row in rows}
    documents = len(list(DOCUMENTS.iterdir()))
    kept = sum(after.get(name) == row for name, row in before.items())
    computed = engine_log.read_bytes().count(b"\n")
    print(f"documents {documents}, rows when the driver was killed {len(before)}, after resuming {len(rows)}")
    print(f"lost {documents - len(after)}, doubled {len(rows) - len(after)}, rows kept as they were {kept}")
    print(f"computed again {computed - documents}, exit code of the second run {code}")
    print("\n".join(log.read_text().strip().splitlines()[-4:]))
    return 0 if len(after) == len(rows) == documents and kept == len(before) and code == 0 else 2
