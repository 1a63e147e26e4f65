"""Named inference schedules: in which order, and how far apart, the frames of a clip become clean.

Each is a function (frames, steps, options) → Progress: after every call of the network, how many of its
`steps` each frame has done. A matrix of levels follows by looking these up in the levels of one frame. Only
frames that are generated are counted; what is kept is clean from the beginning.
"""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Progress = Int[np.ndarray, "s f"]
"""Steps that each frame has done, of as many as one frame takes: 0 in the first row, all in the last."""

Matrix = Float[np.ndarray, "s f"]
"""A Schedule, on the host."""


def delayed(delay: Sequence[int] | np.ndarray, steps: int) -> Progress:
    """Every frame takes a step at each call, the first after waiting for `delay` [f] calls."""
    delay = np.asarray(delay, int)
    return np.clip(np.arange(steps + delay.max(initial=0) + 1)[:, None] - delay, 0, steps)


def together(frames: int, steps: int) -> Progress:
    """All frames at the same level: ordinary video diffusion."""
    return delayed(np.zeros(frames), steps)


def pyramid(frames: int, steps: int, lag: float = 1.0) -> Progress:
    """Each frame `lag` steps behind the one before it, rounded downwards over the clip.

    Source: Diffusion Forcing (arXiv 2407.01392), whose uncertainty scale is the lag.
    """
    return delayed(np.floor(lag * np.arange(frames) + 1e-9), steps)


def trapezoid(frames: int, steps: int, lag: float = 1.0) -> Progress:
    """From both ends inwards, each frame `lag` steps behind its outer neighbour.

    Source: Diffusion Forcing, where the last frame is by one frame later than the first.
    """
    ends = np.minimum(np.arange(frames), np.arange(frames)[::-1])
    return delayed(np.floor(lag * ends + 1e-9), steps)


