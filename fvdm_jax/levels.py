"""Training draws: functions (key, batch, frames) → levels [b f], each clip drawn by a key of its own.

Whichever the draw, clip i gets the same levels in a batch of any size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fvdm_jax.shapes import Levels

Draw = Callable[[jax.Array, int, int], Levels]


def _keys(key: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(lambda clip: jax.random.fold_in(key, clip))(jnp.arange(batch))


def scalar(key: jax.Array, batch: int, frames: int) -> Levels:
    """One level for all frames of a clip, uniform in [0, 1): ordinary video diffusion."""
    levels = jax.vmap(lambda clip: jax.random.uniform(clip, (1,)))(_keys(key, batch))
    return jnp.broadcast_to(levels, (batch, frames))


def per_frame(key: jax.Array, batch: int, frames: int) -> Levels:
    """A level for each frame, independent and uniform in [0, 1).

    Pusa's way (arXiv 2507.16116) once shifted by 5; there they are of a grid of 1000, rounded to bfloat16.
    """
    return jax.vmap(lambda clip: jax.random.uniform(clip, (frames,)))(_keys(key, batch))


def ptss(key: jax.Array, batch: int, frames: int, probability: float = 0.2, coin: str = "clip") -> Levels:
    """With this probability `per_frame`, otherwise `scalar`: FVDM's probabilistic timestep sampling.

    coin "clip" tosses for each clip; "batch" tosses once for all, as FVDM's code does, which has the same
    mean and noisier gradients. Raises ValueError for any other coin. Source: arXiv 2410.03160; there the
    levels are the 1000 discrete ones. From scratch a small probability is best; when tuning a model that
    already knows equal levels, 1 is.
    """
    if coin not in ("clip", "batch"):
        raise ValueError(f"coin is {coin!r}; give 'clip' or 'batch'")
    toss, together, apart = jax.random.split(key, 3)
    tosses = _keys(toss, batch) if coin == "clip" else toss[None]
    asynchronous = jax.vmap(lambda one: jax.random.bernoulli(one, probability, (1,)))(tosses)
    return jnp.where(asynchronous, per_frame(apart, batch, frames), scalar(together, batch, frames))


def shifted(draw: Draw, shift: float) -> Draw:
    """The draw with every level u moved to shift·u/(1 + (shift−1)·u): towards noise for shift > 1.

    The law of Wan and Pusa at shift 5: median 0.833, mean 0.7475. Keyword arguments reach the draw. Raises
    ValueError unless shift is a positive number.
    """
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift is {shift}; give a positive number (1 leaves the levels as they are)")

    def moved(key: jax.Array, batch: int, frames: int, **options) -> Levels:
        levels = draw(key, batch, frames, **options)
        # This form of the law is exact at 0 and 1, as in `schedule`.
        return levels / (levels + (1 - levels) / shift)

    return moved
