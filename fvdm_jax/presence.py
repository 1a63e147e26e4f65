"""Who works in a run's folder: one run at a time, and processes that see when another is no more.

Every process writes a count to a file of its own in the folder; that it changes is all that others look for,
so that nothing depends on clocks. The folder has to show within SILENCE what another host has written: a
bucket is to be mounted without a cache of metadata.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from fvdm_jax import stopping
from fvdm_jax.program import Refusal, alive, plain

OWNER, BEATS = "owner.json", "beats"
BEAT = 1.5
"""Seconds between the counts; a bucket's object may be written once a second."""
SILENCE = 16.0
"""Seconds without a count after which a process is taken for dead or hung: the others end within 20 s."""
STRANGE = 5.0
"""The same for the owner of a folder, on another host, that another run would have."""
AGAIN = 75
"""The exit code of a process whose run lost another one: start it again, it goes on."""


class Presence:
    """This process's place in a run's folder, from `take` to `leave`.

    `number` of `count` processes. Where another one of the run falls silent, or another run takes the
    folder, the process says so and ends, with AGAIN or 2: it could do nothing but wait for ever.
    """

    def __init__(self, folder: Path, number: int = 0, count: int = 1):
        self._folder, self._number, self._count = folder, number, count
        self._token = secrets.token_hex(8)
        self._done = threading.Event()
        self._doing, self._silent = "the start", False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def take(self, takeover: bool = False) -> None:
        """Makes the folder this run's. Raises Refusal where another run has it, unless with `takeover`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        owner = self._folder / OWNER
        if not takeover and (held := _read(owner)) and self._lives(held):
            raise _in_use(self._folder, held)
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        told = {"token": self._token, "host": socket.gethostname(), "process": os.getpid(), "since": since}
        with contextlib.suppress(FileNotFoundError):
            # Of two that find a dead owner at once, the first sees the other's name there, and ends.
            owner.unlink()
        draft = owner.with_name(f".{OWNER}-{self._token}")
        draft.write_text(json.dumps(told | {"born": _born(os.getpid())}), "utf-8")
        try:
            os.link(draft, owner)
        except FileExistsError:
            raise Refusal("--out", f"{self._folder} was taken this moment by another run") from None
        except OSError:
            # Mounted buckets have no links.
            os.replace(draft, owner)
        finally:
            draft.unlink(missing_ok=True)

    def join(self) -> None:
        """Begins to be seen, and to look after the others."""
        (self._folder / BEATS).mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def doing(self, what: str) -> None:
        """What a process that ends says it was doing: "step 7"."""
        self._doing = what

    def leave(self, silent: bool = False) -> None:
        """Another run may have the folder; others need not wait for this process, unless `silent`."""
        self._silent = silent
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(5)
        if self._number == 0 and (_read(self._folder / OWNER) or {}).get("token") == self._token:
            (self._folder / OWNER).unlink(missing_ok=True)

    def _lives(self, held: dict) -> bool:
        if held["host"] == socket.gethostname():
            return _here(held)
        beats = self._folder / BEATS / "0"
        first, until = _content(beats), time.monotonic() + STRANGE
        while time.monotonic() < until:
            time.sleep(BEAT)
            if _content(beats) not in (first, "left"):
                return True
        return False

    def _watch(self) -> None:
        mine, seen, turn = self._folder / BEATS / str(self._number), {}, 0
        others = range(1, self._count) if self._number == 0 else range(min(1, self._count - 1))
        while not self._done.wait(BEAT):
            turn += 1
            with contextlib.suppress(OSError):
                mine.write_text(f"{self._token} {turn}", "utf-8")
            if self._number == 0:
                self._check_owner()
            now = time.monotonic()
            for other in others:
                content = _content(self._folder / BEATS / str(other))
                before, since = seen.setdefault(other, (content, None))
                if content != before or content == "left":
                    seen[other] = content, now
                # One that has not begun to count is waited for; what an earlier run left does not count.
                elif since is not None and now - since > SILENCE:
                    what = f"process {other} of {self._count} has not been heard of for {SILENCE:.0f} s"
                    _end(f"error: {what}, at {self._doing}; start the run again, it goes on", AGAIN)
        if not self._silent:
            with contextlib.suppress(OSError):
                mine.write_text("left", "utf-8")

    def _check_owner(self) -> None:
        held = _read(self._folder / OWNER)
        if held and held["token"] != self._token:
            _end(f"error: --out: {self._folder} was taken over by process {held['process']}", 2)


def glance(argv: Sequence[str]) -> None:
    """Raises Refusal where a command line's --out is in use on this host: at once, before jax is there."""
    if {"--takeover", "--plan", "--export", "--replay", "--host"} & set(argv):
        return
    for folder in (Path(argv[i + 1]) for i, word in enumerate(argv[:-1]) if word == "--out"):
        held = _read(folder / OWNER)
        if held and held["host"] == socket.gethostname() and _here(held):
            raise _in_use(folder, held)


def _here(held: dict) -> bool:
    """Whether an owner on this host is still there."""
    return alive(held["process"]) and _born(held["process"]) == held["born"]


def _in_use(folder: Path, held: dict) -> Refusal:
    what = f"is in use by process {held['process']} on {held['host']}, since {held['since']}"
    return Refusal("--out", f"{folder} {what}", "give another one, or --takeover to end that run")


def _end(line: str, code: int) -> None:
    sys.stderr.flush()
    os.write(2, f"{plain(line, 600)}\n".encode())
    stopping.end(code)


def _content(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""


def _read(path: Path) -> dict | None:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict) and {"token", "host", "process", "since", "born"} <= found.keys():
            return found
    return None


def _born(process: int) -> str | None:
    """When a process of this host began, by its kernel's count; None where that is not told."""
    try:
        told = Path(f"/proc/{int(process)}/stat").read_text()
    except (OSError, ValueError):
        return None
    return told.rpartition(")")[2].split()[19]
