from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvdm_jax.levels import PUSA_LEVELS
from fvdm_jax.process import PROCESSES, ddpm, ddpm_v, expand, flow, mix
from fvdm_jax.weights import WEIGHTS, bump, min_snr, together, uniform

GOLDEN = Path(__file__).parent / "golden"
EVERY = pytest.mark.parametrize("name", WEIGHTS)
PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


@pytest.fixture(scope="module")
def golden() -> dict:
    return dict(np.load(GOLDEN / "pusa.npz")) | dict(np.load(GOLDEN / "pusa_weights.npz"))


def test_the_bump_is_pusas_on_its_grid(golden):
    level = jnp.asarray(golden["sched/train_timesteps"] / np.float32(1000))
    np.testing.assert_allclose(bump(level), golden["sched/train_weights"], atol=1e-5)
    assert float(jnp.mean(bump(level))) == pytest.approx(1, abs=1e-6)


def test_the_bump_is_largest_in_the_middle_and_exactly_0_at_the_ends():
    level = jnp.linspace(0, 1, 2001)
    weights = np.asarray(bump(level))
    assert weights[0] == 0 and weights[-1] == 0 and np.all(weights[1:-1] > 0)
    assert weights.argmax() == 1000 and weights.max() == pytest.approx(2.0764, abs=1e-4)
    assert np.abs(np.diff(weights)).max() < 0.005


def test_together_is_pusas_scalar_weight(golden):
    level = jnp.asarray(PUSA_LEVELS[golden["train/index"]])
    np.testing.assert_allclose(bump(level)[0], golden["train/weights"], atol=1e-5)
    weights = together(bump)(level)
    assert weights.shape == level.shape and np.all(weights == weights[:, :1])
    assert float(weights[0, 0]) * golden["train/mse"] == pytest.approx(golden["train/loss"], abs=1e-5)


def test_together_averages_each_clip_by_itself():
    level = jax.random.uniform(jax.random.key(0), (5, 4))
    means = np.asarray(bump(level)).mean(1, keepdims=True)
    np.testing.assert_allclose(together(bump)(level), np.repeat(means, 4, 1), rtol=1e-6)


@PROCESS
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_errors_of_the_clean_clip(process, gamma):
    """By brute force: put the output off by something and see how far off the clean clip is."""
    clean, noise, wrong = jax.random.normal(jax.random.key(1), (3, 2, 6, 2, 2, 3))
    level = jnp.array([[0.03, 0.1, 0.25, 0.5, 0.8, 0.97], [0.001, 0.3, 0.4, 0.6, 0.7, 0.999]])

    @jax.jit
    def both(level):
        said = process.target(clean, noise, level)
        x = mix(process, clean, noise, level)
        off = process.read(x, said + wrong, level).clean - process.read(x, said, level).clean
        snr = (process.alpha(level) / process.sigma(level)) ** 2
        wanted = expand(jnp.minimum(snr, gamma), off) * off**2
        ours = expand(min_snr(process, gamma)(level), wrong) * wrong**2
        return jnp.mean(ours, (2, 3, 4)), jnp.mean(wanted, (2, 3, 4))

    np.testing.assert_allclose(*both(level), rtol=1e-3)


def test_min_snr_in_its_published_forms():
    level = jnp.linspace(0.001, 0.999, 500)
    for process, form in (
        (ddpm, lambda snr: np.minimum(snr, 5) / snr),
        (ddpm_v, lambda snr: np.minimum(snr, 5) / (snr + 1)),
        (flow, lambda snr: np.minimum(snr, 5) / (np.sqrt(snr) + 1) ** 2),
    ):
        snr = np.square(np.float64(process.alpha(level)) / np.float64(process.sigma(level)))
        np.testing.assert_allclose(min_snr(process)(level), form(snr), rtol=1e-4)


@PROCESS
@EVERY
def test_a_clean_frame_weighs_nothing_and_no_weight_is_negative_or_infinite(name, process):
    weight = WEIGHTS[name](process)
    level = jnp.linspace(0, 1, 1001).reshape(7, 143)
    with jax.debug_nans(True):
        weights = jax.jit(weight)(level)
        slopes = jax.jit(jax.grad(lambda level: jnp.sum(weight(level))))(level)
    assert weights.shape == level.shape and weights.dtype == np.float32 and weights[0, 0] == 0
    assert np.all(weights >= 0) and weights.max() < 3 and np.all(np.isfinite(slopes))


def test_uniform_is_1_for_every_noised_frame():
    assert np.array_equal(uniform(jnp.array([[0.0, 1e-6, 0.5, 1.0]])), [[0, 1, 1, 1]])


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_gammas_are_refused(gamma):
    with pytest.raises(ValueError, match="gamma is"):
        min_snr(flow, gamma)
