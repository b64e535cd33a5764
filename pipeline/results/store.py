"""Where results go: a folder on this machine or in an object store, written so that a file is whole or not there.

Commit protocol with rename (a local or mounted file system): temporary name, fsync, rename over the final name, fsync
of the folder. What a crash leaves is a temporary file, which the next run removes.

Commit protocol without rename (s3://, gs://): a part is one object, put under its final name, which carries a random
suffix; it is put again only to replace outdated rows by new ones. A put, or the completion of a multipart upload, is
atomic: before it there is no object or the earlier one, after it the new one. A crash leaves at most an upload that was
never completed, which nobody can see (let a lifecycle rule of the bucket remove such). What replaces several objects (a
merge of parts) is announced in a journal object first, which readers honour and the next run finishes or undoes. One
job at a time: pipeline.results.lock.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType

from pipeline.errors import JobError, one_line
from pipeline.interruptible import interruptible
from pipeline.location import is_remote, open_filesystem, safe_name, split_location
from pipeline.results.lock import ClaimLock, FolderLock, Lock

T = TypeVar("T")
TEMPORARY, PROBE = ".tmp", "probe-"


class Store:
    """A folder of files that appear whole. All its methods raise JobError (disk full, permission, network)."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.name = safe_name(location)
        self.remote = is_remote(location)
        self._uri, self._root, _ = split_location(location)
        self._filesystem: FileSystem = open_filesystem(self._uri)
        self._lock: Lock | None = None

    def create(self) -> None:
        """Make the folder. Raises JobError if that cannot be done or it cannot be written to."""
        try:
            self._interruptible(self._filesystem.create_dir, self._root)
            probe = f"{PROBE}{secrets.token_hex(4)}{TEMPORARY}"
            self._put(probe, b"")
            with contextlib.suppress(FileNotFoundError):  # a job that holds the lock clears temporary files
                self._interruptible(self._filesystem.delete_file, self.path(probe))
        except (OSError, pa.ArrowException) as error:
            raise JobError(f"--output {self.name}: cannot be written: {one_line(error)}") from None

    def lock(self) -> None:
        """Keep other jobs out until `unlock` or this process ends, however it ends. Raises JobError if one is in."""
        lock: Lock = ClaimLock(self) if self.remote else FolderLock(Path(self._root), self.name)
        lock.acquire()
        self._lock = lock

    def unlock(self) -> None:
        """Let other jobs in."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            lock.release()

    def check_lock(self) -> None:
        """Raise JobError if this job held the lock and may have lost it."""
        if self._lock is not None:
            self._lock.check()

    def list(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Names of files in the folder, sorted; none if there is no folder."""
        with self.named_failures("cannot be listed"):
            infos = self._interruptible(self._filesystem.get_file_info, FileSelector(self._root, allow_not_found=True))
        names = (info.base_name for info in infos if info.type == FileType.File)
        return sorted(name for name in names if name.startswith(prefix) and name.endswith(suffix))

    def open(self, name: str) -> pa.NativeFile:
        """A file to read from. Raises OSError (FileNotFoundError if it is not there) or ArrowException."""
        return self._interruptible(self._filesystem.open_input_file, self.path(name))

    def read_all(self, name: str) -> bytes:
        """A file's bytes. Raises OSError (FileNotFoundError if it is not there) or ArrowException."""

        def read() -> bytes:
            with self._filesystem.open_input_file(self.path(name)) as file:
                return file.readall()

        return self._interruptible(read)

    def read(self, name: str) -> bytes | None:
        """A file's bytes, or None if there is no such file."""
        with self.named_failures(f"{name} cannot be read"):
            try:
                return self.read_all(name)
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file; whoever looks sees all of it or nothing."""
        self.check_lock()
        self.put(name, data)

    def put(self, name: str, data: bytes) -> None:
        """`write` for the lock's own files."""
        try:
            self._put(name, data)
        except (OSError, pa.ArrowException) as error:
            raise JobError(
                f"--output {self.name}: {name} cannot be written: {one_line(error)}; what is there stays valid, "
                "and the same command goes on once this is mended"
            ) from None

    def _put(self, name: str, data: bytes) -> None:
        if self.remote:
            self._interruptible(self._put_object, name, data)
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

    def _put_object(self, name: str, data: bytes) -> None:
        with self._filesystem.open_output_stream(self.path(name), compression=None) as stream:
            stream.write(data)

    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name; in an object store a copy, then a removal."""
        self.check_lock()
        with self.named_failures(f"{name} cannot be renamed"):
            self._interruptible(self._filesystem.move, self.path(name), self.path(new_name))

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        self.check_lock()
        with self.named_failures(f"{name} cannot be removed"), contextlib.suppress(FileNotFoundError):
            self._interruptible(self._filesystem.delete_file, self.path(name))

    def clear_temporary(self) -> None:
        """Remove what an interrupted write left. Only under the lock."""
        for name in self.list(suffix=TEMPORARY):
            if name.startswith((".", PROBE)):  # others are not ours
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

    def _interruptible(self, call: Callable[..., T], *arguments: Any) -> T:
        try:
            return interruptible(self.remote, call, *arguments)
        except (OSError, pa.ArrowException):
            raise
        except Exception as error:  # filesystems of fsspec raise what they like
            raise OSError(one_line(error)) from None

    @contextlib.contextmanager
    def named_failures(self, what: str) -> Iterator[None]:
        """OSErrors and ArrowExceptions of a with-block become JobErrors that say what cannot be done."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise JobError(f"--output {self.name}: {what}: {one_line(error)}") from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
