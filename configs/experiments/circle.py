"""A world of 64 videos, of which everything can be known: the best possible denoiser, and what is right.

A bump moves round a circle of 16 pixels at one of four speeds, for 8 frames. Since the videos are
finitely many, the mean of all that may lie behind noisy latents is a sum over them, whatever the level of
each frame.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fvdm_jax import levels, samplers, schedule, tasks
from fvdm_jax.held_out import FAMILIES as HELD_OUT
from fvdm_jax.models import dit
from fvdm_jax.process import PROCESSES, Prediction, Process, expand, mix
from fvdm_jax.shapes import Latents, Levels

FRAMES, PIXELS, WIDTH = 8, 16, 1.5
SPEEDS = (-2, -1, 1, 2)
STARTS, SPEED = (part.ravel() for part in np.meshgrid(np.arange(PIXELS), SPEEDS, indexing="ij"))
"""Where each of the 64 videos starts and how fast it moves, in pixels and pixels a frame."""

DRAWS, CHUNK, STEPS, NEAR = 2048, 256, 25, 0.15
"""Draws of a family of levels, those judged at once, steps of the sampler, and the RMS within which a made
video is a legal one."""

SIZES = dit.DiTConfig(64, 256, 2, 3, 4, 4, text_width=8, dtype="float32")
"""The network: a token a frame, 0.3 million parameters."""

Denoise = Callable[[dict, Latents, Levels], Prediction]


def _videos() -> np.ndarray:
    """All videos [64 f 2 2 4], of mean 0 and variance 1 over everything."""
    at = STARTS[:, None] + SPEED[:, None] * np.arange(FRAMES)
    off = (np.arange(PIXELS) - at[..., None] + PIXELS / 2) % PIXELS - PIXELS / 2
    bump = np.exp(-0.5 * (off / WIDTH) ** 2)
    bump = (bump - bump.mean()) / bump.std()
    return rearrange(bump, "b f (h w c) -> b f h w c", h=2, w=2).astype(np.float32)


VIDEOS = _videos()


def bayes(process: Process, params: dict, x: Latents, level: Levels) -> Prediction:
    """The best prediction there is: the mean of the 64 videos, each as probable as x makes it.

    `params` is not used. At level 0 a frame decides by itself; there its σ counts as 0.001.
    """
    alpha, sigma = process.alpha(level), jnp.maximum(process.sigma(level), 1e-3)
    off = x[:, None] - expand(alpha, x)[:, None] * VIDEOS
    square = jnp.sum(jnp.square(off), (3, 4, 5)) / (2 * jnp.square(sigma[:, None]))
    weight = jax.nn.softmax(-jnp.sum(square, 2), axis=1)
    clean = jnp.einsum("bn,nfhwc->bfhwc", weight, VIDEOS, precision="highest")
    return Prediction(clean, (x - expand(alpha, x) * clean) / expand(sigma, x))


FAMILIES = {
    "diagonal": levels.scalar,
    "random": levels.per_frame,
    "first": HELD_OUT["first"],
    "ends": HELD_OUT["ends"],
    "prefix 4": levels.clean(levels.scalar, levels.at(0, 1, 2, 3)),
    "ramp": levels.ramp,
}
"""What is known of the frames: draws of levels at which the error is told."""


class Probe(NamedTuple):
    """Noisy latents [n b f h w c] at levels [n b f], and what is best said of them, in chunks."""

    x: jax.Array
    level: jax.Array
    best: Prediction


def _at(process: Process, level: np.ndarray) -> np.ndarray:
    """The process's level at which noise is to clean as it is to it in flow at `level`."""
    grid = np.append(0.0, np.linspace(1e-3, 1, 20000)).astype(np.float32)
    alpha, sigma = np.asarray(process.alpha(grid)), np.asarray(process.sigma(grid))
    return np.interp(level, sigma / (alpha + sigma), grid).astype(np.float32)


@functools.cache
def probe(name: str, family: str) -> Probe:
    """DRAWS videos with noise and levels of the family that are always the same.

    Levels are as of flow, 0 or between 0.01 and 0.99 since ddpm ends at 0.994; other processes are asked at
    the same ratio of noise to clean.
    """
    process, keys = PROCESSES[name], jax.random.split(jax.random.key(7), 3)
    chunked = functools.partial(rearrange, pattern="(n b) ... -> n b ...", b=CHUNK)
    level = np.asarray(FAMILIES[family](keys[0], DRAWS, FRAMES))
    level = _at(process, np.where(level > 0, np.clip(level, 0.01, 0.99), 0).astype(np.float32))
    clean = jnp.asarray(VIDEOS)[jax.random.randint(keys[1], (DRAWS,), 0, len(VIDEOS))]
    noise = jax.random.normal(keys[2], clean.shape)
    x = chunked(mix(process, clean, noise, jnp.asarray(level)))
    level = chunked(jnp.asarray(level))
    return Probe(x, level, _best(name)(x, level))


@functools.cache
def _best(name: str) -> Callable[[jax.Array, jax.Array], Prediction]:
    """The best predictions of chunks (x, level), compiled once for all families."""
    process = PROCESSES[name]
    return jax.jit(lambda x, level: jax.lax.map(lambda chunk: bayes(process, {}, *chunk), (x, level)))


class Measuring(NamedTuple):
    """Two compiled functions of parameters, whatever they are trained for.

    `excess(params, probe)` is how far what is said is from the best: the mean square over noisy frames, as a
    velocity noise − clean and as what the process's networks say. `generate(params, noise, canvas, schedule)`
    is the sampler.
    """

    excess: Callable
    generate: Callable


