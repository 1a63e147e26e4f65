"""The error on clips that are never trained on, by what is known of their frames."""

from functools import partial

import jax
import jax.numpy as jnp

from fvdm_jax import levels, training
from fvdm_jax.process import Process
from fvdm_jax.shapes import Levels
from fvdm_jax.training import Batch, Noised, Objective
from fvdm_jax.weights import uniform

FAMILIES = {
    "equal": levels.scalar,
    "random": levels.per_frame,
    "first": levels.clean(levels.scalar, levels.at(0)),
    "ends": levels.clean(levels.scalar, levels.at(0, -1)),
    "prefix": levels.clean(levels.scalar, levels.prefix),
}
"""Draws for which the error on held-out clips is told: all frames equal, each its own, and one level for
those that are not given: all but the first frame, both ends, or any number of first frames."""


def errors(
    apply, process: Process, params: dict, frozen: dict, batch: Batch, at_once: int | None = None
) -> dict[str, jax.Array]:
    """The mean error of a clip with levels of each of FAMILIES, always the same levels and the same noise.

    `at_once`: so many clips at most go through the network together; None for all.
    """
    clips = len(batch.latents)
    most = min(at_once or clips, clips)
    size = max(n for n in range(1, most + 1) if clips % n == 0)

    def objective(draw) -> Objective:
        return Objective(process, levels.constant(draw), uniform, 0.0)

    def noised(draw):
        return training.noised(objective(draw), batch, jnp.int32(0), jax.random.key(0))

    def cut(array: jax.Array) -> jax.Array:
        return array.reshape(clips // size, size, *array.shape[1:])

    def total(piece: Noised) -> jax.Array:
        return training.loss(params, piece, partial(apply, frozen), objective(levels.scalar))[0]

    def error(level: Levels) -> jax.Array:
        pieces = jax.tree.map(cut, first._replace(level=level))
        return jnp.sum(jax.lax.map(total, pieces)) / clips

    first, *others = map(noised, FAMILIES.values())
    found = jax.lax.map(error, jnp.stack([first.level, *(each.level for each in others)]))
    return dict(zip(FAMILIES, found, strict=True))
