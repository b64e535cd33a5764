"""One job for one output at a time: locks that a crash does not leave behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import threading
import time
from functools import partial
from pathlib import Path
from typing import Protocol

from pipeline.errors import JobError, one_line

FILE = ".lock"
CLAIM = ".lock-"
# Seconds that go on while the machine sleeps, as those of the other jobs do.
_now = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
# A claim in an object store is renewed every BEAT seconds; one that stays the same for LEASE is a crashed job's.
BEAT_SECONDS = 4.0
LEASE_SECONDS = 20.0


class Lock(Protocol):
    """Held between acquire and release, or the end of the process."""

    def acquire(self) -> None: ...
    def release(self) -> None: ...
    def check(self) -> None: ...


class Files(Protocol):
    """What a claim needs of a store: small files that appear whole."""

    name: str

    def list(self, prefix: str = "", suffix: str = "") -> list[str]: ...
    def read(self, name: str) -> bytes | None: ...
    def put(self, name: str, data: bytes) -> None: ...
    def delete(self, name: str) -> None: ...


def refused(output: str, holder: str) -> JobError:
    """The error of the job that comes second."""
    return JobError(f"--output {output}: another job is writing there ({holder}); wait for it or choose another folder")


class FolderLock:
    """flock on a file in the folder: the system lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path, self._name = folder / FILE, name
        self._descriptor = -1

    def acquire(self) -> None:
        """Keep other jobs out. Raises JobError if one is in, or the file cannot be written."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(self._path, flags, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:  # what it leads to would be written over
                raise JobError(f"--output {self._name}: {FILE} in it is a link; remove it") from None
            raise JobError(f"--output {self._name}: {FILE} cannot be written: {one_line(error)}") from None
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
            os.close(descriptor)
            raise JobError(f"--output {self._name}: {FILE} in it is no ordinary file; remove it")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown process"
            os.close(descriptor)
            raise refused(self._name, holder) from None
        except OSError as error:
            os.close(descriptor)
            raise JobError(f"--output {self._name}: its file system has no locks: {one_line(error)}") from None
        with contextlib.suppress(OSError):  # a full disk has no room for the name of the holder; the lock holds
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{this_process()}\n".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Let other jobs in."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def check(self) -> None:
        """Raise JobError if the folder was removed, and perhaps made anew by another job, which locked that one."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self._path.stat(), os.fstat(self._descriptor)):
                return
        raise JobError(f"--output {self._name}: this job gave way: its folder, or {FILE} in it, was removed meanwhile")


class ClaimLock:
    """A claim file that its holder renews; for object stores, which have neither locks nor renames.

    To enter: see no claim, or watch those that are there for LEASE_SECONDS without a change and remove them; write
    one's own; list again; if there is another one, withdraw. Of two that enter at once each writes before it lists, so
    at least one sees the other (S3 and GCS list what was written before). A holder that could not renew its claim, or
    finds it gone, writes no more. What a claim cannot stop is one upload that was under way when its holder froze for
    longer than the lease; a doubled row that came of that is found and refused by the next run.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._name = f"{CLAIM}{secrets.token_hex(8)}"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._renewed = 0.0  # when the last renewal was begun: nobody saw it earlier
        self._beats = 0
        self._lost = ""

    def acquire(self) -> None:
        """Keep other jobs out. Raises JobError if one is in; waits out the lease of one that crashed."""
        for name in self._watch(self._claims()):
            self._files.delete(name)
        self._renew()
        try:
            others = {name: text for name, text in self._claims().items() if name != self._name}
            if others:
                raise refused(self._files.name, _holder(next(iter(others.values()))))
        except JobError:
            self.release()
            raise
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let other jobs in."""
        self._stop.set()
        if self._thread is not None:  # a renewal under way would put the claim back
            self._thread.join(LEASE_SECONDS)
        with contextlib.suppress(JobError):
            self._files.delete(self._name)

    def check(self) -> None:
        """Raise JobError if the output may be another job's by now."""
        self._note_late()
        if self._lost:
            raise JobError(f"--output {self._files.name}: this job gave way: {self._lost}; the same command goes on")

    def _claims(self) -> dict[str, bytes]:
        found = {name: self._files.read(name) for name in self._files.list(CLAIM)}
        return {name: text for name, text in found.items() if text is not None}

    def _watch(self, claims: dict[str, bytes]) -> dict[str, bytes]:
        """Claims that do not change during a lease. Raises JobError if one does, or a new one comes."""
        until = time.monotonic() + LEASE_SECONDS
        while claims and time.monotonic() < until:
            time.sleep(min(1.0, BEAT_SECONDS / 4))
            now = self._claims()
            for name, text in now.items():
                if claims.get(name) != text:
                    raise refused(self._files.name, _holder(text))
            claims = now
        return claims

    def _note_late(self) -> None:
        late = _now() - self._renewed
        if late > LEASE_SECONDS - BEAT_SECONDS:
            self._lost = self._lost or f"its claim could not be renewed for {late:.0f} s"

    def _renew(self) -> None:
        self._beats += 1
        begun = _now()
        self._files.put(self._name, json.dumps({"holder": this_process(), "beat": self._beats}).encode())
        self._renewed = begun

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._note_late()
            if self._lost:  # it may be another job's by now: to renew it would bring it back
                return
            try:
                if self._files.read(self._name) is None:
                    if not self._stop.is_set():
                        self._lost = "another job took its claim for a crashed one's"
                    return
                if not self._stop.is_set():
                    self._renew()
            except Exception:  # the network may come back; check() knows how late it is
                continue


def this_process() -> str:
    """What others are told of the holder."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(claim: bytes) -> str:
    try:
        return str(json.loads(claim)["holder"])
    except (ValueError, KeyError, TypeError):
        return "unknown process"
