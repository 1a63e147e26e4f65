"""One training step: the loss with a noise level for every frame, and what an update is."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fvdm_jax.levels import Draw
from fvdm_jax.process import Process, expand, mix
from fvdm_jax.shapes import Latents, Levels, TextStates
from fvdm_jax.weights import Weight

BANDS = 4
"""Equal parts of 0 … 1 by level, for each of which the error is told."""

Apply = Callable[[dict, Latents, Levels, TextStates], Latents]
"""A network as a function of what is trained of it: (params, x, timestep, text) → output."""


class Batch(NamedTuple):
    """Clips with what is said of them; `nothing` [l e] are the states of the empty prompt.

    `number`: the step that they are for, so that none is taken out of turn; None for whichever is next.
    """

    latents: Latents
    text: TextStates
    nothing: Float[Array, "l e"]
    number: Int[Array, ""] | None = None


class Objective(NamedTuple):
    """What is trained for: the process, how levels are drawn at a step, and how errors are weighed.

    `curriculum(step)` is a Draw, `weight(level)` [b f] → [b f]; `dropout` is the share of clips that are told
    nothing, so that guidance can be used.
    """

    process: Process
    curriculum: Callable[[Int[Array, ""]], Draw]
    weight: Weight
    dropout: float = 0.1


class Noised(NamedTuple):
    """A batch as the network meets it: at `level` [b f], mixed with `noise`, some clips told nothing."""

    clean: Latents
    noise: Latents
    level: Levels
    text: TextStates


class Measures(NamedTuple):
    """Sums over clips, from which means are made: the weighted loss, the plain error, and counts.

    `error` and `frames` are by BANDS of the level.
    """

    loss: Float[Array, ""]
    clips: Float[Array, ""]
    error: Float[Array, "bands"]
    frames: Float[Array, "bands"]


class TrainState(NamedTuple):
    """What a run carries from step to step: all of it is saved, and nothing else.

    `params` is what is trained, the network's or its adapters', float32; `average` their running average, or
    None. Every draw of step n is made by fold_in(key, n), so that it does not depend on what came before.
    """

    step: Int[Array, ""]
    params: dict
    optimizer: optax.OptState
    average: dict | None
    key: PRNGKeyArray


def noised(objective: Objective, batch: Batch, step: Int[Array, ""], key: PRNGKeyArray) -> Noised:
    """The batch with levels, noise and dropped captions drawn, clip i by keys that only key and i decide.

    So it is the same however the batch is divided among devices or into parts.
    """
    clips, frames = batch.latents.shape[:2]
    level_key, noise_key, told_key = jax.random.split(key, 3)
    level = objective.curriculum(step)(level_key, clips, frames)

    def each(key, draw):
        return jax.vmap(lambda clip: draw(jax.random.fold_in(key, clip)))(jnp.arange(clips))

    noise = each(noise_key, lambda key: jax.random.normal(key, batch.latents.shape[1:]))
    told = each(told_key, lambda key: jax.random.bernoulli(key, 1 - objective.dropout))
    text = jnp.where(expand(told, batch.text), batch.text, batch.nothing)
    return Noised(batch.latents, noise, level, text)


def loss(params: dict, noised: Noised, apply: Apply, objective: Objective) -> tuple[Array, Measures]:
    """Σ over clips of the weighted squared error of what the network says, and its Measures.

    Of each clip the mean is taken over the frames that have noise: of a clean frame's noise nothing can be
    known. Source: Pusa V1.0 (arXiv 2507.16116), eq. 10 and its trainer, which has no clean frames and takes
    the weights' mean (`weights.together`); FVDM (arXiv 2410.03160) with weight 1.
    """
    process, level = objective.process, noised.level
    x = mix(process, noised.clean, noised.noise, level)
    said = apply(params, x, process.timestep(level), noised.text)
    target = process.target(noised.clean, noised.noise, level)
    error = jnp.mean(jnp.square(said - target), (2, 3, 4))
    noisy = (level > 0).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(noisy, 1), 1)
    total = jnp.sum(jnp.sum(objective.weight(level) * noisy * error, 1) / count)
    band = jnp.minimum((level * BANDS).astype(jnp.int32), BANDS - 1)
    members = noisy[..., None] * jax.nn.one_hot(band, BANDS)
    measures = Measures(
        total,
        jnp.float32(level.shape[0]),
        jnp.einsum("bf,bfn->n", error, members),
        jnp.sum(members, (0, 1)),
    )
    return total, measures


def init(params: dict, tx: optax.GradientTransformation, key: PRNGKeyArray, averaged: bool) -> TrainState:
    """The state before the first step."""
    average = jax.tree.map(jnp.copy, params) if averaged else None
    return TrainState(jnp.int32(0), params, tx.init(params), average, key)


class Recipe(NamedTuple):
    """How a step is made: the objective, the optimizer, in how many parts a batch is worked through, the
    decay of the running average, 0 for none, and whether what is not finite is left out and gone on after."""

    objective: Objective
    optimizer: optax.GradientTransformation
    parts: int = 1
    decay: float = 0.0
    tolerant: bool = True


def train_step(state: TrainState, batch: Batch, apply: Apply, recipe: Recipe) -> tuple[TrainState, dict]:
    """The state after one update, and what is to be known of it: `loss`, `error` by band, `gradient` (the
    norm), `finite`, and which `leaf` of the gradient is the first that is not.

    Where the loss or a gradient is not finite, the state stays as it was. Its step goes on where the recipe
    is tolerant; where not, it stays too, so that batches for later steps change nothing any more. Raises
    ValueError unless the clips divide into the parts.
    """
    key = jax.random.fold_in(state.key, state.step)
    grads, measures = gradients(state.params, noised(recipe.objective, batch, state.step, key), apply, recipe)
    squares = jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(grads)])
    norm = jnp.sqrt(jnp.sum(squares))
    due = jnp.bool_(True) if batch.number is None else batch.number == state.step
    finite = due & jnp.isfinite(measures.loss) & jnp.isfinite(norm)
    updates, optimizer = recipe.optimizer.update(grads, state.optimizer, state.params)
    params = jax.tree.map(_updated, state.params, updates)
    moved = state._replace(params=params, optimizer=optimizer, average=averaged(state, params, recipe.decay))
    kept = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), moved._replace(key=0), state._replace(key=0)
    )
    told = {
        "loss": measures.loss / measures.clips,
        "gradient": norm,
        "finite": finite,
        "leaf": jnp.argmin(jnp.isfinite(squares)),
        "error": measures.error,
        "frames": measures.frames,
    }
    goes_on = due if recipe.tolerant else finite
    return kept._replace(step=state.step + goes_on.astype(jnp.int32), key=state.key), told


def _updated(leaf: Array, update: Float[Array, "..."]) -> Array:
    """leaf + update, in float32, as leaf is kept."""
    return (leaf.astype(jnp.float32) + update).astype(leaf.dtype)


def gradients(params: dict, noised: Noised, apply: Apply, recipe: Recipe) -> tuple[dict, Measures]:
    """The gradient of the mean loss of a clip, worked through in parts one after another.

    In the parameters' type; parts are added up in float32.
    """
    clips = len(noised.level)
    if clips % recipe.parts:
        raise ValueError(f"{clips} clips do not divide into {recipe.parts} parts")

    def slope(part: Noised) -> tuple[dict, Measures]:
        run = jax.value_and_grad(loss, has_aux=True)
        (_, measures), grads = run(params, part, apply, recipe.objective)
        wide = recipe.parts > 1
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if wide else leaf, grads), measures

    if recipe.parts == 1:
        grads, measures = slope(noised)
    else:
        # Each device's clips are dealt to all parts, so that none moves to another device.
        dealt = jax.tree.map(lambda leaf: rearrange(leaf, "(b p) ... -> p b ...", p=recipe.parts), noised)
        shapes = jax.eval_shape(slope, jax.tree.map(lambda leaf: leaf[0], dealt))
        first = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, measures), _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, slope(part)), None), first, dealt
        )
    return jax.tree.map(lambda leaf: leaf / clips, grads), measures


def averaged(state: TrainState, params: dict, decay: float) -> dict | None:
    """The running average with `params` taken in; its decay is at most (1 + n)/(10 + n) at step n."""
    if state.average is None:
        return None
    n = state.step.astype(jnp.float32)
    keep = jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.average, params)
