"""Tasks: which frames are given, and how loosely they are kept.

A task is a canvas and a strength per frame. Nothing below this file knows which task it is.
"""

import operator
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvdm_jax.shapes import Latents, Strength


class Task(NamedTuple):
    """A clip to be made: what is given on the `canvas` [b f h w c], and the `strength` [f] of each frame."""

    canvas: Latents
    strength: Strength

    def keep(self, clip: Latents, at: int, strength: float = 0.0) -> "Task":
        """The task with `clip` [b k h w c] given from latent frame `at` on (negative: from the end).

        strength 0 keeps them bit for bit, 1 ignores them, between they are noised by as much and redrawn;
        it may be one number or [k], and frames given twice take the later. `at` is static, the rest may be
        traced. Raises ValueError where the clip does not fit the canvas or a strength is outside 0 … 1.
        """
        (b, f, *rest), k = self.canvas.shape, clip.shape[1]
        if clip.shape != (b, k, *rest):
            raise ValueError(
                f"the clip is {clip.shape} and the canvas {self.canvas.shape}; only frames may differ"
            )
        start = operator.index(at) + (f if at < 0 else 0)
        if not 0 <= start <= f - k:
            raise ValueError(f"{k} frames from {at} on do not fit a canvas of {f} frames")
        if not isinstance(strength, jax.core.Tracer) and not np.all(
            np.abs(np.asarray(strength) - 0.5) <= 0.5
        ):
            raise ValueError(f"strength is {strength}; give 0 (keep) to 1 (generate)")
        frames, loose = slice(start, start + k), jnp.broadcast_to(jnp.float32(strength), (k,))
        # The path starts just below pure noise, so a clip to be ignored must not be on the canvas either.
        given = jnp.where(loose[None, :, None, None, None] < 1, clip, 0)
        return Task(
            self.canvas.at[:, frames].set(given.astype(self.canvas.dtype)),
            self.strength.at[frames].set(loose),
        )


def text_to_video(shape: tuple[int, int, int, int, int]) -> Task:
    """The task in which nothing is given: every frame of a clip of this shape [b f h w c] is generated."""
    return Task(jnp.zeros(shape, jnp.float32), jnp.ones(shape[1], jnp.float32))


def image_to_video(shape: tuple[int, ...], image: Latents, strength: float = 0.0) -> Task:
    """The first frame [b 1 h w c] is given."""
    return text_to_video(shape).keep(image, at=0, strength=strength)


def start_end(shape: tuple[int, ...], start: Latents, end: Latents, strength: float = 0.0) -> Task:
    """The first and the last frame [b 1 h w c] are given."""
    return image_to_video(shape, start, strength).keep(end, at=-1, strength=strength)


def extension(shape: tuple[int, ...], clip: Latents, strength: float = 0.0) -> Task:
    """The first k frames [b k h w c] are given, what follows is generated."""
    return text_to_video(shape).keep(clip, at=0, strength=strength)


def completion(shape: tuple[int, ...], clips: Mapping[int, Latents], strength: float = 0.0) -> Task:
    """Any set of frames is given: clips [b k h w c] by the frame at which each starts."""
    task = text_to_video(shape)
    for at, clip in clips.items():
        task = task.keep(clip, at, strength)
    return task


def transition(shape: tuple[int, ...], head: Latents, tail: Latents, strength: float = 0.0) -> Task:
    """A clip [b k h w c] at either end is given, the way from one to the other is generated."""
    return extension(shape, head, strength).keep(tail, at=-tail.shape[1], strength=strength)
