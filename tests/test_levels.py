from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvdm_jax.levels import (
    PUSA_LEVELS,
    at,
    clean,
    constant,
    copula,
    ends,
    linear,
    logit_normal,
    mixture,
    per_frame,
    prefix,
    ptss,
    pusa_grid,
    ramp,
    scalar,
    shifted,
    subset,
    suffix,
)

GOLDEN = Path(__file__).parent / "golden"
KEY = jax.random.key(3407)
WHERE = {"prefix": prefix, "suffix": suffix, "ends": ends, "subset": subset}
DRAWS = {
    "scalar": scalar,
    "per_frame": per_frame,
    "ptss": partial(ptss, probability=0.5),
    "ptss batch": partial(ptss, probability=0.5, coin="batch"),
    "shifted": shifted(per_frame, 5.0),
    "copula": partial(copula, correlation=0.7),
    "logit_normal": logit_normal(scalar, 0.5, 1.5),
    "mixture": mixture([scalar, per_frame], [3, 1]),
}
LAWS = {
    DRAWS["shifted"]: lambda u: u / (5 - 4 * u),
    DRAWS["logit_normal"]: lambda u: normal_cdf((np.log(u) - np.log1p(-u) - 0.5) / 1.5),
}
"""Their cumulative distributions; of all others it is that of uniform levels."""
OTHERS = {
    "ramp": ramp,
    "pusa_grid": pusa_grid,
    **{name: clean(per_frame, where) for name, where in WHERE.items()},
}


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.scipy.special.ndtr(jnp.asarray(x)))


@cache
def drawn(draw, batch: int, frames: int, **options) -> np.ndarray:
    return np.asarray(jax.jit(partial(draw, **options), static_argnums=(1, 2))(KEY, batch, frames))


def distance(samples: np.ndarray, cdf) -> float:
    """Kolmogorov–Smirnov: the largest gap between the samples and the law they should follow."""
    samples = np.sort(samples)
    return float(np.abs(cdf(samples) - np.arange(1, len(samples) + 1) / len(samples)).max())


@pytest.mark.parametrize("draw", (DRAWS | OTHERS).values(), ids=DRAWS | OTHERS)
def test_a_clip_does_not_depend_on_the_size_of_its_batch(draw):
    frames = 3 if draw in DRAWS.values() else 6
    many = drawn(draw, 4000, frames)
    assert many.shape == (4000, frames) and many.dtype == np.float32 and many.min() >= 0 and many.max() <= 1
    assert np.array_equal(drawn(draw, 2, frames), many[:2])
    if draw in DRAWS.values():
        assert len(np.unique(many[:, 0])) > 3900 and many.max() < 1, "clips share their levels"


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_each_level_follows_the_stated_law(draw):
    levels, law = drawn(draw, 4000, 3), LAWS.get(draw, lambda u: u)
    # 4000 draws of the law stay below 0.026 with probability 0.99.
    for frame in range(3):
        assert distance(levels[:, frame], law) < 0.026


def test_scalar_gives_equal_and_per_frame_independent_levels():
    equal, free = drawn(scalar, 4000, 3), drawn(per_frame, 4000, 3)
    assert np.all(equal == equal[:, :1])
    # The correlation of 4000 independent pairs stays below 0.05 with probability 0.998.
    assert np.abs(np.corrcoef(free.T) - np.eye(3)).max() < 0.05


def test_ptss_tosses_for_each_clip():
    levels = drawn(ptss, 4000, 3)
    apart = np.any(levels != levels[:, :1], axis=1)
    # Four standard deviations of 4000 tosses at 0.2.
    assert abs(apart.mean() - 0.2) < 0.026


def test_ptss_tosses_once_for_a_batch():
    draw = jax.jit(jax.vmap(lambda key: ptss(key, 4, 3, probability=0.5, coin="batch")))
    batches = np.asarray(draw(jax.random.split(KEY, 400)))
    apart = np.any(batches != batches[:, :, :1], axis=2)
    assert np.all(apart == apart[:, :1])
    # Four standard deviations of 400 tosses at 0.5.
    assert abs(apart[:, 0].mean() - 0.5) < 0.1


@pytest.mark.parametrize("coin", ["clip", "batch"])
def test_ptss_has_scalar_and_per_frame_at_its_ends(coin):
    for probability, same in ((0.0, True), (1.0, False)):
        levels = drawn(ptss, 40, 3, probability=probability, coin=coin)
        assert np.all((levels[:, 0] == levels[:, 1]) == same)


def test_an_unknown_coin_is_refused():
    with pytest.raises(ValueError, match="'rank'; give 'clip' or 'batch'"):
        ptss(KEY, 2, 3, coin="rank")


def test_the_law_of_pusa():
    levels = drawn(DRAWS["shifted"], 4000, 3)
    # Four standard deviations of 12,000 draws, 0.22 for a level and 0.49 for the share.
    assert abs(levels.mean() - 0.7475) < 0.008
    assert abs((levels >= 0.875).mean() - 0.419) < 0.018


@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf")])
def test_impossible_shifts_are_refused(shift):
    with pytest.raises(ValueError, match="shift is"):
        shifted(scalar, shift)


