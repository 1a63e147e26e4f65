from functools import cache, partial

import jax
import numpy as np
import pytest

from fvdm_jax.levels import per_frame, ptss, scalar, shifted

KEY = jax.random.key(3407)
DRAWS = {
    "scalar": scalar,
    "per_frame": per_frame,
    "ptss": partial(ptss, probability=0.5),
    "ptss batch": partial(ptss, probability=0.5, coin="batch"),
    "shifted": shifted(per_frame, 5.0),
}


@cache
def drawn(draw, batch: int, frames: int, **options) -> np.ndarray:
    return np.asarray(jax.jit(partial(draw, **options), static_argnums=(1, 2))(KEY, batch, frames))


def distance(samples: np.ndarray, cdf) -> float:
    """Kolmogorov–Smirnov: the largest gap between the samples and the law they should follow."""
    samples = np.sort(samples)
    return float(np.abs(cdf(samples) - np.arange(1, len(samples) + 1) / len(samples)).max())


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_clip_does_not_depend_on_the_size_of_its_batch(draw):
    many = drawn(draw, 4000, 3)
    assert many.shape == (4000, 3) and many.dtype == np.float32 and many.min() >= 0 and many.max() < 1
    assert np.array_equal(drawn(draw, 2, 3), many[:2])
    assert len(np.unique(many[:, 0])) > 3900, "clips share their levels"


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_each_level_follows_the_stated_law(draw):
    levels = drawn(draw, 4000, 3)
    shift = 5 if draw is DRAWS["shifted"] else 1
    # 4000 draws of the law stay below 0.026 with probability 0.99.
    for frame in range(3):
        assert distance(levels[:, frame], lambda u: u / (shift - (shift - 1) * u)) < 0.026


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
