"""--on-finish: tell a command, or a web address, what became of a job.

Both get the same JSON. Whatever goes wrong here is told in one line and changes neither the results nor the exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import JobError, one_line, without_secrets
from pipeline.results.summary import JobReport

COMMAND_SECONDS = 60.0
# One try of a request, from resolving the name to the head of the answer; and the pause before the second try.
POST_SECONDS = 15.0
PAUSE_SECONDS = 2.0
_WORDS = {0: "ok", 2: "some_failed", 130: "stopped"}
# Of a JobReport, as it has them, in the order in which they are told.
_TOLD = (
    "output", "documents", "questions", "ok", "failed", "missing", "counts", "done_now", "seconds", "prompt_tokens",
    "output_tokens", "cut", "flagged", "flags",
)  # fmt: skip


def is_address(on_finish: str) -> bool:
    """Whether it is a web address rather than a command."""
    return on_finish.lower().startswith(("https://", "http://"))


def finished(report: JobReport) -> dict[str, Any]:
    """What is told of a job that came to its end, or was stopped: plain values, without secrets."""
    told: dict[str, Any] = {"status": _WORDS[report.exit_code], "exit_code": report.exit_code, "error": ""}
    told |= {name: getattr(report, name) for name in _TOLD}
    told["seconds"] = round(report.seconds, 3)
    told["first_errors"] = [
        dict(zip(("document", "status", "error"), each, strict=True)) for each in report.first_errors
    ]
    return _clean(told)


def broken_off(output: str, error: JobError) -> dict[str, Any]:
    """What is told of a job that could not run, or not go on. output: as it may be printed."""
    return _clean({"status": "failed", "exit_code": 1, "error": str(error), "output": output})


def _clean(told: dict[str, Any]) -> dict[str, Any]:
    """Without secrets in its texts, wherever they stand."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return without_secrets(value)
        if isinstance(value, dict):
            return {name: clean(each) for name, each in value.items()}
        return [clean(each) for each in value] if isinstance(value, list) else value

    return {name: clean(value) for name, value in told.items()}


def notify(
    on_finish: str,
    told: dict[str, Any],
    log: Callable[[str], None],
    *,
    command_seconds: float = COMMAND_SECONDS,
    post_seconds: float = POST_SECONDS,
    pause_seconds: float = PAUSE_SECONDS,
) -> None:
    """Run the command with `told` as JSON on standard input, or send it to the address. Raises nothing of its own.

    log: gets one line if that fails. It never holds the address beyond its host, which may be a secret.
    """
    body = json.dumps(told).encode()
    if is_address(on_finish):
        problem = _post(on_finish, body, post_seconds)
        if problem:
            time.sleep(pause_seconds)
            problem = _post(on_finish, body, post_seconds)
        name = f"--on-finish {_host(on_finish)}"
    else:
        problem = _run(on_finish, body, _environment(told), command_seconds)
        name = "--on-finish"
    if problem:
        log(f"{name}: {problem}; the results are not concerned")


def _environment(told: dict[str, Any]) -> dict[str, str]:
    """STEMLINE_STATUS and the like, for commands that read no JSON."""
    names = ("status", "exit_code", "output", "documents", "ok", "failed", "missing", "seconds", "error")
    return {f"STEMLINE_{name.upper()}": str(told[name]) for name in names if name in told}


def _run(command: str, body: bytes, environment: dict[str, str], seconds: float) -> str:
    """Run a command in a shell; why it failed, empty if it did not. What it prints goes to standard error."""
    try:
        started = subprocess.Popen(  # the user's own command line, as of a cron job
            command, shell=True, stdin=subprocess.PIPE, stdout=_printed(), stderr=_printed(),
            env=os.environ | environment, start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:  # no shell, too many processes; an error of many kilobytes
        return f"the command cannot be started: {one_line(error, 200)}"
    try:
        started.communicate(body, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"the command was ended after {seconds:g} s"
    finally:
        if started.poll() is None:  # too late, or interrupted: with all that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    code = started.returncode
    return "" if not code else f"the command ended with {f'exit code {code}' if code > 0 else f'signal {-code}'}"


def _printed() -> int:
    """Where the command's output goes. Standard output holds the job's own figures, which other programs may read."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or none of the operating system's
        return subprocess.DEVNULL


def _post(address: str, body: bytes, seconds: float) -> str:
    """Send a request; why it failed, empty if it did not.

    In a thread of its own, since a time limit of urllib is one of each read: a server that sends a byte now and then
    would keep the job for ever.
    """
    outcome: list[str] = []

    def send() -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "stemline"}
        try:
            request = urllib.request.Request(address, body, headers, method="POST")  # http or https
            with _OPENER.open(request, timeout=seconds):
                outcome.append("")
        except urllib.error.HTTPError as error:
            outcome.append(f"the server answered {error.code} {one_line(str(error.reason), 100)}")
        except Exception as error:  # many kinds: names, certificates, what is no HTTP, an address that is none
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                return
            outcome.append(f"it cannot be reached: {_without(address, one_line(str(reason), 200))}")

    thread = threading.Thread(target=send, name="on-finish", daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer in {seconds:g} s"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What is sent goes to the address that was given and to no other; urllib would turn it into a GET besides."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _host(address: str) -> str:
    """Of an address, what may be printed: those of webhooks hold their secret in the path."""
    try:
        parts = urlsplit(address)
        return f"{parts.scheme}://{parts.hostname or ''}"
    except ValueError:
        return "(no valid address)"


def _without(address: str, text: str) -> str:
    """`text` without what stands behind the host of the address."""
    rest = address.partition("://")[2].partition("/")[2]
    return text.replace(address, _host(address)).replace(rest, "...") if rest else text