def test_shift_1_changes_nothing_and_options_pass_through():
    np.testing.assert_allclose(drawn(shifted(per_frame, 1.0), 9, 3), drawn(per_frame, 9, 3), atol=1e-7)
    equal = drawn(shifted(ptss, 5.0), 9, 3, probability=0.0)
    assert np.all(equal == equal[:, :1])


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9, 1.0])
def test_frames_of_a_copula_correlate_as_stated(correlation):
    levels = drawn(copula, 4000, 4, correlation=correlation)
    stated = np.where(np.eye(4), 1, 6 / np.pi * np.arcsin(correlation / 2))
    # Four standard deviations, at most 1/√4000, of a correlation of 4000 pairs.
    np.testing.assert_allclose(np.corrcoef(levels.T), stated, atol=0.06)
    assert np.all(levels == levels[:, :1]) == (correlation == 1)


def test_the_correlation_may_be_traced_and_has_a_slope_everywhere():
    both = jax.jit(
        jax.value_and_grad(lambda c: (jnp.sum(levels := copula(KEY, 40, 4, c)), levels), has_aux=True)
    )
    for correlation in (0.0, 0.3, 1.0):
        (_, traced), slope = both(correlation)
        np.testing.assert_allclose(traced, drawn(copula, 4000, 4, correlation=correlation)[:40], atol=1e-6)
        assert np.isfinite(slope)
    assert np.all(traced == traced[:, :1])


def test_ptss_is_the_mixture_of_the_ends_of_a_copula():
    mixed = mixture([partial(copula, correlation=1.0), partial(copula, correlation=0.0)], [0.8, 0.2])
    ours, theirs = drawn(mixed, 4000, 3), drawn(ptss, 4000, 3)
    shares = [np.any(levels != levels[:, :1], axis=1).mean() for levels in (ours, theirs)]
    # Four standard deviations of 4000 tosses at 0.2.
    np.testing.assert_allclose(shares, 0.2, atol=0.026)
    ranges = [np.sort(np.ptp(levels[np.ptp(levels, axis=1) > 0], axis=1)) for levels in (ours, theirs)]
    # The range of three independent levels has the law 3r² − 2r³; 750 stay below 0.06 with probability 0.99.
    for spread in ranges:
        assert distance(spread, lambda r: 3 * r**2 - 2 * r**3) < 0.06


def test_a_mixture_takes_its_draws_in_proportion():
    level = (lambda key, batch, frames, at=at: jnp.full((batch, frames), at) for at in (0.1, 0.2, 0.3, 0.4))
    draw, weights = tuple(level), np.array([1.0, 0.0, 2.0, 5.0])
    levels = jax.jit(lambda weights: mixture(draw, weights)(KEY, 4000, 2))(weights)
    shares = [np.mean(np.isclose(levels, at)) for at in (0.1, 0.2, 0.3, 0.4)]
    # Four standard deviations of 4000 choices; a draw of weight 0 never comes.
    np.testing.assert_allclose(shares, weights / 8, atol=0.032)
    assert shares[1] == 0


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, np.nan], [1, np.inf]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="one weight for each|numbers from 0"):
        mixture([scalar, per_frame], weights)


@pytest.mark.parametrize("name", WHERE)
def test_where_frames_are_clean(name):
    frames = 6
    given = drawn(OTHERS[name], 4000, frames) == 0
    count, starts, stops = given.sum(1), np.argmin(given, 1), np.argmin(given[:, ::-1], 1)
    assert count.max() < frames, "nothing is left to generate"
    if name == "subset":
        # Of 2⁶ subsets 2⁵ have a frame, and the one of all frames is left as drawn; ± 4 deviations.
        np.testing.assert_allclose(given.mean(0), 31 / 64, atol=0.032)
        return
    assert np.array_equal(count, {"prefix": starts, "suffix": stops, "ends": starts + stops}[name])
    assert np.all(count > 0) and (name != "ends" or np.all((starts > 0) & (stops > 0)))
    kinds = np.unique(np.stack([starts, stops]), axis=1, return_counts=True)[1]
    # Every length, or pair of lengths, as often as any other, ± 4 deviations.
    assert len(kinds) == (10 if name == "ends" else 5)
    np.testing.assert_allclose(kinds, 4000 / len(kinds), atol=4 * np.sqrt(4000 / len(kinds)))


@pytest.mark.parametrize("name", WHERE)
def test_what_is_not_clean_is_as_drawn_and_one_frame_is_never_clean(name):
    levels = drawn(clean(scalar, WHERE[name]), 400, 5)
    assert np.all((levels == 0) | (levels == levels.max(1, keepdims=True)))
    assert np.all(drawn(clean(scalar, WHERE[name]), 400, 1) > 0)


def test_named_frames_are_clean():
    given = drawn(clean(per_frame, at(0, 1, -1)), 50, 6) == 0
    assert np.array_equal(np.unique(given, axis=0), [[True, True, False, False, False, True]])
    with pytest.raises(IndexError):
        at(9)(KEY, 9)


