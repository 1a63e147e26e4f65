"""What is measured of one clip of a case, and what becomes of it over many.

A score that makes no sense for a case is not there. True and false are counted, numbers are averaged.
"""

from typing import NamedTuple

import numpy as np

from fvdm_jax import judge, metrics
from fvdm_jax.data.source import Scene
from fvdm_jax.evaluating.cases import Case
from fvdm_jax.video import STRIDE

FEATURES = (
    "36 numbers a clip, over the spread of the reference set: the mean colour of each quarter of the frame"
    " (12), how much the light of each sixteenth changes in time (16), and of the judge's reading the start"
    " and the velocity of the shape, its mean area, speed, distance from a straight way, and the mean change"
    " of a frame (8). Nothing is learned; distances are only comparable with these features and equal numbers"
    " of clips."
)

Score = bool | float
FLAWS = ("frozen", "drift_shape", "drift_colour")
"""Scores that had better be false."""
LIKENESS = ("psnr", "ssim", "psnr_true", "ssim_true")


class Clip(NamedTuple):
    """One clip [t H W 3], −1 … 1, with the true one of its scene, and what the judge reads of both."""

    pixels: np.ndarray
    true: np.ndarray
    reading: judge.Reading
    truth: judge.Reading
    scene: Scene
    i: int


def judged(clip: Clip) -> dict[str, Score]:
    """Whether the clip shows what its caption says, and how it moves beside the true one.

    `path` is the way of the shape over the true one's, `change` that of a frame over that of the data's.
    """
    verdict = judge.compare(clip.reading, clip.scene, clip.i)
    ways = [_way(reading) for reading in (clip.reading, clip.truth)]
    still = judge.STILL * (len(clip.pixels) - 1) / (judge.LENGTH - 1)
    return verdict._asdict() | {
        "all": bool(verdict.all),
        "path": ways[0] / max(ways[1], 1e-6),
        "frozen": bool(ways[0] < still),
        "change": clip.reading.jump / max(clip.truth.jump, 1e-6),
    }


def _way(reading: judge.Reading) -> float:
    """How far the shape goes; from every fourth frame, since the noise of each adds up."""
    return float(np.linalg.norm(np.diff(reading.centres[::STRIDE], axis=0), axis=-1).sum())


def kept(clip: Clip, case: Case, alone: list[np.ndarray]) -> dict[str, Score]:
    """How the frames that were given come out, and how the others go on from them.

    `alone` has of each Kept what the VAE makes of it by itself, the `…_true` compare with the original. A
    shape `continues` where a clip was given at the beginning alone, and `reaches` a frame given at the end.
    """
    if not case.kept:
        return {}
    places = [one.pixels for one in case.kept]
    shown, true = (np.concatenate([p[at] for at in places]) for p in (clip.pixels, clip.true))
    by_itself = np.concatenate(alone)
    values = (f(shown, other) for other in (by_itself, true) for f in (metrics.psnr, metrics.ssim))
    found: dict[str, Score] = {f"kept_{n}": value for n, value in zip(LIKENESS, values, strict=True)}
    first = case.kept[0]
    if len(case.kept) == 1 and first.count > 1:
        went_on, error = judge.continues(clip.reading, clip.scene, clip.i, first.pixels.stop)
        found |= {"continues": bool(went_on), "speed_error": float(error)}
    if case.latents - 1 in case.given and case.kept[-1].count == 1:
        found["reaches"] = bool(judge.reaches(clip.reading, clip.true[-1]))
    return found


def seams(clip: Clip, case: Case) -> dict[str, Score]:
    """The jumps where what was given, or another window, ends: the mean over such places of `judge.Seam`."""
    if not case.seams:
        return {}
    found = judge.seams(clip.pixels, clip.reading, case.seams)
    means = np.mean(found, axis=0)
    return {f"seam_{name}": float(mean) for name, mean in zip(judge.Seam._fields, means, strict=True)}


def drift(clip: Clip, case: Case) -> dict[str, Score]:
    """What changes from the first to the last window of a long video: per cent, ΔE, and whether words do."""
    if case.windows == 1:
        return {}
    window = 1 + STRIDE * (case.window - 1)
    start = len(clip.pixels) - window
    first, last = judge.read(clip.pixels[:window]), judge.read(clip.pixels[start:], start)
    tones = [np.median((p + 1) / 2, (0, 1, 2)) for p in (clip.pixels[:window], clip.pixels[start:])]
    # Over what was there first, but not over nothing: a tenth of the slowest speed and of the smallest area.
    change = {
        "drift_area": (last.areas.mean(), max(first.areas.mean(), 0.005)),
        "drift_speed": (last.speed, max(first.speed, 0.03)),
    }
    return {name: float(100 * abs(a / b - 1)) for name, (a, b) in change.items()} | {
        "drift_delta_e": float(metrics.delta_e(*tones)),
        "drift_shape": first.shape != last.shape,
        "drift_colour": first.colour != last.colour,
    }


def scored(clip: Clip, case: Case, alone: list[np.ndarray]) -> dict[str, Score]:
    """All scores of a clip of a case."""
    return judged(clip) | kept(clip, case, alone) | seams(clip, case) | drift(clip, case)


def features(pixels: np.ndarray, reading: judge.Reading) -> np.ndarray:
    """The numbers [36] of FEATURES, of a clip [t H W 3], as they are before they are scaled."""
    mean = _cells(pixels.mean(0), 2)
    light = _cells(pixels.mean(-1, keepdims=True).std(0), 4)
    path = reading.path
    said = reading.areas.mean(), reading.speed, path.residual, reading.jump
    return np.concatenate([mean.ravel(), light.ravel(), path.start, path.velocity, said])


def _cells(picture: np.ndarray, count: int) -> np.ndarray:
    """The means of a picture [H W c] over count × count equal parts; what does not divide is left out."""
    height, width = (side // count for side in picture.shape[:2])
    cut = picture[: height * count, : width * count]
    return cut.reshape(count, height, count, width, -1).mean((1, 3))


def distance(found: np.ndarray, reference: np.ndarray) -> float | None:
    """The Fréchet distance of features [n 36] to a reference set, by whose spread they are scaled.

    None for fewer than two.
    """
    if min(len(found), len(reference)) < 2:
        return None
    # What hardly varies in the reference says nothing in multiples of its spread.
    spread = np.maximum(reference.std(0), 1e-3)
    return metrics.frechet(found / spread, reference / spread)


def summary(rows: list[dict[str, Score]]) -> dict[str, dict]:
    """Rates with their intervals; means, medians and spreads, and how many are exact, by the score's name."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if isinstance(values[0], bool):
            found[name] = metrics.wilson(sum(values), len(values))._asdict()
        else:
            # Frames that come out as they were given have an infinite PSNR, of which there is no mean.
            finite = np.array([value for value in values if np.isfinite(value)])
            means = [float(f(finite)) if len(finite) else None for f in (np.mean, np.median, np.std)]
            exact = len(values) - len(finite)
            found[name] = dict(zip(("mean", "median", "spread"), means, strict=True))
            found[name] |= {"count": len(finite), "exact": exact}
    return found
