"""Training draws: functions (key, batch, frames) → levels [b f], each clip drawn by a key of its own.

Whichever the draw, clip i gets the same levels in a batch of any size. A draw that changes while a network
learns is a curriculum, a function of the step that returns a draw:

    lambda step: partial(ptss, probability=linear(step, 0, 1000, 0.5, 0.2))
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fvdm_jax import schedule
from fvdm_jax.shapes import Levels

Draw = Callable[[jax.Array, int, int], Levels]

Where = Callable[[jax.Array, int], Bool[Array, "f"]]
"""Which frames of one clip are given: (key, frames) → mask [f]."""

Curriculum = Callable[[Int[Array, ""]], Draw]
"""The draw at a step, which may be traced."""

Number = float | Float[Array, ""]
"""Python's, or traced."""


def _keys(key: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(lambda clip: jax.random.fold_in(key, clip))(jnp.arange(batch))


def _known(number: Number) -> bool:
    return not isinstance(number, jax.core.Tracer)


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


def copula(key: jax.Array, batch: int, frames: int, correlation: Number) -> Levels:
    """Levels uniform in [0, 1] of which any two frames are alike to a degree: a Gaussian copula.

    `correlation` is that of the Gaussians behind the levels, √ρ·common + √(1 − ρ)·own: at 0 this is
    `per_frame`, at 1 it is `scalar`, both in law and the latter bit for bit equal over the frames. The levels
    themselves correlate by 6/π·arcsin(ρ/2). Raises ValueError for a correlation outside 0 … 1.
    """
    if _known(correlation) and not 0 <= correlation <= 1:
        raise ValueError(f"correlation is {correlation}; give 0 (frames independent) to 1 (frames equal)")
    normal = jax.vmap(lambda clip: jax.random.normal(clip, (frames + 1,)))(_keys(key, batch))
    shared, apart = (_root(jnp.asarray(part, jnp.float32)) for part in (correlation, 1 - correlation))
    return jax.scipy.special.ndtr(shared * normal[:, :1] + apart * normal[:, 1:])


def _root(x: Array) -> Array:
    # The root has no slope at 0; a correlation that is learnt may start there.
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def ramp(key: jax.Array, batch: int, frames: int, width: Number | None = None) -> Levels:
    """Levels that rise from clean to noise over `width` frames of the clip, as in a rolling queue.

    The phase is uniform over all positions at which the last frame is not clean and the first is not noise.
    width is in frames, by default uniform in 1 … frames for each clip; at 1 one frame follows the other.
    Raises ValueError unless it is positive.
    """
    if width is not None and _known(width) and not 0 < width < float("inf"):
        raise ValueError(f"width is {width}; give a positive number of frames")
    draws = jax.vmap(lambda clip: jax.random.uniform(clip, (2,)))(_keys(key, batch))
    wide, phase = jnp.split(draws, 2, axis=1)
    wide = 1 + (frames - 1) * wide if width is None else jnp.asarray(width, jnp.float32)
    start = phase * (frames - 1 + wide) - wide
    return jnp.clip((jnp.arange(frames, dtype=jnp.float32) - start) / wide, 0.0, 1.0)


def _snapped() -> np.ndarray:
    grid = schedule.pusa(1000, 5.0)[:-1]
    rounded = (1000 * grid).astype(jnp.bfloat16).astype(np.float32)
    return grid[np.abs(1000 * grid - rounded[:, None]).argmin(1)]


PUSA_LEVELS = _snapped()
"""The level that Pusa trains at for each index 0 … 999 of its grid at shift 5, noise first.

Its timestep is rounded to bfloat16, and the level is that of the grid's timestep nearest to it, the first of
two equally near; 294 differ. 1000·level, rounded to bfloat16, is the timestep that its network is fed.
"""


def pusa_grid(key: jax.Array, batch: int, frames: int) -> Levels:
    """A level for each frame, of PUSA_LEVELS and independent: how Pusa V1.0 trained, to the bit.

    `shifted(per_frame, 5.0)` without the grid; for parity.
    """
    index = jax.vmap(lambda clip: jax.random.randint(clip, (frames,), 0, 1000))(_keys(key, batch))
    return jnp.asarray(PUSA_LEVELS)[index]


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


def logit_normal(draw: Draw, mean: Number = 0.0, std: Number = 1.0) -> Draw:
    """The draw with every level u, uniform before, moved to sigmoid(mean + std·Φ⁻¹(u)); 0 and 1 stay.

    Keyword arguments reach the draw. Raises ValueError unless std is positive. Source: Stable Diffusion 3
    (arXiv 2403.03206), eq. 19.
    """
    if _known(std) and not 0 < std < float("inf"):
        raise ValueError(f"std is {std}; give a positive number")

    def moved(key: jax.Array, batch: int, frames: int, **options) -> Levels:
        levels = draw(key, batch, frames, **options)
        inside = (levels > 0) & (levels < 1)
        # Φ⁻¹ is infinite at the ends, and a slope through it would be NaN.
        normal = jax.scipy.special.ndtri(jnp.where(inside, levels, 0.5))
        return jnp.where(inside, jax.nn.sigmoid(mean + std * normal), levels)

    return moved


def prefix(key: jax.Array, frames: int) -> Bool[Array, "f"]:
    """The first frames, 1 … f − 1 of them with equal probability."""
    return jnp.arange(frames) < jax.random.randint(key, (), 1, frames)


def suffix(key: jax.Array, frames: int) -> Bool[Array, "f"]:
    """The last frames, 1 … f − 1 of them with equal probability."""
    return prefix(key, frames)[::-1]


def ends(key: jax.Array, frames: int) -> Bool[Array, "f"]:
    """Frames at both ends; every cut of a clip into given, generated and given is equally probable."""
    cuts = max(frames - 1, 1)
    first, step = jax.random.randint(key, (2,), jnp.array([0, 1]), cuts)
    low, high = jnp.sort(jnp.stack([first, (first + step) % cuts])) + 1
    return (jnp.arange(frames) < low) | (jnp.arange(frames) >= high)


def subset(key: jax.Array, frames: int, probability: Number = 0.5) -> Bool[Array, "f"]:
    """Any frames, each with this probability."""
    return jax.random.bernoulli(key, probability, (frames,))


def at(*frames: int) -> Where:
    """These frames; negative ones count from the end. Raises IndexError where a clip is shorter."""

    def where(key: jax.Array, count: int) -> Bool[Array, "f"]:
        chosen = np.zeros(count, bool)
        chosen[list(frames)] = True
        return jnp.asarray(chosen)

    return where


def clean(draw: Draw, where: Where) -> Draw:
    """The draw with some frames of each clip at level 0, as where frames are given.

    A clip whose every frame would be clean stays as drawn, since nothing could be learnt from it. Keyword
    arguments reach the draw.
    """

    def given(key: jax.Array, batch: int, frames: int, **options) -> Levels:
        chosen, drawn = jax.random.split(key)
        mask = jax.vmap(lambda clip: where(clip, frames))(_keys(chosen, batch))
        mask &= ~jnp.all(mask, axis=1, keepdims=True)
        return jnp.where(mask, 0.0, draw(drawn, batch, frames, **options))

    return given


def mixture(draws: Sequence[Draw], weights: Sequence[Number] | Float[Array, "n"]) -> Draw:
    """For each clip one of the draws, with probabilities in proportion to the weights, which may be traced.

    Raises ValueError unless there is a weight for each draw, none negative and not all 0.
    """
    if len(draws) != len(weights):
        raise ValueError(f"there are {len(draws)} draws and {len(weights)} weights; give one weight for each")
    weights = jnp.asarray(weights, jnp.float32)
    if _known(weights) and not (np.all(np.asarray(weights) >= 0) and 0 < np.sum(weights) < float("inf")):
        raise ValueError(f"weights are {weights.tolist()}; give numbers from 0 that are not all 0")

    def mixed(key: jax.Array, batch: int, frames: int) -> Levels:
        choice, *keys = jax.random.split(key, len(draws) + 1)
        which = jax.vmap(lambda clip: jax.random.categorical(clip, jnp.log(weights)))(_keys(choice, batch))
        every = jnp.stack([draw(key, batch, frames) for draw, key in zip(draws, keys, strict=True)])
        return every[which, jnp.arange(batch)]

    return mixed


def constant(draw: Draw) -> Curriculum:
    """The curriculum that is the same draw at every step."""
    return lambda step: draw


def linear(step: Int[Array, ""], start: int, stop: int, first: Number, last: Number) -> Float[Array, ""]:
    """A number that goes from `first` at step `start` to `last` at step `stop`, and stays as it is outside.

    Raises ValueError unless start < stop.
    """
    if not start < stop:
        raise ValueError(f"it goes from step {start} to step {stop}; give a later step to stop at")
    done = jnp.clip((jnp.asarray(step, jnp.float32) - start) / (stop - start), 0.0, 1.0)
    return (1 - done) * first + done * last
