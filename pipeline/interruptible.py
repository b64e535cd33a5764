"""Calls of other machines that leave this one able to answer.

Native code that waits for a network lets no signal through, so that a Ctrl-C or SIGTERM would wait with it; who waits
for a thread hears them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_left: list[threading.Thread] = []


def interruptible(remote: bool, call: Callable[..., T], *arguments: Any) -> T:
    """call(*arguments), in a thread of its own if it is `remote` and this is the thread that gets the signals."""
    if not remote or threading.current_thread() is not threading.main_thread():
        return call(*arguments)
    result: Future[T] = Future()
    thread = threading.Thread(target=_run, args=(result, call, arguments), name="remote", daemon=True)
    _left.append(thread)  # before it starts: an interruption may come in start()
    try:
        thread.start()
        return result.result()
    finally:
        if result.done():
            _left.remove(thread)


def left_behind() -> bool:
    """Whether calls that were interrupted still wait for an answer; they would keep the process from ending."""
    return any(thread.is_alive() for thread in _left)


def stop_signals() -> list[int]:
    """The signals that ask a job to stop; a terminal that closes does so, too, unless nohup keeps it out."""
    hung_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGINT, *hung_up]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, nobody hears the signals that ask to stop: for what ends a job, which half done leaves a crash behind."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in stop_signals()} if here else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(result: Future[T], call: Callable[..., T], arguments: tuple[Any, ...]) -> None:
    try:
        result.set_result(call(*arguments))
    except BaseException as error:
        result.set_exception(error)
