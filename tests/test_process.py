from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvdm_jax.process import ddpm, ddpm_v, expand, flow, mix

GOLDEN = Path(__file__).parent / "golden"
PROCESSES = pytest.mark.parametrize("process", [flow, ddpm, ddpm_v], ids=["flow", "ddpm", "ddpm_v"])
SHAPE = (2, 5, 2, 3, 4)


def clip(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)


@PROCESSES
def test_reading_the_target_gives_back_what_was_mixed(process):
    clean, noise = clip(0), clip(1)
    level = jnp.broadcast_to(jnp.array([0.0, 0.001, 0.3, 0.9, 1.0]), SHAPE[:2])

    @jax.jit
    def there_and_back(clean: jax.Array, noise: jax.Array, level: jax.Array):
        return process.read(mix(process, clean, noise, level), process.target(clean, noise, level), level)

    predicted = there_and_back(clean, noise, level)
    # Reading ε divides by α, which is 0.00635 at level 1: one rounding of x becomes 1e-5 there.
    np.testing.assert_allclose(predicted.clean, clean, atol=5e-5 if process is ddpm else 1e-6)
    np.testing.assert_allclose(predicted.noise, noise, atol=1e-6)


@PROCESSES
@pytest.mark.parametrize("compiled", [False, True])
def test_level_0_is_clean_bit_for_bit(process, compiled):
    clean = clip(0).at[0, 0].set(-0.0).at[0, 1].set(1e30)
    mixed = jax.jit(mix, static_argnums=0) if compiled else mix
    x = mixed(process, clean, clip(1), jnp.zeros(SHAPE[:2]))
    assert np.array_equal(np.asarray(x).view(np.int32), np.asarray(clean).view(np.int32))


def test_flow_at_level_1_is_the_noise():
    assert np.array_equal(mix(flow, clip(0), clip(1), jnp.ones(SHAPE[:2])), clip(1))


def test_levels_stand_against_frames():
    level = jnp.arange(10.0).reshape(2, 5)
    assert expand(level, clip(0)).shape == (2, 5, 1, 1, 1)
    assert np.array_equal(jnp.broadcast_to(expand(level, clip(0)), SHAPE)[..., 1, 2, 3], level)


def test_ddpm_agrees_with_the_product_of_alphas():
    product = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    level = jnp.asarray(np.arange(1, 1001) / 1000, jnp.float32)
    np.testing.assert_allclose(ddpm.alpha(level), np.sqrt(product), rtol=5e-6)
    np.testing.assert_allclose(ddpm.sigma(level), np.sqrt(1 - product), rtol=5e-6)
    np.testing.assert_allclose(ddpm.timestep(level), np.arange(1000), atol=1e-4)
    assert [float(part(jnp.zeros(()))) for part in (ddpm.alpha, ddpm.sigma, ddpm.timestep)] == [1, 0, 0]
    assert float(ddpm.alpha(jnp.ones(()))) == pytest.approx(0.00635, abs=1e-5)


@PROCESSES
def test_noise_only_grows_with_the_level(process):
    level = jnp.linspace(0, 1, 3001)
    assert np.all(np.diff(process.sigma(level)) >= 0)
    assert np.all(np.diff(process.alpha(level)) <= 0)
    assert np.all(np.diff(process.timestep(level)) >= 0)


@PROCESSES
def test_slopes_in_the_level_are_finite_everywhere(process):
    def energy(level: jax.Array) -> jax.Array:
        return jnp.sum(mix(process, clip(0), clip(1), level) ** 2)

    with jax.debug_nans(True):
        slope = jax.jit(jax.grad(energy))(
            jnp.broadcast_to(jnp.array([0.0, 1e-6, 0.5, 0.999, 1.0]), SHAPE[:2])
        )
    assert np.all(np.isfinite(slope))


def test_mixing_agrees_with_pusas_training_step():
    golden = np.load(GOLDEN / "pusa.npz")
    grid = golden["sched/train_timesteps"]
    # Pusa rounds the timestep to bfloat16 and takes the level of the nearest one on its grid.
    level = grid[np.abs(grid[:, None] - golden["train/timestep_bf16"].ravel()).argmin(0)] / np.float32(1000)
    clean, noise, noisy = (np.moveaxis(golden[f"train/{name}"], 1, -1) for name in ("x0", "noise", "noisy"))
    np.testing.assert_allclose(mix(flow, clean, noise, jnp.asarray(level)[None]), noisy, atol=1e-6)
