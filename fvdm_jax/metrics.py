"""How far pictures and sets of clips are from each other, and how sure a rate is: NumPy alone."""

from typing import NamedTuple

import numpy as np

WINDOW, SPREAD = 11, 1.5
"""Side and standard deviation, in pixels, of the Gaussian window of `ssim`."""


class Rate(NamedTuple):
    """`hits` of `count`, and an interval that holds the true rate in 95 of 100 cases."""

    hits: int
    count: int
    rate: float
    low: float
    high: float


def psnr(pictures: np.ndarray, others: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of arrays of one shape, −1 … 1, over all that they hold.

    Infinite where they are equal.
    """
    error = np.mean(np.square(np.asarray(pictures, np.float64) - others))
    return float(10 * np.log10(4 / error)) if error else float("inf")


def ssim(pictures: np.ndarray, others: np.ndarray) -> float:
    """Mean structural similarity of pictures [… H W 3], −1 … 1, with sides of 11 pixels or more.

    Source: Wang et al. 2004 (IEEE Trans. Image Process. 13:600), eq. 13, with K₁ 0.01, K₂ 0.03 and the
    11 × 11 Gaussian window where it lies within the picture; of each of the three colours, where the paper
    takes grey.
    """
    x, y = np.asarray(pictures, np.float64), np.asarray(others, np.float64)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_x, mean_y = _blurred(x), _blurred(y)
    xx, yy, xy = (
        _blurred(p) - m for p, m in ((x * x, mean_x**2), (y * y, mean_y**2), (x * y, mean_x * mean_y))
    )
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(light * (2 * xy + c2) / (xx + yy + c2)))


def _blurred(pictures: np.ndarray) -> np.ndarray:
    """The means of pictures [… H W c] under the window, at every place where all of it lies within."""
    weight = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SPREAD) ** 2)
    weight /= weight.sum()
    for axis in (-3, -2):
        pictures = np.lib.stride_tricks.sliding_window_view(pictures, WINDOW, axis) @ weight
    return pictures


def lab(colours: np.ndarray) -> np.ndarray:
    """CIELAB of colours [… 3] in sRGB, 0 … 1, under D65.

    Source: IEC 61966-2-1 for sRGB and its white; CIE 15:2004, eq. 8.3–8.8, for L*, a* and b*.
    """
    rgb = np.clip(np.asarray(colours, np.float64), 0, 1)
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    # Over the white that the matrix gives, so that greys have no colour.
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e(colours: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How unlike colours [… 3] in sRGB, 0 … 1, look: their distance […] in CIELAB; 2.3 is just seen.

    Source: ΔE*ab of 1976 (CIE 15:2004, eq. 8.22).
    """
    return np.linalg.norm(lab(colours) - lab(others), axis=-1)


def frechet(features: np.ndarray, others: np.ndarray) -> float:
    """The squared Fréchet distance of two sets of features [n d], as if they were Gaussian; n at least 2.

    |μ − μ'|² + tr(Σ + Σ' − 2·(√Σ·Σ'·√Σ)^½). It falls as sets grow: compare only values of equal n. Source:
    Dowson and Landau 1982 (J. Multivariate Anal. 12:450), in the symmetric form, whose roots are real.
    """
    x, y = np.asarray(features, np.float64), np.asarray(others, np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"sets of {len(x)} and {len(y)} have no covariance; give 2 or more of each")
    a, b = (np.atleast_2d(np.cov(each, rowvar=False)) for each in (x, y))
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    both = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a) + np.trace(b) - 2 * both)


def wilson(hits: int, count: int, z: float = 1.959964) -> Rate:
    """The rate of `hits` among `count`, at least 1, with its Wilson score interval.

    Source: Wilson 1927 (J. Am. Stat. Assoc. 22:209); by z it holds 95 of 100.
    """
    rate, share = hits / count, z * z / count
    middle = (rate + share / 2) / (1 + share)
    off = z / (1 + share) * np.sqrt(rate * (1 - rate) / count + share / (4 * count))
    return Rate(hits, count, rate, max(0.0, float(middle - off)), min(1.0, float(middle + off)))
