"""What pictures and sets are from each other, against values that are known."""

import numpy as np
import pytest

from fvdm_jax import metrics


@pytest.fixture
def picture():
    return np.random.default_rng(0).uniform(-1, 1, (2, 16, 20, 3))


def test_equal_pictures_are_alike(picture):
    assert metrics.ssim(picture, picture) == pytest.approx(1, abs=1e-12)
    assert metrics.psnr(picture, picture) == float("inf")


def test_psnr_of_a_known_error():
    """A twentieth of the range of 2 in every pixel: 20·log₁₀ 20."""
    assert metrics.psnr(np.zeros((4, 4, 3)), np.full((4, 4, 3), 0.1)) == pytest.approx(26.0206, abs=1e-4)


def test_ssim_of_flat_pictures_is_that_of_their_light():
    """Without variance only the first factor of eq. 13 is left."""
    a, b, c1 = 0.5, -0.25, (0.01 * 2) ** 2
    found = metrics.ssim(np.full((12, 12, 3), a), np.full((12, 12, 3), b))
    assert found == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-12)


def test_ssim_is_the_formula_at_one_window():
    """A picture of just the window's size, by the weights written out."""
    x, y = np.random.default_rng(1).uniform(-1, 1, (2, 11, 11, 1))
    at = np.arange(11) - 5
    weight = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))[..., None]
    weight /= weight.sum()
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy, both = ((weight * p).sum() for p in ((x - mx) ** 2, (y - my) ** 2, (x - mx) * (y - my)))
    c1, c2 = 0.02**2, 0.06**2
    right = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert metrics.ssim(x, y) == pytest.approx(right, abs=1e-12)


def test_colours_in_cielab_are_the_published_ones():
    """Red, green and blue of sRGB as Lindbloom's calculator has them; greys have no colour.

    Its matrix has seven digits, and that of the standard four.
    """
    found = metrics.lab(np.eye(3))
    right = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(found, right, atol=0.03)
    np.testing.assert_allclose(metrics.lab(np.array([1.0, 1, 1])), [100, 0, 0], atol=1e-9)
    assert metrics.delta_e(np.eye(3)[0], np.eye(3)[1]) == pytest.approx(170.57, abs=0.05)


def test_the_distance_of_gaussians_is_the_closed_form():
    """In one dimension (μ − μ')² + (σ − σ')², along each axis of sets whose covariances commute."""
    rng = np.random.default_rng(2)
    one = rng.normal(size=(400, 3))
    white = (one - one.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(one, rowvar=False))).T
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    first, second = np.array([1.0, 2, 0.5]), np.array([2.0, 0.1, 0.5])
    shift = np.array([0.3, 0, -1])
    found = metrics.frechet(white * first @ turn, (white * second + shift) @ turn)
    assert found == pytest.approx(np.sum((first - second) ** 2) + shift @ shift, abs=1e-9)
    assert metrics.frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_the_distance_of_fewer_clips_than_numbers_is_finite():
    few = np.random.default_rng(3).normal(size=(4, 36))
    assert np.isfinite(metrics.frechet(few, few[::-1] + 1))
    with pytest.raises(ValueError, match="give 2 or more"):
        metrics.frechet(few[:1], few)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1)]
)
def test_the_interval_is_wilsons(hits, count, low, high):
    """The values of Newcombe 1998, method 3, formula 2.1, rounded to four digits."""
    found = metrics.wilson(hits, count)
    assert found[:3] == (hits, count, hits / count)
    assert found[3:] == pytest.approx((low, high), abs=1e-4)
