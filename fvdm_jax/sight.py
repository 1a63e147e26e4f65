"""What stands out in a clip of the synthetic world: where it is, of which colour, and which shape fits it.

Image processing alone, in NumPy. `fvdm_jax.judge` puts into words what is measured here.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fvdm_jax.data.source import COLOURS, SHAPES, distance, table

RADII = np.arange(0.1, 0.29, 0.01, np.float32)
"""Of templates, in heights of the frame."""
PHASES = 4
"""Templates are drawn at this many places between two pixels, along each axis."""


class View(NamedTuple):
    """A clip taken apart: its pixels [t H W 3], 0 … 1, the colour [3] behind, and that of each pixel [H W 3].

    `apart` [t H W] is how far a pixel is from the colour behind it.
    """

    pixels: np.ndarray
    tone: np.ndarray
    background: np.ndarray
    apart: np.ndarray


class Sight(NamedTuple):
    """Of each frame: where the shape is [t 2], its area [t], and how well templates fit [t shape radius]."""

    centres: np.ndarray
    areas: np.ndarray
    fits: np.ndarray


def parted(clip: np.ndarray) -> View:
    """Parts what moves in a clip from what stands still behind it."""
    pixels = (np.asarray(clip, np.float32) + 1) / 2
    sample = pixels[::4].reshape(-1, 3)
    tone = np.median(sample, 0)
    # Shapes pull the median of all pixels towards their colours.
    tone = np.median(sample[_apart(sample, tone) < 0.2], 0)
    bare = (_apart(pixels, tone) < 0.13).astype(np.float32)
    times = bare.sum(0)
    mean = np.einsum("thw,thwc->hwc", bare, pixels) / np.maximum(times, 1)[..., None]
    background = np.where(times[..., None] > 0, mean, tone)
    return View(pixels, tone, background, np.linalg.norm(pixels - background, axis=-1))


def _apart(pixels: np.ndarray, tone: np.ndarray) -> np.ndarray:
    """How far colours [... 3] are from a tone made lighter or darker, as backgrounds are by their relief."""
    off = pixels - tone
    grey = np.clip(off @ np.full(3, 1 / 3, np.float32), -0.15, 0.15)
    off -= grey[..., None]
    return np.sqrt(np.einsum("...c,...c->...", off, off))


def voted(view: View) -> np.ndarray:
    """How much of each frame has each of COLOURS [t colour], counting only what is not background."""
    frame, y, x = np.nonzero(view.apart > 0.2)
    off = view.pixels[frame, y, x, None] - table(COLOURS)
    nearest = np.einsum("nkc,nkc->nk", off, off).argmin(-1)
    colours, frames = len(COLOURS), len(view.pixels)
    # The edges of shapes, which are mixed with the background, may look like another colour.
    weight = view.apart[frame, y, x] ** 2
    votes = np.bincount(frame * colours + nearest, weight, frames * colours)
    return votes.reshape(frames, colours)


def nearer(pixels: np.ndarray, colour: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where pixels [t H W 3] are more like one colour [3] than like another."""
    return pixels @ (colour - other) > (colour @ colour - other @ other) / 2


def covered(view: View, colours: np.ndarray) -> np.ndarray:
    """How much of each pixel [t H W] a shape of these colours [t 3] covers.

    What is between 1/4 and 3/4 is stretched to 0 … 1, against noise and blur, which leaves edges in place.
    """
    off = view.pixels - view.background
    full = colours[:, None, None] - view.background
    square = np.einsum("thwc,thwc->thw", full, full)
    cover = np.einsum("thwc,thwc->thw", off, full) / np.maximum(square, 0.04)
    off -= np.clip(cover, 0, 1)[..., None] * full
    strange = np.einsum("thwc,thwc->thw", off, off) > 0.25**2
    return np.where(strange, 0, np.clip(2 * cover - 0.5, 0, 1))


def located(cover: np.ndarray) -> Sight:
    """Where the shape that covers pixels [t H W] is, and what it looks like."""
    _, height, width = cover.shape
    centres = _centres(cover)
    return Sight(centres, cover.sum((1, 2)) / height**2, _fits(cover, centres))


def _centres(cover: np.ndarray) -> np.ndarray:
    """The middle [t 2] of what covers pixels [t H W], without what is far from where most of it is."""
    _, height, width = cover.shape
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / height
    near_y, near_x = (abs(a[:, None] - a) < 0.15 for a in (y, x))
    crowd = near_y.astype(np.float32) @ cover @ near_x.astype(np.float32)
    top, left = np.divmod(crowd.reshape(len(cover), -1).argmax(-1), width)
    at_y, at_x = y[top], x[left]
    for _ in range(4):
        part_y, part_x = abs(y - at_y[:, None]) < 0.29, abs(x - at_x[:, None]) < 0.29
        part = cover * (part_y[:, :, None] & part_x[:, None])
        # Where there is nothing, the middle stays.
        part[np.arange(len(part)), top, left] += 1e-6
        mass = part.sum((1, 2))
        at_y, at_x = part.sum(2) @ y / mass, part.sum(1) @ x / mass
    return np.stack([at_x * height / width, at_y], -1)


@lru_cache(maxsize=4)
def _templates(height: int) -> np.ndarray:
    """Every shape at every radius and place between pixels [phase_y phase_x shape radius side side]."""
    half = _half(height)
    ticks = np.arange(-half, half + 1, dtype=np.float32) - np.arange(PHASES)[:, None] / PHASES
    ticks = (ticks / height).astype(np.float32)
    y, x = ticks[:, None, None, :, None], ticks[None, :, None, None, :]
    away = np.asarray(distance(x, y, RADII[:, None, None]))
    return np.moveaxis(np.clip(0.5 - away * height, 0, 1), 0, 2).astype(np.float32)


def _half(height: int) -> int:
    return int(np.ceil(0.32 * height))


def _fits(cover: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Overlap, intersection over union, of what covers pixels [t H W] with templates [t shape radius]."""
    _, height, width = cover.shape
    templates, half = _templates(height), _half(height)
    place = np.round((centres * [width, height] - 0.5) * PHASES).astype(int)
    whole, phase = np.divmod(place, PHASES)
    padded = np.pad(cover, ((0, 0), (half, half), (half, half)))
    fits = []
    for frame, (x, y), (right, down) in zip(padded, whole, phase, strict=True):
        ideal = templates[down, right].reshape(len(SHAPES) * len(RADII), -1)
        seen = frame[y : y + 2 * half + 1, x : x + 2 * half + 1].ravel()
        both = ideal @ seen
        fits.append(both / (np.einsum("np,np->n", ideal, ideal) + frame.ravel() @ frame.ravel() - both))
    return np.stack(fits).reshape(-1, len(SHAPES), len(RADII))
