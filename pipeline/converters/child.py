"""The process that converts: takes documents from its standard input, one after the other, until that is closed.

It limits itself, so that no document outlives its time though whoever asked has died: the kernel ends the process at
its alarm, whatever a parser is doing.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
from typing import BinaryIO

from pipeline.converters.protocol import MOST_BYTES, ConversionError, Converted, receive, send


def main(memory_bytes: int) -> None:
    """Convert what comes. memory_bytes: most address space of this process."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no parser has any business writing files
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    asked = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what parsers print is no answer
    try:
        while _serve(asked, answers):
            pass
    except (EOFError, BrokenPipeError):
        pass
    os._exit(0)  # no library's clean-up stands in the way


def _serve(asked: BinaryIO, answers: BinaryIO) -> bool:
    """Answer one request; whether this process can take another one."""
    header, data = receive(asked)
    signal.setitimer(signal.ITIMER_REAL, header["seconds"])
    error = ""
    try:
        converted = _convert(header["converter"], data, header["encoding"])
        text = converted.text.encode("utf-8", errors="surrogatepass")
        del data
    except MemoryError:
        error, out_of_memory = "out of memory", True
    except ConversionError as raised:
        error, out_of_memory = str(raised), False
    except RecursionError:
        error, out_of_memory = "its elements are nested too deeply", False
    except Exception as raised:  # parsers raise what they like
        error, out_of_memory = f"it cannot be read: {type(raised).__name__}: {raised}", False
    signal.setitimer(signal.ITIMER_REAL, 0)
    if error:
        send(answers, {"error": error, "out_of_memory": out_of_memory}, b"")
        return not out_of_memory
    send(answers, {"page_starts": converted.page_starts, "note": converted.note}, text)
    return True


def _convert(converter: str, data: bytes, encoding: str) -> Converted:
    converted = importlib.import_module(converter).convert(data, encoding)
    if len(converted.text) > MOST_BYTES:
        raise ConversionError(f"its text has more than {MOST_BYTES:,} characters; no more are read")
    return converted
