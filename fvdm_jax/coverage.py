"""How near a training draw comes to the levels that each task meets while it is sampled."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fvdm_jax import schedule, tasks
from fvdm_jax.levels import Draw
from fvdm_jax.shapes import Levels, Schedule

DRAWS = 4096
WITHIN = 0.1
"""A draw is near a task if no frame's level is further than this from some vector of the task's path."""

NOTES = (
    "distance: of the frame furthest from the nearest levels on the task's path;",
    f"a clip whose levels are all below {WITHIN} is near the end of every path",
)

TASKS = (
    *("text_to_video", "image_to_video", "start_end", "extension", "completion", "transition"),
    *("autoregressive", "rolling"),
)


class Nearness(NamedTuple):
    """The share of draws that are near a task, and the median of their distances from its path."""

    share: float
    median: float


def paths(frames: int) -> dict[str, Schedule]:
    """The levels [s f] of each task that leaves something to generate, in steps of at most 0.02.

    One frame is given at an end, a third of the clip where clips are, and of a completion every fourth frame,
    all kept exactly. "autoregressive" makes one frame after the other, "rolling" starts each a little later.
    """
    every = dict(zip(TASKS, _paths(frames), strict=True))
    return {name: rows for name, rows in every.items() if np.any(rows)}


@partial(jax.jit, static_argnums=0)
def _paths(frames: int) -> list[Schedule]:
    shape, third = (1, frames, 1, 1, 1), max(1, frames // 3)
    one, part = (jnp.zeros((1, count, 1, 1, 1)) for count in (1, third))
    given = (
        tasks.text_to_video(shape),
        tasks.image_to_video(shape, one),
        tasks.start_end(shape, one, one),
        tasks.extension(shape, part),
        tasks.completion(shape, dict.fromkeys(range(0, frames, 4), one)),
        tasks.transition(shape, part, part),
    )
    # Evenly from 1 to 0: how long a sampler stays where does not matter here.
    even = partial(schedule.pusa, shift=1.0)
    lag, generated = -(-50 // frames), given[0].strength
    return [schedule.schedule(even(100), task.strength) for task in given] + [
        schedule.schedule(even(50), generated, 50 * np.arange(frames)),
        schedule.schedule(even(lag * frames), generated, lag * np.arange(frames)),
    ]


@jax.jit
def distances(levels: Levels, path: Schedule) -> Float[Array, "b"]:
    """From each clip's levels to the nearest row of the path, as the largest difference of any frame."""

    def nearer(least: Array, row: Array) -> tuple[Array, None]:
        return jnp.minimum(least, jnp.abs(levels.T - row[:, None]).max(0)), None

    return jax.lax.scan(nearer, jnp.full(len(levels), jnp.inf), path)[0]


def coverage(draw: Draw, frames: int, seed: int = 0) -> dict[str, Nearness]:
    """How near DRAWS clips of the draw come to each task of `paths`; the same for the same seed."""
    levels = jax.jit(draw, static_argnums=(1, 2))(jax.random.key(seed), DRAWS, frames)
    every = {name: np.asarray(distances(levels, path)) for name, path in paths(frames).items()}
    return {name: Nearness(float(np.mean(d <= WITHIN)), float(np.median(d))) for name, d in every.items()}


def report(draw: Draw, frames: int, seed: int = 0) -> str:
    """`coverage` as a table of plain text, at most 80 columns wide."""
    lines = [f"{DRAWS} draws of {frames} frames", f"{'task':16}{f'within {WITHIN}':>12}{'median':>9}"]
    for name, near in coverage(draw, frames, seed).items():
        lines.append(f"{name:16}{near.share:12.1%}{near.median:9.3f}")
    return "\n".join([*lines, *NOTES])
