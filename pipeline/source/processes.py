"""Processes that convert documents, kept warm: a parser that hangs, crashes or eats memory costs its document alone.

They are begun as programs of their own, not forked, so that they hold nothing of CUDA, Ray or this process's threads.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO, cast

from pipeline.converters.protocol import Converted, receive, send
from pipeline.errors import DocumentError

# Conversions at a time in one process of the pipeline. pdfium reads hundreds of pages in a second.
TOGETHER = 2
# A process gives way to a new one after so many documents: parsers leak.
MOST_DOCUMENTS = 100
# Beyond its time for a document a process has so long to start and to answer before it is killed from outside.
_GRACE_SECONDS = 20.0


class _ProcessEndedError(Exception):
    """The process ended before it answered: what the document needs more of, or how the process ended."""


class _OutOfMemoryError(_ProcessEndedError):
    """It had no more memory."""


class _Process:
    """One process, of `gib` address space. documents: that it has had."""

    def __init__(self, gib: float) -> None:
        start = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from pipeline.converters.child import main; main({int(gib * 2**30)})"
        )
        self.documents = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the job, which decides what becomes of its documents
        )
        self._asked, self._answers = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)

    def convert(self, converter: str, data: bytes, encoding: str, seconds: float) -> Converted:
        """What a converter makes of a document.

        Raises DocumentError with what is wrong with it, and _ProcessEndedError if the process ended by itself.
        """
        self.documents += 1
        begin = time.monotonic()
        watch = threading.Timer(seconds + _GRACE_SECONDS, self._process.kill)
        watch.daemon = True
        watch.start()
        try:
            send(self._asked, _request(converter, encoding, seconds), data)
            header, text = receive(self._answers)
        except (EOFError, OSError):
            self.close()
            code = self._process.returncode
            if code == -signal.SIGALRM or time.monotonic() - begin > seconds:
                raise DocumentError(
                    f"it was not converted within {seconds:g} s; --conversion-seconds gives it more, or split the file"
                ) from None
            raise _ProcessEndedError(_ending(code)) from None
        finally:
            watch.cancel()
        if header.get("out_of_memory"):
            self.close()
            raise _OutOfMemoryError
        if "error" in header:
            raise DocumentError(header["error"])
        starts = header["page_starts"]
        return Converted(
            text.decode("utf-8", errors="surrogatepass"), None if starts is None else tuple(starts), header["note"]
        )

    @property
    def is_alive(self) -> bool:
        """Whether it can take a document."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._asked, self._answers):
            with contextlib.suppress(OSError):  # a message that was on its way
                stream.close()


def _request(converter: str, encoding: str, seconds: float) -> dict[str, object]:
    return {"converter": converter, "encoding": encoding, "seconds": seconds}


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


class Converters:
    """Converts documents, TOGETHER at a time; may be called from several threads. seconds, gib: limits of each."""

    def __init__(self, seconds: float, gib: float) -> None:
        self._seconds, self._gib = seconds, gib
        self._free = threading.Semaphore(TOGETHER)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []

    def convert(self, converter: str, data: bytes, encoding: str) -> Converted:
        """What the module `converter` makes of a document's bytes. Raises DocumentError with what is wrong with it.

        What ends a process that has had other documents before may be their doing: then a new one decides.
        """
        with self._free:
            for fresh in (False, True):
                try:
                    with self._process(fresh) as process:
                        return process.convert(converter, data, encoding, self._seconds)
                except _ProcessEndedError as error:
                    if process.documents == 1:
                        raise self._told(error) from None
        raise AssertionError("a new process has had one document")

    @contextlib.contextmanager
    def _process(self, fresh: bool) -> Iterator[_Process]:
        """A process, a new one or an idle one if there is any; it is kept if it can take another document."""
        with self._lock:
            idle = self._idle.pop() if self._idle and not fresh else None
        process = idle or _Process(self._gib)
        try:
            yield process
        except BaseException as error:
            if not isinstance(error, DocumentError):  # an interrupt, say: an answer may still be on its way
                process.close()
            raise
        finally:
            if process.is_alive and process.documents < MOST_DOCUMENTS:
                with self._lock:
                    self._idle.append(process)
            else:
                process.close()

    def _told(self, error: _ProcessEndedError) -> DocumentError:
        if isinstance(error, _OutOfMemoryError):
            return DocumentError(
                f"it needs more than {self._gib:g} GiB of memory to be converted; --conversion-memory gives it more"
            )
        return DocumentError(
            f"its parser crashed ({error}), as damaged files and too little memory make it; repair the file, or give "
            f"--conversion-memory more than {self._gib:g} GiB"
        )

    def close(self) -> None:
        """End the idle processes."""
        while self._idle:
            self._idle.pop().close()


@lru_cache(maxsize=8)
def _shared(seconds: float, gib: float, owner: int) -> Converters:
    made = Converters(seconds, gib)
    atexit.register(made.close)
    return made


def shared_converters(seconds: float, gib: float) -> Converters:
    """This process's converters with these limits; a fork of it has its own."""
    return _shared(seconds, gib, os.getpid())
