"""What is known of a file of pictures, and the frames of a clip at another rate than its own."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from fvdm_jax.program import Refusal

MOST_PIXELS = 50_000_000
LEAST_SIDE = 16
INSTANT = 7.3e-4
"""Seconds by which clocks of files may have rounded; not whole milliseconds, so that no tick is close."""

LONGEST = 1e5
"""Seconds of the longest clip."""


class Media(NamedTuple):
    """What a file holds: `kind` is "image", "gif" (animated) or "video"; sides in pixels as shown.

    `span` is the time from the first frame to the last, in seconds.
    """

    kind: str
    format: str
    width: int
    height: int
    frames: int
    span: float = 0.0

    @property
    def rate(self) -> float:
        """Frames a second, on the average; of a single frame without end."""
        return (self.frames - 1) / self.span if self.span else math.inf

    def at(self, fps: float) -> int:
        """How many frames `pictures` gives at this rate."""
        return 1 + math.floor((self.span + INSTANT) * fps)


def at_rate(timed: Iterator, fps: float) -> Iterator:
    """Of (seconds, picture) the picture shown at each tick."""
    ticks, held, start, since = 0, None, None, 0.0
    for time, picture in timed:
        start = time if start is None else start
        since = max(since, round(time - start, 6))
        takes_over = math.ceil((since - INSTANT) * fps)
        for _ in range(ticks, takes_over):
            yield held
        ticks, held = max(ticks, takes_over), picture
    if held is None:
        return
    for _ in range(ticks, Media("", "", 0, 0, 0, since).at(fps)):
        yield held


def check_size(path, width: int, height: int) -> None:
    """Raises Refusal, named `path`, unless a picture of this size is neither too small nor too large."""
    if min(width, height) < LEAST_SIDE:
        raise Refusal(path, f"is {width}x{height} pixels", f"{LEAST_SIDE} pixels a side is the least")
    if width * height > MOST_PIXELS:
        raise Refusal(
            path, f"is {width}x{height} pixels", "50 million pixels is the most; scale it down first"
        )
