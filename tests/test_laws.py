"""What every solver must obey; a new one inherits these tests by its name in SAMPLERS."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from fvdm_jax.process import Prediction, ddpm, expand, flow
from fvdm_jax.samplers import SAMPLERS, sample
from fvdm_jax.schedule import pusa, schedule
from fvdm_jax.tasks import text_to_video, transition

SOLVERS = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
PROCESSES = pytest.mark.parametrize("process", [flow, ddpm], ids=["flow", "ddpm"])
STEPS, FRAMES = 6, 5
SHAPE = (2, FRAMES, 2, 2, 3)
STRENGTHS = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0.3, 1], [0.3, 0, 1, 0, 0.3]], np.float32)
DELAYS = {
    "together": 0,
    "lag 1": np.arange(FRAMES),
    "lag 3": 3 * np.arange(FRAMES),
    "one by one": STEPS * np.arange(FRAMES),
    "backwards": 2 * np.arange(FRAMES)[::-1],
}


def lonely(process, x: jax.Array, level: jax.Array) -> Prediction:
    """A made-up network that looks at each frame on its own, nonlinear in what it sees and in the level."""
    level, whole = expand(level, x), level
    return process.read(x, jnp.tanh(1.3 * x) * (0.5 + level) + 0.3 * jnp.sin(2 * x + level), whole)


def sociable(process, x: jax.Array, level: jax.Array) -> Prediction:
    """The same, but every frame feels the largest value of its clip, in whatever order the frames are."""
    return lonely(process, x + 0.1 * x.max((1, 2, 3, 4), keepdims=True), level)


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(process, denoise, sampler, noise, canvas, rows):
    return sample(process, partial(denoise, process), sampler, noise, canvas, rows)


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    """Noise and canvas; numpy, so that taking frames of them compiles nothing."""
    return np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)


def resting(rows: jax.Array, length: int = 1 + STEPS * FRAMES) -> np.ndarray:
    """The schedule with idle rows at its end, so that all of them share one compiled program."""
    return np.asarray(rows)[np.minimum(np.arange(length), len(rows) - 1)]


@PROCESSES
@SOLVERS
def test_a_frame_in_company_takes_the_path_of_the_frame_alone(sampler, process, clips):
    noise, canvas = clips
    for strength in STRENGTHS:
        alone = [
            run(
                process,
                lonely,
                sampler,
                noise[:, f, None],
                canvas[:, f, None],
                schedule(pusa(STEPS), one[None]),
            )
            for f, one in enumerate(strength)
        ]
        for name, delay in DELAYS.items():
            company = run(
                process, lonely, sampler, noise, canvas, resting(schedule(pusa(STEPS), strength, delay))
            )
            # Not bit-equal: vectorised tanh and sin round differently at other sizes.
            scale = np.abs(company).max()
            np.testing.assert_allclose(
                company, jnp.concatenate(alone, 1), rtol=0, atol=1e-6 * max(scale, 1), err_msg=name
            )


@PROCESSES
@SOLVERS
def test_a_kept_frame_comes_out_bit_equal(sampler, process, clips):
    noise, canvas = clips
    for strength in STRENGTHS:
        kept = np.flatnonzero(strength == 0)
        for delay in DELAYS.values():
            made = run(
                process, sociable, sampler, noise, canvas, resting(schedule(pusa(STEPS), strength, delay))
            )
            assert np.array_equal(made[:, kept], canvas[:, kept])
            others = np.flatnonzero(strength)
            assert np.all(np.abs(made - canvas)[:, others].max((0, 2, 3, 4)) > 0.1), (
                "a free frame did not move"
            )


@SOLVERS
def test_equal_levels_are_the_scalar_model(sampler, clips):
    """Frames stacked into one tall picture with a single level, the way of every scalar sampler."""
    tall = [rearrange(part, "b f h w c -> b 1 (f h) w c") for part in clips]
    for strength in (1.0, 0.6):
        rows = resting(schedule(pusa(STEPS), np.full(FRAMES, strength, np.float32)))
        vector = run(flow, sociable, sampler, *clips, rows)
        scalar = run(flow, sociable, sampler, *tall, rows[:, :1])
        assert np.array_equal(rearrange(vector, "b f h w c -> b 1 (f h) w c"), scalar)


@SOLVERS
def test_one_program_serves_every_task_of_a_size(sampler, clips):
    noise, clip = clips
    traces = []

    @jax.jit
    def program(noise, canvas, rows):
        traces.append(rows.shape)
        return sample(flow, partial(sociable, flow), sampler, noise, canvas, rows)

    tasks = [
        text_to_video(SHAPE),
        text_to_video(SHAPE).keep(clip[:, :1], 0),
        text_to_video(SHAPE).keep(clip[:, :1], 0, strength=0.2),
        text_to_video(SHAPE).keep(clip[:, :3], 0),
        transition(SHAPE, clip[:, :2], clip[:, -1:]),
    ]
    for task in tasks:
        assert np.all(np.isfinite(program(noise, task.canvas, schedule(pusa(STEPS), task.strength))))
    assert len(traces) == 1


@SOLVERS
def test_the_order_of_frames_does_not_matter(sampler, clips):
    order, delay = np.array([3, 0, 4, 1, 2]), np.array([0, 2, 1, 3, 5])
    for strength in STRENGTHS:
        rows = resting(schedule(pusa(STEPS), strength, delay))
        straight = run(flow, sociable, sampler, *clips, rows)
        permuted = run(flow, sociable, sampler, *(part[:, order] for part in clips), rows[:, order])
        assert np.array_equal(straight[:, order], permuted)


@SOLVERS
def test_clips_of_a_batch_do_not_meet(sampler, clips):
    rows = resting(schedule(pusa(STEPS), STRENGTHS[1]))
    both = run(flow, sociable, sampler, *clips, rows)
    one = run(flow, sociable, sampler, *(part[:1] for part in clips), rows)
    np.testing.assert_allclose(both[:1], one, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "sampler, process",
    [*((sampler, flow) for sampler in SAMPLERS.values()), (SAMPLERS["dpm++"], ddpm)],
    ids=[*SAMPLERS, "dpm++-ddpm"],
)
def test_gradients_are_finite_where_frames_are_kept_and_paths_start_at_noise(sampler, process, clips):
    def energy(noise, canvas, strength):
        rows = schedule(pusa(3), strength, [0, 1, 0, 2, 0])
        return jnp.sum(sample(process, partial(sociable, process), sampler, noise, canvas, rows) ** 2)

    with jax.debug_nans(True):
        slopes = jax.jit(jax.grad(energy, (0, 1, 2)))(*clips, jnp.asarray(STRENGTHS[1]))
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    assert np.all(slopes[0][:, 0] == 0), "a kept frame does not depend on its noise"
    assert np.all(np.abs(slopes[0][:, [1, 2, 4]]).max((0, 2, 3, 4)) > 0)


MEAN, SPREAD = 0.5, 0.4


def gaussian(process, x: jax.Array, level: jax.Array) -> Prediction:
    """The exact denoiser of pixels drawn from N(MEAN, SPREAD²)."""
    alpha, sigma = expand(process.alpha(level), x), expand(process.sigma(level), x)
    rest = (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)
    return Prediction(MEAN + alpha * SPREAD**2 * rest, sigma * rest)


def error(process, sampler, steps: int, end: float) -> float:
    """Distance at level `end` from the exact path, on which pixels keep their place in the distribution."""
    place = jnp.linspace(-2, 2, 5).reshape(1, 1, 5, 1, 1)

    def exact(level: float) -> jax.Array:
        alpha, sigma = process.alpha(jnp.full((), level)), process.sigma(jnp.full((), level))
        return alpha * MEAN + jnp.sqrt(alpha**2 * SPREAD**2 + sigma**2) * place

    noise = exact(1.0) / process.sigma(jnp.ones(()))
    rows = resting(np.linspace(1, end, steps + 1, dtype=np.float32)[:, None], 513)
    return float(jnp.abs(run(process, gaussian, sampler, noise, 0 * noise, rows) - exact(end)).max())


# The corrector of UniPC adds one to the order of its predictor. Measured slopes for flow and ddpm: Euler 0.99
# and 1.00, DPM++ 2.11 and 1.98, UniPC 2.74 and 2.83; the windows leave out the neighbouring orders.
ORDERS = {"euler": (0.9, 1.1), "dpm++": (1.8, 2.3), "unipc": (2.5, 3.2)}


@PROCESSES
@pytest.mark.parametrize("name", SAMPLERS)
def test_order_of_convergence(name, process):
    # Up to level 0.2: the last step, to 0, is of first order by construction.
    errors = [error(process, SAMPLERS[name], steps, 0.2) for steps in (32, 64, 128)]
    low, high = ORDERS[name]
    assert low < np.log2(errors[0] / errors[2]) / 2 < high, errors


@PROCESSES
@SOLVERS
def test_every_solver_converges_to_eulers_limit(sampler, process):
    # Euler is of first order: measured 0.0057. The others owe their last step z·σ²/(2·SPREAD): 4e-4.
    assert error(process, sampler, 512, 0.0) < (8e-3 if sampler is SAMPLERS["euler"] else 8e-4)