def test_a_subset_has_its_probability():
    given = drawn(clean(per_frame, partial(subset, probability=0.1)), 4000, 6) == 0
    # Four standard deviations of 4000 tosses at 0.1.
    np.testing.assert_allclose(given.mean(0), 0.1, atol=0.019)


@pytest.mark.parametrize("width", [None, 1.0, 4.0])
def test_ramps_rise_from_clean_to_noise(width):
    levels = drawn(ramp, 4000, 6, width=width)
    assert np.all(np.diff(levels, axis=1) >= 0) and np.all(levels[:, -1] > 0) and np.all(levels[:, 0] < 1)
    between = (levels > 0) & (levels < 1)
    assert between.sum(1).max() <= (width or 6) and between.any(0).all()
    steps = np.diff(levels, axis=1)[between[:, 1:] & between[:, :-1]]
    if width is None:
        assert 1 / 6 < steps.min() < 0.17 and steps.max() > 0.8
    elif len(steps):
        np.testing.assert_allclose(steps, 1 / width, atol=1e-6)


def test_the_phase_of_a_ramp_is_uniform():
    levels = drawn(ramp, 4000, 6, width=1.0)
    # With width 1 the frames that are done count the phase: 0 to 5 of them, equally often, ± 4 deviations.
    done = np.unique((levels == 0).sum(1), return_counts=True)
    assert done[0].tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(done[1], 4000 / 6, atol=4 * np.sqrt(4000 / 6))


def test_pusas_grid_is_the_golden_one():
    golden = np.load(GOLDEN / "pusa.npz")
    grid = golden["sched/train_timesteps"] / np.float32(1000)
    snapped = {0: 0, 1: 0, 10: 20, 100: 93, 250: 255, 500: 502, 750: 751, 900: 900, 990: 990, 999: 999}
    np.testing.assert_allclose(PUSA_LEVELS[list(snapped)], grid[list(snapped.values())], atol=1e-7)
    assert len(np.unique(PUSA_LEVELS)) == 294

    def rounded(timesteps: np.ndarray) -> np.ndarray:
        return timesteps.astype(jnp.bfloat16).astype(np.float32)

    assert np.array_equal(rounded(1000 * PUSA_LEVELS), rounded(golden["sched/train_timesteps"]))
    assert np.array_equal(rounded(1000 * PUSA_LEVELS[golden["train/index"]]), golden["train/timestep_bf16"])


def test_pusas_draw_is_uniform_over_its_grid():
    levels = drawn(pusa_grid, 4000, 6)
    assert np.all(np.isin(levels, PUSA_LEVELS))
    # Four standard deviations of 24,000 draws, 0.22 for a level and 0.49 for the share.
    assert abs(levels.mean() - 0.7475) < 0.006
    assert abs((levels >= 0.875).mean() - 0.419) < 0.013
    # Four standard deviations of a correlation of 4000 pairs.
    assert np.abs(np.corrcoef(levels.T) - np.eye(6)).max() < 0.063


def test_logit_normal_keeps_the_ends_and_has_slopes():
    ends = jnp.array([[0.0, 1e-7, 0.5, 1 - 1e-7, 1.0]])

    def moved(levels):
        return logit_normal(lambda key, batch, frames: levels)(KEY, 1, 5)

    with jax.debug_nans(True):
        levels, slopes = moved(ends), jax.jit(jax.grad(lambda levels: jnp.sum(moved(levels))))(ends)
    assert levels[0, 0] == 0 and levels[0, 4] == 1 and levels[0, 2] == 0.5
    assert np.all(np.diff(levels[0]) > 0) and np.all(np.isfinite(slopes))


@pytest.mark.parametrize("wrong", [
    lambda: copula(KEY, 2, 3, 1.5), lambda: copula(KEY, 2, 3, float("nan")), lambda: ramp(KEY, 2, 3, 0.0),
    lambda: logit_normal(scalar, std=0.0), lambda: linear(3, 5, 5, 0.0, 1.0),
])  # fmt: skip
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="; give "):
        wrong()


def test_linear_goes_from_first_to_last_and_stays():
    values = [float(linear(step, 100, 300, 0.5, 0.2)) for step in (0, 100, 200, 300, 999)]
    np.testing.assert_allclose(values, [0.5, 0.5, 0.35, 0.2, 0.2], atol=1e-7)
    assert values[0] == 0.5 and values[-1] == np.float32(0.2)


def test_a_curriculum_compiles_once_for_all_steps():
    def curriculum(step):
        apart = linear(step, 0, 1000, 0.0, 1.0)
        ptss_then = partial(ptss, probability=apart)
        return mixture([ptss_then, partial(copula, correlation=1 - apart)], [apart, 1 - apart])

    draw = jax.jit(lambda step, key: curriculum(step)(key, 400, 3))
    apart = []
    for step in (0, 500, 1000):
        levels = np.asarray(draw(step, KEY))
        apart.append(np.any(levels != levels[:, :1], axis=1).mean())
    assert draw._cache_size() == 1
    # At 500 all of the copula's half and half of the other; four standard deviations of 400 tosses.
    assert apart[0] == 0 and apart[2] == 1 and abs(apart[1] - 0.75) < 0.09
    assert constant(scalar)(3) is scalar
