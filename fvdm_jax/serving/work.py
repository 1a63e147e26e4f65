"""A video that is being made, as what there is to show of it, bit by bit."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fvdm_jax.program import Refusal
from fvdm_jax.request import Request
from fvdm_jax.session import Session, Step, Video
from fvdm_jax.steps import calls

PREVIEW = 0.2
"""The part of the steps after which it is shown, once, what they are heading for."""

LIMIT = 3600.0
"""Seconds that one video may take."""


class Progress(NamedTuple):
    """Steps that are done, of how many, and with one of them a preview, uint8 [t H W 3]."""

    done: int
    total: int
    preview: np.ndarray | None = None


class _Left(Exception):
    """Nobody waits for the video any more."""


class Maker:
    """Makes videos beside the thread that shows them, until it is closed."""

    def __init__(self, session: Session):
        self._session, self._closed = session, threading.Event()
        self._worker: threading.Thread | None = None

    def shown(self, request: Request) -> Iterator[Progress | Video]:
        """Progress step by step, and at last the Video. Raises what making it raises.

        When the iterator is closed, the work ends after the step that is under way.
        """
        events: queue.SimpleQueue = queue.SimpleQueue()
        left, began, total = threading.Event(), time.monotonic(), sum(calls(request))
        at = max(1, round(PREVIEW * total))

        def look(step: Step) -> None:
            if left.is_set() or self._closed.is_set():
                raise _Left
            if time.monotonic() - began > LIMIT:
                what = f"makes videos for at most {LIMIT:.0f} seconds"
                raise Refusal("this page", what, "ask for fewer steps")
            due = step.count == at < total
            preview = self._session.pixels(request, np.asarray(step.latents())) if due else None
            events.put(Progress(step.count, total, preview))

        def work() -> None:
            try:
                if not left.is_set():
                    events.put(self._session.make(request, look))
            except Exception as failure:
                events.put(failure)

        self._worker = threading.Thread(target=work, daemon=True)
        self._worker.start()
        try:
            yield Progress(0, total)
            while True:
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Video):
                    return
        finally:
            left.set()

    def close(self) -> None:
        """Ends the work after the step that is under way: Python must not end before it."""
        self._closed.set()
        if self._worker:
            self._worker.join()
