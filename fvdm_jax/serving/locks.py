"""What keeps the page to itself: folders of its own, an empty place to stand in, one address, one port."""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.program import Refusal

HOST = "127.0.0.1"
"""This machine alone; there is no way to ask for another address."""


class Rooms(NamedTuple):
    """Folders that only this user can enter: what is uploaded, and what is made."""

    uploads: Path
    made: Path


def hush() -> None:
    """Nothing is told to anybody, or asked of them; before gradio is imported, which reads it then."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }


@contextlib.contextmanager
def rooms() -> Iterator[Rooms]:
    """The process stands in an empty folder of its own, and gradio keeps to folders beside it; then all goes.

    Of the environment nothing tells gradio to share, to listen elsewhere or to serve further folders.
    """
    before, mask, around = Path.cwd(), os.umask(0o077), dict(os.environ)
    home = Path(os.path.realpath(tempfile.mkdtemp(prefix="fvdm-serve-")))
    empty, uploads, made = (home / name for name in ("empty", "uploads", "made"))
    for folder in (empty, uploads, made):
        folder.mkdir()
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    hush()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    # What a function returns may lie in the system's folder of temporary files, so that is ours too.
    tempfile.tempdir = str(made)
    os.chdir(empty)
    try:
        yield Rooms(uploads, made)
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ |= around
        tempfile.tempdir = None
        os.umask(mask)
        shutil.rmtree(home, ignore_errors=True)


def check_port(port: int) -> None:
    """Raises Refusal unless the page can listen there."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as failure:
            what = f"{port} cannot be listened on: {failure.strerror}"
            raise Refusal("--port", what, "give another, from 1024 to 65535") from failure
