"""One process of a host at a time makes an output: by a lock beside it, which ends with its process."""

import contextlib
import os
import re
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Not on Windows.
    fcntl = None


HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
"""This host, in the names of what its processes leave where others work too."""


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Around the making of `target`. Raises BlockingIOError where another process makes it.

    Where there can be no lock, whoever is done first has the name.
    """
    path = target.with_name(f".fvdm-{HOST}-{zlib.crc32(os.fsencode(target.name)):08x}.lock")
    held = _locked(path)
    try:
        yield
    finally:
        _release(path, held)


def sweep(folder: Path, names: list[str]) -> None:
    """Removes those of `names` in a folder that are locks of this host and that no process holds any more."""
    for name in names:
        if fcntl and re.fullmatch(rf"\.fvdm-{HOST}-[0-9a-f]{{8}}\.lock", name):
            with contextlib.suppress(BlockingIOError):
                _release(folder / name, _locked(folder / name, patience=0))


def _release(path: Path, held: int | None) -> None:
    if held is not None:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(held)


def _locked(path: Path, patience: float = 0.1) -> int | None:
    """A descriptor that has the lock, None where there is none to be had.

    Raises BlockingIOError where another process holds it for longer than `patience`, in seconds: a sweep does
    for an instant.
    """
    end = time.monotonic() + patience
    while True:
        try:
            held = os.open(path, os.O_RDWR | os.O_CREAT)
        except OSError:
            return None
        try:
            if fcntl:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(held), os.stat(path)):
                return held
        except FileNotFoundError:
            # It was removed before it was locked.
            pass
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(held)
                raise
            time.sleep(patience / 10)
        except OSError:
            # A mount without locks.
            return held
        os.close(held)
