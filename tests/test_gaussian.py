"""A video whose every answer is known: eight frames of a Gaussian chain and its exact denoiser.

Everything is linear in noise and canvas, so pushing unit vectors through the sampler gives the exact law of
what it makes; no random numbers. The distance to the true law is the squared Wasserstein distance between
Gaussians, summed over frames and averaged over what is given.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvdm_jax import zoo
from fvdm_jax.process import Prediction, ddpm, flow, mix
from fvdm_jax.samplers import SAMPLERS, euler, sample
from fvdm_jax.schedule import ddpm as respaced
from fvdm_jax.schedule import pusa, schedule

FRAMES, CORRELATION = 8, 0.9
COVARIANCE = CORRELATION ** np.abs(np.subtract.outer(np.arange(FRAMES), np.arange(FRAMES)))
TASKS = {
    "text to video": [],
    "image to video": [0],
    "interpolation": [0, 7],
    "extension": [0, 1, 2, 3],
    "completion": [2, 5, 6],
}
SPACED = {"flow": (flow, pusa), "ddpm": (ddpm, respaced)}
UNITS = np.eye(FRAMES, dtype=np.float32)[:, :, None, None, None]
NOISE = np.concatenate([UNITS, np.zeros_like(UNITS)])
CANVAS = np.concatenate([np.zeros_like(UNITS), UNITS])


def exact(process, x: jax.Array, level: jax.Array, given: jax.Array | None = None) -> Prediction:
    """The posterior mean of clean frames and noise, given x [b f 1 1 1] at levels [b f]."""
    alpha, sigma = process.alpha(level), process.sigma(level)
    truth = jnp.asarray(COVARIANCE, jnp.float32)
    noisy = alpha[:, :, None] * truth * alpha[:, None] + jax.vmap(jnp.diag)(sigma**2)
    rest = jnp.linalg.solve(noisy, x[..., 0, 0])
    clean, noise = jnp.einsum("nm,bm,bmc->bnc", truth, alpha, rest), sigma[..., None] * rest
    clean, noise = clean[..., None, None], noise[..., None, None]
    return process.read(x, process.target(clean, noise, level), level)


def replaced(process, x: jax.Array, level: jax.Array, given: jax.Array) -> Prediction:
    """Wrong: a scalar model, shown the given frames noised to the common level at each step."""
    common = level.max(1, keepdims=True) + 0 * level
    return exact(
        process, jnp.where(given[:, None, None, None], mix(process, CANVAS, NOISE, common), x), common
    )


def mislabelled(process, x: jax.Array, level: jax.Array, given: jax.Array) -> Prediction:
    """Wrong: kept frames are clean, but the network is told that they are as noisy as the others."""
    return exact(process, x, level.max(1, keepdims=True) + 0 * level)


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(process, denoise, sampler, rows, given) -> jax.Array:
    return sample(process, lambda x, level: denoise(process, x, level, given), sampler, NOISE, CANVAS, rows)


def transport(process, denoise, sampler, rows, given: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The matrices [f f] by which what is made depends on the noise and on the canvas."""
    made = run(process, denoise, sampler, rows, np.isin(np.arange(FRAMES), given))
    from_noise, from_canvas = np.asarray(made, np.float64).reshape(2, FRAMES, FRAMES)
    return from_noise.T, from_canvas.T


def root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def distance(made: tuple[np.ndarray, np.ndarray], given: list[int]) -> float:
    """Squared W2 of the frames made to the true conditional, averaged over the frames given."""
    from_noise, from_canvas = made
    free = [f for f in range(FRAMES) if f not in given]
    known = COVARIANCE[np.ix_(given, given)]
    pull = COVARIANCE[np.ix_(free, given)] @ np.linalg.inv(known)
    true = COVARIANCE[np.ix_(free, free)] - pull @ COVARIANCE[np.ix_(given, free)]
    spread = from_noise[free] @ from_noise[free].T
    off = from_canvas[np.ix_(free, given)] - pull
    half = root(true)
    return float(
        np.trace(off @ known @ off.T)
        + np.trace(true)
        + np.trace(spread)
        - 2 * np.trace(root(half @ spread @ half))
    )


