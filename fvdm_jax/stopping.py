"""Ctrl-C and SIGTERM: they end a program wherever it is, or are noted where it would save its work first."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

GRACE = 2.0
"""Seconds that Python is given to stop by itself after Ctrl-C before the process is ended from outside."""

TERMINATED = 128 + signal.SIGTERM


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM end the process also where Python does not run, as in a compiled loop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(reader, done), daemon=True)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = signal.signal(signal.SIGTERM, _terminated)
    said, sys.unraisablehook = sys.unraisablehook, _unless_stopped(sys.unraisablehook)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        sys.unraisablehook = said
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(previous)
        writer.close()
        watcher.join(1.0)
        reader.close()


def _unless_stopped(say: Callable) -> Callable:
    """`say`, but not of a stop that cannot be raised where it came, as in a callback: the watcher acts."""

    def hook(told) -> None:
        if not issubclass(told.exc_type, KeyboardInterrupt | SystemExit):
            say(told)

    return hook


def end(code: int) -> NoReturn:
    """Ends the process where it stands, and its children, whom nobody would end then."""
    if pool := sys.modules.get("multiprocessing"):
        for child in pool.active_children():
            child.kill()
    os._exit(code)


def _terminated(number: int, frame) -> NoReturn:
    """Ends the process as Ctrl-C does, so that nothing half-written stays."""
    print("stopped", file=sys.stderr)
    raise SystemExit(TERMINATED)


_spared: list[int] = []
"""Signals that `deferred` will act on, of which the watcher below takes no notice."""


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Within it the first Ctrl-C or SIGTERM is only noted, a second one ends the program as ever.

    It gives a function that returns the exit code that the noted one asks for, or 0.
    """
    noted, before = [], {}

    def note(number: int, frame) -> None:
        noted.append(number)
        os.write(2, b"stopping after this step; once more to stop at once\n")
        for each, handler in before.items():
            signal.signal(each, handler)

    if threading.current_thread() is threading.main_thread():
        _spared[:] = [1]
        before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        for each in before:
            signal.signal(each, note)
    try:
        yield lambda: 128 + noted[0] if noted else 0
    finally:
        _spared.clear()
        for each, handler in before.items():
            signal.signal(each, handler)


def _watch(reader: socket.socket, done: threading.Event) -> None:
    while received := reader.recv(1):
        if received[0] in (signal.SIGINT, signal.SIGTERM):
            if _spared:
                _spared.clear()
                continue
            if done.wait(GRACE):
                continue
            # Past every object of Python that a lock may guard; the progress display had hidden the cursor.
            os.write(2, (b"\x1b[?25h" if os.isatty(2) else b"") + b"stopped\n")
            end(130 if received[0] == signal.SIGINT else TERMINATED)
