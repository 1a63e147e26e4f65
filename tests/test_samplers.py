from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file

from fvdm_jax.process import Prediction, flow, mix
from fvdm_jax.samplers import SAMPLERS, euler, sample
from fvdm_jax.schedule import pusa, schedule, sigmas
from fvdm_jax.tasks import completion

GOLDEN = Path(__file__).parent / "golden"
TORCH = load_file(GOLDEN / "schedulers.safetensors")
SOLVERS = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
REFERENCE = {"unipc": ("off_unipc", sigmas), "dpm++": ("off_dpmpp", pusa), "euler": ("ds_euler", pusa)}


def trajectory(sampler, start, velocities, rows):
    """Latents after 0, 1 … steps, when the network says `velocities` [s …] whatever it is shown.

    A schedule that is cut short by repeating its row k stops there, since nothing moves any more.
    """

    def denoise(x: jax.Array, level: jax.Array) -> Prediction:
        step = jnp.argmin(jnp.abs(rows[:-1] - level[0]).sum(1))
        return flow.read(x, velocities[step], level)

    def until(last: jax.Array) -> jax.Array:
        cut = rows[jnp.minimum(jnp.arange(len(rows)), last)]
        return sample(flow, denoise, sampler, start, start, cut)

    return jax.jit(jax.vmap(until))(jnp.arange(len(rows)))


@pytest.mark.parametrize("run", ["N4_s5", "N10_s5", "N20_s3"])
@pytest.mark.parametrize("name", REFERENCE)
def test_every_step_agrees_with_the_reference_solver(name, run):
    """Wan's own UniPC and DPM++ and DiffSynth's Euler, for the same velocities, level by frame."""
    reference, spacing = REFERENCE[name]
    steps, shift = (int(part[1:]) for part in run.split("_"))
    start = jnp.asarray(rearrange(TORCH[f"traj/{run}/x_init"], "b c f h w -> b f h w c"))
    velocities = jnp.asarray(rearrange(TORCH[f"traj/{run}/model_outputs"], "s b c f h w -> s b f h w c"))
    golden = rearrange(TORCH[f"traj/{run}/{reference}"], "s b c f h w -> s b f h w c")

    rows = schedule(spacing(steps, shift), jnp.ones(start.shape[1]))
    ours = trajectory(SAMPLERS[name], start, velocities, rows)

    # Latents reach 3.8, where one unit in the last place is 2.4e-7; 20 steps were measured at 1.8e-6.
    np.testing.assert_allclose(ours[0], start, rtol=0, atol=2e-6)
    np.testing.assert_allclose(ours[1:], golden, rtol=0, atol=2e-6)


@SOLVERS
def test_the_exact_velocity_brings_noise_to_data_through_the_right_marginals(sampler):
    clean, noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 4, 3, 3, 1)), jnp.float32)
    rows = schedule(pusa(7), jnp.array([1.0, 0.0, 0.3, 1.0]), [0, 1, 2, 5])

    def until(last: jax.Array) -> jax.Array:
        cut = rows[jnp.minimum(jnp.arange(len(rows)), last)]
        return sample(flow, lambda x, level: Prediction(clean, noise), sampler, noise, clean, cut)

    path = jax.jit(jax.vmap(until))(jnp.arange(len(rows)))
    marginals = jax.vmap(lambda level: mix(flow, clean, noise, jnp.broadcast_to(level, (2, 4))))(rows)
    np.testing.assert_allclose(path, marginals, rtol=0, atol=2e-6)
    assert np.array_equal(path[-1], clean)


def test_the_second_step_from_pure_noise_is_first_order():
    """λ was −∞ there, so the slope of DPM++ is 0; late levels, where a finite stand-in for it would show."""
    noise = np.random.default_rng(0).normal(size=(1, 2, 2, 2, 1)).astype(np.float32)
    rows = schedule(np.array([1, 0.4, 0.2], np.float32), np.array([1, 1], np.float32))
    ours, first_order = (
        sample(flow, lambda x, level: flow.read(x, jnp.sin(x), level), sampler, noise, 0 * noise, rows)
        for sampler in (SAMPLERS["dpm++"], euler)
    )
    np.testing.assert_allclose(ours, first_order, atol=1e-6)


@SOLVERS
@pytest.mark.parametrize("frames", [1, 3])
def test_one_step_gives_the_first_belief(sampler, frames):
    noise = jax.random.normal(jax.random.key(0), (1, frames, 2, 2, 1))
    rows = schedule(pusa(1), jnp.ones(frames))
    seen = sample(flow, lambda x, level: flow.read(x, jnp.sin(x), level), sampler, noise, 0 * noise, rows)
    np.testing.assert_allclose(seen, noise - jnp.sin(noise), atol=1e-6)


@SOLVERS
def test_when_every_frame_is_kept_the_canvas_comes_out(sampler):
    canvas = jax.random.normal(jax.random.key(0), (1, 3, 2, 2, 1))
    task = completion(canvas.shape, {0: canvas[:, :2], 2: canvas[:, 2:]})
    rows = schedule(pusa(3), task.strength)
    # A denoiser that would spoil everything: no step may let it through.
    spoil = lambda x, level: Prediction(jnp.full_like(x, jnp.inf), x)  # noqa: E731
    ours = sample(flow, spoil, sampler, canvas + 1, task.canvas, rows)
    assert np.array_equal(ours, canvas)


@SOLVERS
def test_a_pause_on_the_way_changes_nothing(sampler):
    noise = jax.random.normal(jax.random.key(0), (1, 2, 2, 2, 1))
    rows = schedule(pusa(6), jnp.ones(2))
    paused = rows[np.array([0, 1, 2, 2, 2, 3, 4, 4, 5, 6])]
    run = jax.jit(
        lambda rows: sample(
            flow, lambda x, level: flow.read(x, jnp.sin(3 * x), level), sampler, noise, 0 * noise, rows
        )
    )
    assert np.array_equal(run(paused), run(rows))