def measuring(name: str, denoise: Denoise) -> Measuring:
    """The functions for a process, by its name, and a denoiser; they compile at their first use."""
    process = PROCESSES[name]
    jit = functools.partial(jax.jit, compiler_options=dit.options(SIZES, jax.default_backend()))

    @jit
    def excess(params: dict, probe: Probe) -> tuple[jax.Array, jax.Array]:
        def of(chunk: Probe):
            x, level, best = chunk
            said = denoise(params, x, level)
            off = said.noise - best.noise, said.clean - best.clean
            own = process.target(off[1], off[0], level)
            return jnp.stack([_over_noisy(part, level) for part in (off[0] - off[1], own)])

        velocity, own = jnp.sum(jax.lax.map(of, probe), 0) / jnp.sum(probe.level > 0, dtype=jnp.float32)
        return velocity, own

    @jit
    def generate(params: dict, noise: Latents, canvas: Latents, plan: jax.Array) -> Latents:
        said = functools.partial(denoise, params)
        return samplers.sample(process, said, samplers.euler, noise, canvas, plan)

    return Measuring(excess, generate)


def _over_noisy(off: Latents, level: Levels) -> jax.Array:
    return jnp.sum(jnp.where(level > 0, jnp.mean(jnp.square(off), (2, 3, 4)), 0.0))


def excesses(name: str, measure: Measuring, params: dict) -> dict[str, float]:
    """Excesses by name: "excess FAMILY" as a velocity, "own FAMILY" in units of the network's target."""
    found = {}
    for family in FAMILIES:
        velocity, own = measure.excess(params, probe(name, family))
        found |= {f"excess {family}": float(velocity), f"own {family}": float(own)}
    return found


TASKS: dict[str, Callable[[Latents], tasks.Task]] = {
    "generation": lambda clip: tasks.text_to_video(clip.shape),
    "I2V": lambda clip: tasks.image_to_video(clip.shape, clip[:, :1]),
    "start-end": lambda clip: tasks.start_end(clip.shape, clip[:, :1], clip[:, -1:]),
    "extension": lambda clip: tasks.extension(clip.shape, clip[:, :4]),
    "completion": lambda clip: tasks.completion(clip.shape, {at: clip[:, at : at + 1] for at in (2, 5)}),
    "transition": lambda clip: tasks.transition(clip.shape, clip[:, :2], clip[:, -2:]),
}
"""All but the first two have one right answer."""

TRUTH = np.repeat(np.arange(len(VIDEOS)), 4)
"""The videos that tasks take frames of."""


def nearest(made: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which legal video each made one is nearest to, and how far from it (RMS)."""
    square = np.mean(np.square(made[:, None] - VIDEOS), (2, 3, 4, 5))
    return square.argmin(1), np.sqrt(square.min(1))


def _motion(made: np.ndarray) -> np.ndarray:
    """RMS change from frame to frame [b]."""
    return np.sqrt(np.mean(np.square(np.diff(made, axis=1)), (1, 2, 3, 4)))


def _variation(which: np.ndarray, of: int) -> float:
    """Total variation between how often each of `of` occurs and all equally often; 1 where nothing occurs."""
    if not len(which):
        return 1.0
    return float(0.5 * np.abs(np.bincount(which, minlength=of) / len(which) - 1 / of).sum())


def judged(task: str, made: np.ndarray) -> dict[str, float]:
    """What is to be said of 256 videos made for a task from frames of TRUTH.

    "right" is a legal video: of I2V one that starts where it should, of other tasks the only right one.
    "nearest" to the latter are more, since what is kept counts: half of what a network makes that has learned
    nothing is, of extension.
    "frozen" is the share that changes half as much as the slowest legal video, or less.
    """
    which, far = nearest(made)
    valid = far < NEAR
    moved = {
        "speed": np.abs(SPEED[which]).mean(),
        "frozen": np.mean(_motion(made) < _motion(VIDEOS).min() / 2),
    }
    found = {"valid": valid.mean(), "distance": far.mean()}
    if task == "generation":
        found |= moved | {"variation": _variation(which, len(VIDEOS))}
    elif task == "I2V":
        right = valid & (STARTS[which] == STARTS[TRUTH])
        speeds = np.searchsorted(SPEEDS, SPEED[which[right]])
        found |= moved | {"right": right.mean(), "variation": _variation(speeds, len(SPEEDS))}
    else:
        found |= {"right": np.mean(valid & (which == TRUTH)), "nearest": np.mean(which == TRUTH)}
    return {f"{task} {key}": float(value) for key, value in found.items()}


def carried_out(name: str, task: str, measure: Measuring, params: dict) -> dict[str, float]:
    """`judged` of a task with noise that is always the same, and how much of kept frames is bit-equal."""
    clip = jnp.asarray(VIDEOS[TRUTH])
    wanted = TASKS[task](clip)
    sigmas = schedule.pusa(STEPS, 1.0) if name == "flow" else schedule.ddpm(STEPS)
    noise = jax.random.normal(jax.random.key(11), clip.shape)
    plan = schedule.schedule(sigmas, wanted.strength)
    made = np.asarray(measure.generate(params, noise, wanted.canvas, plan))
    kept = np.asarray(wanted.strength) == 0
    same = {f"{task} kept": float(np.mean(made[:, kept] == VIDEOS[TRUTH][:, kept]))} if kept.any() else {}
    return judged(task, made) | same


def measures(name: str, measure: Measuring, params: dict) -> dict[str, float]:
    """All that is measured of parameters: `excesses`, and every task carried out."""
    found = excesses(name, measure, params)
    for task in TASKS:
        found |= carried_out(name, task, measure, params)
    return found