def autoregressive(frames: int, steps: int, block: int = 1, first: int | None = None) -> Progress:
    """A block of frames begins when the one before it is clean; the first has `first`, or as many as others.

    With `first` 1 and a `block` of all others text-to-video is text-to-image, of the first latent frame, with
    image-to-video after it.
    """
    behind = np.arange(frames) - (block if first is None else first)
    return delayed(steps * np.maximum(behind // block + 1, 0), steps)


def ad(frames: int, steps: int, lag: int = 5, block: int = 1) -> Progress:
    """Each block `lag` steps behind the one before it, or all of `steps` where that is less.

    Source: AD(s) of AR-Diffusion (arXiv 2503.07418), s the lag; SkyReels-V2 (arXiv 2504.13074) with blocks.
    """
    return delayed(min(lag, steps) * (np.arange(frames) // block), steps)


def chunks(frames: int, steps: int, chunk: int = 6, flight: int = 4) -> Progress:
    """Chunks of frames of which `flight` are under way at a time: MAGI-1 (arXiv 2505.13211) has 4 of 6."""
    return delayed(math.ceil(steps / flight) * (np.arange(frames) // chunk), steps)


def rolling(frames: int, steps: int, window: int = 4) -> Progress:
    """As a queue of `window` frames at levels evenly apart, of which the first leaves clean as one enters.

    Source: Rolling Diffusion (arXiv 2402.09470), FIFO-Diffusion (arXiv 2405.11473).
    """
    return delayed(np.arange(frames) * steps // window, steps)


def lattice(frames: int, steps: int, block: int = 1) -> Progress:
    """Block after block takes its first step, then block after block its second, and so on.

    A block at a step sees those before it a step further: HiAR (arXiv 2603.08703).
    """
    blocks = np.arange(frames) // block
    count = blocks[-1] + 1
    calls = np.arange(steps * count + 1)[:, None]
    return np.clip((calls + count - 1 - blocks) // count, 0, steps)


def random(frames: int, steps: int, seed: int = 0, lag: int | None = None) -> Progress:
    """Frames in an order drawn by the seed, each `lag` steps after another; by default one by one."""
    order = np.random.default_rng(seed).permutation(frames)
    return delayed((steps if lag is None else lag) * order, steps)


def budget(frames: int, steps: int, last: int = 1) -> Progress:
    """All begin and end together, but frames towards the end take fewer, larger steps, down to `last`.

    Frame f takes n of them, evenly over the calls; in between it waits.
    """
    own = np.rint(np.linspace(steps, min(last, steps), frames)).astype(int)
    taken = np.arange(steps + 1)[:, None] * own // steps
    return taken * steps // own


ZOO: dict[str, Callable[..., Progress]] = {
    "together": together,
    "pyramid": pyramid,
    "trapezoid": trapezoid,
    "autoregressive": autoregressive,
    "ad": ad,
    "chunks": chunks,
    "rolling": rolling,
    "lattice": lattice,
    "random": random,
    "budget": budget,
}
"""The schedules by name."""


def progress(text: str, frames: int, steps: int) -> Progress:
    """The Progress of the schedule that NAME[:option=number,…] names. Raises ValueError, as `check`."""
    name, options = parsed(text)
    return ZOO[name](frames, steps, **options)


def parsed(text: str) -> tuple[str, dict[str, float]]:
    """Name and options of NAME[:option=number,…]. Raises ValueError, which says what would be right."""
    name, colon, tail = text.partition(":")
    if name not in ZOO:
        raise ValueError(f"{name!r} is no schedule; give {', '.join(ZOO)}, or a file.json with a matrix")
    known = dict(list(inspect.signature(ZOO[name]).parameters.items())[2:])
    options = {}
    for part in tail.split(",") if colon else ():
        key, _, value = part.partition("=")
        if key not in known:
            right = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{name} has no option {key!r}; {right}")
        options[key] = _number(name, key, value, whole=known[key].annotation is not float)
    return name, options


def _number(name: str, key: str, value: str, whole: bool) -> float:
    try:
        number = int(value) if whole else float(value)
    except ValueError:
        number = -1
    least = 0 if key in ("seed", "lag") else 1
    if not least <= number <= 10_000:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{key} of {name} is {value!r}; give {kind} from {least}")
    return number


def levels(
    text: str, sigmas: np.ndarray, strength: Sequence[float], settled: Sequence[float] | None = None
) -> Matrix:
    """Levels [s f], float32: strength [f] · what the schedule that `text` names makes of `sigmas`.

    Where `settled` [f] is given a frame's strength goes there, evenly over its own steps; a level that would
    rise by that stays as it is. A frame of strength 0 is clean throughout, and no part of the order of the
    others. `text` may be a .json file of a matrix for all frames, which takes the place of `sigmas` too.
    Steps at which only kept frames would have moved, or at which every frame waits, are left out. Raises
    ValueError where there is no such schedule, or it fails `check`.
    """
    strength = np.asarray(strength, np.float32)
    if not text.endswith(".json"):
        rows, moving = np.zeros((1, len(strength)), np.float32), strength > 0
        if not moving.any():
            return rows
        done = _busy(progress(text, int(moving.sum()), len(sigmas) - 1))
        rows = np.repeat(rows, len(done), 0)
        now = strength[moving]
        if settled is not None:
            now = now + (np.asarray(settled, np.float32)[moving] - now) * (done / (len(sigmas) - 1))
        rows[:, moving] = now * np.asarray(sigmas, np.float32)[done]
        return np.minimum.accumulate(rows)
    rows = _busy(strength * read(Path(text), len(strength)))
    check(rows)
    return rows


def _busy(rows: np.ndarray) -> np.ndarray:
    """The rows [s f] without those that are like the one before."""
    return rows[np.append(True, np.any(np.diff(rows, axis=0) != 0, axis=1))]


def read(path: Path, frames: int) -> Matrix:
    """The matrix in a JSON file: a list of rows of levels, one for each frame. Raises ValueError."""
    try:
        rows = np.array(json.loads(path.read_text("utf-8")), np.float32)
    except OSError as failure:
        raise ValueError(f"{path} cannot be read: {failure.strerror}") from failure
    except (TypeError, ValueError, RecursionError) as wrong:
        raise ValueError(f"{path} is no list of rows of numbers, all of one length") from wrong
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != frames:
        raise ValueError(f"{path} has {list(rows.shape)} levels; give rows of {frames}, one for each frame")
    return rows


class Cost(NamedTuple):
    """What a schedule takes: calls of the network, and how many frames are under way at once at most."""

    calls: int
    under_way: int


def check(rows: Matrix) -> Cost:
    """What the schedule [s f] takes. Raises ValueError, with the reason, where it cannot be sampled:

    levels outside 0 … 1, that rise, or do not end clean, or a step at which nothing moves.
    """
    if not np.all((rows >= 0) & (rows <= 1)):
        raise ValueError("has levels outside 0 … 1")
    falls = np.diff(rows, axis=0)
    if np.any(falls > 0):
        row, frame = np.argwhere(falls > 0)[0]
        raise ValueError(f"rises at step {row + 1} for frame {frame}; levels may only fall")
    if np.any(rows[-1]):
        frame = np.flatnonzero(rows[-1])[0]
        raise ValueError(f"leaves frame {frame} at {rows[-1, frame]:g}; end with a row of 0")
    if still := np.flatnonzero(~np.any(falls < 0, axis=1)).tolist():
        raise ValueError(f"moves no frame at step {still[0] + 1}; leave that row out")
    begun = (rows < rows[0]) & (rows > 0)
    return Cost(len(falls), int(begun.sum(1).max(initial=0)))
