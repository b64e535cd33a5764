"""Where results go: a folder on this machine or in an object store, written so that a file is whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType

from pipeline.errors import JobError, one_line
from pipeline.source.files import is_remote, open_filesystem, safe_name, split_location

TEMPORARY = ".tmp"


class Store:
    """A folder of files that appear whole.

    On a local or mounted file system: temporary name, fsync, rename, fsync of the folder. In an object store a put is
    atomic by itself, so the file is written under its own name and appears when its upload completes.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.name = safe_name(location)
        self.remote = is_remote(location)
        self._uri, self._root, _ = split_location(location)
        self._filesystem: FileSystem = open_filesystem(self._uri)
        self._lock_file = -1

    def create(self) -> None:
        """Make the folder. Raises JobError if that cannot be done or it cannot be written to."""
        try:
            self._filesystem.create_dir(self._root, recursive=True)
            probe = f"probe-{secrets.token_hex(4)}{TEMPORARY}"
            self._put(probe, b"")
            self.delete(probe)
        except (OSError, pa.ArrowException) as error:
            raise JobError(f"--output {self.name}: cannot be written: {one_line(error)}") from None

    def lock(self) -> None:
        """Keep other jobs out until `unlock` or this process ends, however it ends. Raises JobError if one is in.

        Object stores have no such lock; there the caller must not start two jobs on one output.
        """
        if self.remote:
            return
        descriptor = os.open(Path(self._root) / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown process"
            os.close(descriptor)
            raise JobError(
                f"--output {self.name}: another job is writing there ({holder}); wait for it or choose another folder"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock_file = descriptor

    def unlock(self) -> None:
        """Let other jobs in."""
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    def list(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Names of files in the folder, sorted; none if there is no folder."""
        infos = self._filesystem.get_file_info(FileSelector(self._root, allow_not_found=True))
        names = (info.base_name for info in infos if info.type == FileType.File)
        return sorted(name for name in names if name.startswith(prefix) and name.endswith(suffix))

    def read(self, name: str) -> bytes | None:
        """A file's bytes, or None if there is no such file."""
        if self._filesystem.get_file_info(self.path(name)).type != FileType.File:
            return None
        with self._filesystem.open_input_file(self.path(name)) as file:
            return file.read()

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file; whoever looks sees all of it or nothing. Raises JobError (disk full, permission, network)."""
        try:
            self._put(name, data)
        except (OSError, pa.ArrowException) as error:
            raise JobError(
                f"--output {self.name}: {name} cannot be written: {one_line(error)}; what is on disk stays valid"
            ) from None

    def _put(self, name: str, data: bytes | pa.Buffer) -> None:
        if self.remote:
            with self._filesystem.open_output_stream(self.path(name), compression=None) as stream:
                stream.write(data)
            return
        folder = Path(self._root)
        temporary = folder / f".{name}.{secrets.token_hex(4)}{TEMPORARY}"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / name)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(folder)

    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name."""
        self._filesystem.move(self.path(name), self.path(new_name))

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self.path(name))

    def clear_temporary(self) -> None:
        """Remove what an interrupted write left. Only under the lock."""
        for name in self.list(suffix=TEMPORARY):
            self.delete(name)

    def path(self, name: str) -> str:
        """A file's path inside the filesystem."""
        return f"{self._root.rstrip('/')}/{name}"

    @property
    def filesystem(self) -> FileSystem:
        """The filesystem that `path` is in."""
        return self._filesystem

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """`lock` for the time of a with-block."""
        self.lock()
        try:
            yield
        finally:
            self.unlock()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
