"""Programs that do the same work take turns in one process, and what each turn took of it."""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

Work = Callable[[], object]

SHORT = "RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory"
"""What XLA and torch say where memory is short."""
LEAST = 0.2
"""Seconds of a turn; the processor's time comes in hundredths."""


class Turn(NamedTuple):
    """What one turn took, in seconds: of the clock, and of the processors for itself and for the kernel."""

    clock: float
    user: float
    system: float

    @property
    def processor(self) -> float:
        return self.user + self.system


class Side(NamedTuple):
    """What each turn of a side took, or in `note` why there are none."""

    turns: list[Turn]
    note: str = ""


def race(starts: dict[str, Callable[[], Work]], turns: int) -> dict[str, Side]:
    """What each side took at each of its turns, one after the other, after one that is not counted.

    Each of `starts` allocates what a side needs, and gives its work, which waits for its end. A side that
    runs out of memory leaves the race.
    """
    works, taken, notes = {}, {name: [] for name in starts}, {}
    for turn in range(1 + turns):
        for name in [name for name in starts if name not in notes]:
            try:
                with limited():
                    if not turn:
                        works[name] = starts[name]()
                    taken[name].append(timed(works[name]))
            except MemoryError:
                notes[name], taken[name] = "ran out of memory", []
                works.pop(name, None)
                gc.collect()
    return {name: Side(every[1:], notes.get(name, "")) for name, every in taken.items()}


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Turns XLA's and torch's ways to say that memory is short into MemoryError."""
    try:
        yield
    except RuntimeError as failure:
        if not any(short in str(failure) for short in SHORT):
            raise
        raise MemoryError(str(failure)) from failure


def timed(work: Work) -> Turn:
    """What it takes to do the work once, the mean of as many times as fill LEAST."""
    clock, before, count = time.perf_counter(), os.times(), 0
    while not count or time.perf_counter() - clock < LEAST:
        work()
        count += 1
    clock, after = time.perf_counter() - clock, os.times()
    return Turn(clock / count, (after.user - before.user) / count, (after.system - before.system) / count)


def summary(side: Side, operations: float) -> dict:
    """What a side took for so many operations, as JSON has it."""
    if not side.turns:
        return {"note": side.note}
    clock = [turn.clock for turn in side.turns]
    return {
        "seconds": {"median": statistics.median(clock), "min": min(clock), "max": max(clock)},
        "processor": {kind: _middle(side, kind) for kind in ("user", "system")},
        "operations_per_second": operations / statistics.median(clock),
        "turns": [turn._asdict() for turn in side.turns],
    }


def ratio(ours: Side, theirs: Side) -> dict[str, float] | None:
    """Ours to theirs, below 1 where ours is faster; None where not both had turns."""
    if not ours.turns or not theirs.turns:
        return None
    kinds = {"seconds": "clock", "processor": "processor"}
    return {name: _middle(ours, kind) / max(_middle(theirs, kind), 1e-9) for name, kind in kinds.items()}


def _middle(side: Side, kind: str) -> float:
    return statistics.median(getattr(turn, kind) for turn in side.turns)