def synchronous(process: str, steps: int, given: list[int]) -> tuple:
    kind, spacing = SPACED[process]
    return kind, schedule(spacing(steps), strengths(given))


def strengths(given: list[int]) -> np.ndarray:
    return np.where(np.isin(np.arange(FRAMES), given), 0, 1).astype(np.float32)


# Squared W2 after 50 steps, where the data have a variance of 8 in all. Measured at most 0.043 for Euler on
# flow, frames one by one; 0.0011 for the other solvers; 0.019 for DDPM, whose table ends in 0.021, 0.001, 0,
# too coarse for a higher order to show.
BOUNDS = {"flow": {"euler": 0.05, "dpm++": 0.002, "unipc": 0.002}, "ddpm": dict.fromkeys(SAMPLERS, 0.022)}


@pytest.mark.parametrize("process", SPACED)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_task_samples_the_true_conditional(sampler, process):
    for task, given in TASKS.items():
        kind, rows = synchronous(process, 50, given)
        made = transport(kind, exact, SAMPLERS[sampler], rows, given)
        assert distance(made, given) < BOUNDS[process][sampler], task
        assert np.array_equal(made[1][given], np.eye(FRAMES)[given]) and not np.any(made[0][given]), task


# Monte Carlo of others with the same process, DDIM and the same chain; (50 steps, 250 steps).
PUBLISHED = {
    "text to video": (0.011, 0.002),
    "image to video": (0.007, 0.001),
    "interpolation": (0.005, 0.000),
    "extension": (0.004, 0.000),
}


def test_ddim_is_as_close_as_measured_elsewhere():
    for task, published in PUBLISHED.items():
        for steps, value in zip((50, 250), published, strict=True):
            kind, rows = synchronous("ddpm", steps, TASKS[task])
            made = distance(transport(kind, exact, euler, rows, TASKS[task]), TASKS[task])
            # Theirs is rounded to 0.001 and, at 250 steps, as large as the error of its 40,000 samples.
            assert made == pytest.approx(value, abs=0.0007 if steps == 50 else 0.002), (task, steps)


def test_the_error_of_euler_vanishes_with_the_number_of_steps():
    for task, given in TASKS.items():
        coarse, fine = (
            distance(transport(kind, exact, euler, rows, given), given)
            for kind, rows in (synchronous("flow", steps, given) for steps in (50, 250))
        )
        # First order in the map is second order in the squared distance: 25 times for five times the steps.
        assert fine < coarse / 15, task


NAMED = [*sorted(zoo.ZOO.keys() - {"budget"}), "pyramid:lag=6", "ad:lag=12,block=2", "budget:last=20"]
COARSER = {"lattice": 0.009, "budget:last=20": 0.06}
"""Measured at most 0.0073 and 0.054. In a lattice a frame's last prediction was made before seven others
moved; it converges like the others (0.0011 after 100 steps, 0.0002 after 200). A budget has fewer steps."""


@pytest.mark.parametrize("process", SPACED)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_schedule_leads_to_the_same_law(sampler, process):
    kind, spacing = SPACED[process]
    for given in ([], [0]):
        for name in NAMED:
            rows = zoo.levels(name, spacing(50), strengths(given))
            rows = rows[np.minimum(np.arange(401), len(rows) - 1)]
            made = transport(kind, exact, SAMPLERS[sampler], rows, given)
            bound = max(BOUNDS[process][sampler], COARSER.get(name, 0))
            assert distance(made, given) < bound, (name, given)


@pytest.mark.parametrize("process", SPACED)
@pytest.mark.parametrize("wrong", [replaced, mislabelled])
def test_wrong_ways_of_conditioning_fail(wrong, process):
    for task, given in TASKS.items():
        kind, rows = synchronous(process, 50, given)
        right = distance(transport(kind, exact, euler, rows, given), given)
        if wrong is replaced:
            rows = schedule(SPACED[process][1](50), np.ones(FRAMES, np.float32))
        if given:
            assert distance(transport(kind, wrong, euler, rows, given), given) > 40 * right, task
