"""Run jobs.summarize on a Ray cluster: python -m jobs.submit --address http://HOST:8265 --input DOCS --output OUT ...

Uploads our packages, submits the job, follows its log and exits with its exit code. Paths are made absolute here, so
they must mean the same on the cluster (one machine, or a shared file system); URIs are passed on as they are.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.cli import Parser, add_job_flags, run_main, unheard
from pipeline.errors import JobError, one_line, without_secrets
from pipeline.imports import ROOT
from pipeline.location import has_credentials, is_uri, safe_name
from pipeline.model_files import is_local
from pipeline.settings.config import JobConfig, read_job_file

# What is uploaded: our packages and nothing else of the checkout (Ray refuses a working folder of more than 100 MiB).
PACKAGES = ("jobs", "kernels", "pipeline", "stem_core")
# A cluster takes no jobs in its first seconds.
READY_SECONDS = 60.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def main(arguments: Sequence[str]) -> int:
    """Submit the job that the command line describes; its exit code."""
    parser = Parser(prog="python -m jobs.submit", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    about = "the cluster's job server (default: $RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)"
    parser.add_argument("--address", default=address, help=about)
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and return at once")
    add_job_flags(parser)
    options, job_arguments = split_arguments(parser, arguments)
    client = connect(options.address)
    job = submit(client, job_arguments)
    shown = without_secrets(options.address)
    print(
        f"submitted {job} to {shown}; stop it with: ray job stop --address {shown} {job}",
        flush=True,
    )
    return 0 if options.no_wait else follow(client, job)


def split_arguments(parser: Parser, arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Our own options, and the job's arguments with paths made absolute; checked here, before anything is uploaded."""
    options = parser.parse_args([item for item in arguments if item != "--"])
    values = read_job_file(options.config) if options.config else {}
    values |= {name: value for name, value in vars(options).items() if name not in ("address", "no_wait", "config")}
    config = JobConfig(**values)
    for location in (*config.input, config.output, config.model, config.adapter or "", config.ray_address or ""):
        if has_credentials(location):
            raise JobError(
                f"{safe_name(location)}: its URI holds a key, and the cluster shows the command line of a job to "
                "whoever looks; set it in the environment of the cluster instead (AWS_ACCESS_KEY_ID and so on)"
            )
    if config.schema is not None:
        values["schema"] = config.schema  # its file need not be there on the cluster
    if config.on_finish and without_secrets(config.on_finish) != config.on_finish:
        raise JobError(
            "--on-finish holds a key, and the cluster shows the command line of a job to whoever looks; give a command "
            "that takes it from the environment of the cluster instead: 'curl ... \"$HOOK\"'"
        )
    return options, to_flags(absolute_paths(values))


def absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with local paths made absolute, as this folder sees them. A model that is no folder here is a hub id."""
    inputs = values["input"]
    values = values | {"input": [_absolute(item) for item in ([inputs] if isinstance(inputs, str) else inputs)]}
    paths = ("output", "prompt_file", "adapter", "estimate_from")
    values |= {name: _absolute(values[name]) for name in paths if values.get(name)}
    if isinstance(values.get("questions"), str):
        values["questions"] = _absolute(values["questions"])
    if is_local(values["model"]):
        values["model"] = _absolute(values["model"])
    return values


def _absolute(location: str) -> str:
    return location if is_uri(location) else str(Path(location).expanduser().absolute())


def to_flags(values: dict[str, Any]) -> list[str]:
    """Settings as command-line arguments of jobs.summarize."""
    found: list[str] = []
    for name, value in values.items():
        key = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            found.append(f"--{key}" if value else f"--no-{key}")
        elif name == "question":
            found += [f"--question={text}" for text in ([value] if isinstance(value, str) else value)]
        elif name == "questions" and not isinstance(value, str):
            found.append(f"--questions={json.dumps(value)}")
        elif isinstance(value, list | tuple):
            found += [f"--{key}", *map(str, value)] if value else []
        else:
            # One word, so that a value that begins with a dash is not taken for a flag.
            found.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return found


def connect(address: str) -> Any:
    """A client of the cluster's job server. Raises JobError if there is none, or if it does not let us in."""
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # the client raises many kinds
        if type(error).__name__ == "AuthenticationError":  # older versions of Ray have none
            raise JobError(
                f"--address {without_secrets(address)}: the cluster asks for its token: set RAY_AUTH_MODE=token, and "
                "have the head node's ~/.ray/auth_token in the same file here, or what it holds in RAY_AUTH_TOKEN"
            ) from None
        raise JobError(
            f"--address {without_secrets(address)}: no Ray job server answers: {one_line(error, 200)}; start one with: "
            "ray start --head --dashboard-host 127.0.0.1"
        ) from None


def submit(client: Any, arguments: list[str]) -> str:
    """Upload our packages and start the job; its id. Raises JobError."""
    logging.disable(logging.WARNING)  # the client tells of every package that it skips
    excludes = [f"/{path.name}" for path in ROOT.iterdir() if path.name not in PACKAGES] + ["__pycache__/", ".*_cache/"]
    until = time.monotonic() + READY_SECONDS
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(["python", "-m", "jobs.summarize", *arguments]),
                runtime_env={"working_dir": str(ROOT), "excludes": excludes, "env_vars": {"PYTHONUNBUFFERED": "1"}},
            )
        except Exception as error:  # the client raises RuntimeError for everything
            if "No available agent" not in str(error):
                raise JobError(f"the job was refused: {one_line(error)}") from None
            if time.monotonic() > until:
                raise JobError(
                    f"the cluster takes no jobs: {one_line(error)}; "
                    "if another Ray runs on its head node, give this one its own --dashboard-agent-listen-port"
                ) from None
            time.sleep(1.0)


def follow(client: Any, job: str) -> int:
    """Print the job's log until it ends; its exit code. Ctrl-C and SIGTERM stop the job."""
    signal.signal(signal.SIGTERM, _interrupt)
    printed = 0
    try:
        while (status := str(client.get_job_status(job).value)) not in _ENDED:
            printed = asyncio.run(_print_log(client, job, printed))
            time.sleep(0.5)
    except KeyboardInterrupt:
        client.stop_job(job)
        print(f"stopping {job}", file=sys.stderr)
        return 130
    _print(client.get_job_logs(job)[printed:])
    info = client.get_job_info(job)
    if status == "STOPPED":
        return 130
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if status == "FAILED":
        raise JobError(f"job {job} failed: {one_line(info.message or 'no reason given')}")
    return 0


async def _print_log(client: Any, job: str, printed: int) -> int:
    """Print the log beyond `printed` characters until its stream ends; the characters printed so far."""
    seen = 0
    async for text in client.tail_job_logs(job):
        fresh = text[max(0, printed - seen) :]
        seen += len(text)
        printed = max(printed, seen)
        _print(fresh)
    return printed


def _print(text: str) -> None:
    with unheard():  # the exit code is the job's, whoever reads its log
        sys.stdout.write(text)
        sys.stdout.flush()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_main(main)
