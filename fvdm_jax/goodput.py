"""Where a run's time goes: seconds by what was done in them, which add up to the time on the clock."""

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

LEDGER = "goodput.jsonl"
START, STEP = "start", "step"


class Ledger:
    """Counts the time since it was made: the start's, after `began` the steps', but for what is `doing`."""

    def __init__(self):
        self._spent: dict[str, float] = {}
        self._stack = [START]
        self._last = time.monotonic()
        self._name = secrets.token_hex(4)

    def began(self) -> None:
        """What comes now are steps."""
        self._count()
        self._stack[0] = STEP

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """The time within is spent on this, and on nothing around it."""
        self._count()
        self._stack.append(what)
        try:
            yield
        finally:
            self._count()
            self._stack.pop()

    def _count(self) -> None:
        now = time.monotonic()
        self._spent[self._stack[-1]] = self._spent.get(self._stack[-1], 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds so far, by what was done."""
        self._count()
        return dict(self._spent)

    def write(self, folder: Path, step: int, lost: tuple[int, float]) -> None:
        """Adds a line of all so far: of a process that is killed, its last line stands.

        `lost`: the steps that an earlier process had made after its last checkpoint, and their seconds.
        """
        told = {"process": self._name, "step": step, "seconds": self.seconds()}
        told |= {"lost_steps": lost[0], "lost_seconds": lost[1]}
        with contextlib.suppress(OSError), open(folder / LEDGER, "a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")


def goodput(folder: Path) -> dict[str, float]:
    """Seconds by what was done, of all processes of a run, and `goodput`, the share of kept steps."""
    last = {}
    with open(folder / LEDGER, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                last[told["process"]] = told
    spent: dict[str, float] = {}
    for told in last.values():
        for what, seconds in told["seconds"].items():
            spent[what] = spent.get(what, 0.0) + seconds
    lost = sum(told["lost_seconds"] for told in last.values())
    # A process that is killed has written its line with its last checkpoint: what is lost is in none.
    return spent | {"lost": lost, "goodput": spent.get(STEP, 0.0) / max(sum(spent.values()) + lost, 1e-9)}
