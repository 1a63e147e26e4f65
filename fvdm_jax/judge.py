"""Says what a clip of the synthetic world shows: which shape, of what colour and size, and how it moves.

Image processing alone: no network, nothing learned and nothing random. `fvdm_jax.data.source` draws what is
read here. Clips are [t H W 3], −1 … 1, of square frames; places are x and y, 0 … 1; lengths are in heights
of the frame, and velocities per clip of LENGTH frames. What cannot be seen is said to be NOTHING.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fvdm_jax.data.source import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    TONES,
    Scene,
    distance,
    table,
    velocity,
)

LENGTH = 33
NOTHING = "nothing"
FIT = 0.6
"""Least overlap of a shape with its ideal, intersection over union: less is no shape."""
AREA = 0.5, 1.6
"""Least and greatest area of a shape that is there, of what its name and size promise."""
STRAY, WORST = 0.015, 0.04
"""Greatest distance of a shape from its path, over the clip (RMS) and in any frame."""
JUMP = 2.5
"""Greatest change between two frames, of the median change."""
STILL = 0.5 * min(SPEEDS.values())
"""Least speed of a shape that moves."""
RADII = np.arange(0.1, 0.29, 0.01, np.float32)
PHASES = 4
"""Templates are drawn at this many places between two pixels, along each axis."""


class Path(NamedTuple):
    """A motion in a straight line that walls reflect: `start`, x and y, and `velocity`, both at frame 0.

    `residual` is the RMS distance of what was seen, and `worst` that of the frame furthest off.
    """

    start: np.ndarray
    velocity: np.ndarray
    residual: float
    worst: float


class Reading(NamedTuple):
    """What one shape of a clip is and does, in the words of the world, and what was measured of it.

    By frame: `shapes` and `colours` (words), `centres` [t 2], `areas` [t] in squared heights, `present` [t],
    and `clear` [t]: whether no other shape is in the way. `first` is the number of the first frame.
    """

    shape: str
    colour: str
    size: str
    direction: str
    speed: float
    tone: str
    path: Path
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    centres: np.ndarray
    areas: np.ndarray
    present: np.ndarray
    clear: np.ndarray
    first: int
    jump: float
    largest_jump: float


class Verdict(NamedTuple):
    """Which of the things asked for a clip shows."""

    shape: bool
    colour: bool
    size: bool
    direction: bool
    speed: bool
    tone: bool
    possible: bool
    smooth: bool
    kept: bool

    @property
    def all(self) -> bool:
        return all(self)


class Seam(NamedTuple):
    """A place where two windows meet: its change of colour over the usual one, its step over the path's."""

    colour: float
    motion: float


class _View(NamedTuple):
    """A clip taken apart: its pixels [t H W 3], 0 … 1, the colour [3] behind, and that of each pixel [H W 3].

    `apart` [t H W] is how far a pixel is from the colour behind it.
    """

    pixels: np.ndarray
    tone: np.ndarray
    background: np.ndarray
    apart: np.ndarray


class _Sight(NamedTuple):
    """Of each frame: where the shape is [t 2], its area [t], and how well templates fit [t shape radius]."""

    centres: np.ndarray
    areas: np.ndarray
    fits: np.ndarray


def read(clip: np.ndarray, start: int = 0) -> Reading:
    """What the shape of a clip [t H W 3] is and does; `start` is the number of its first frame."""
    view = _view(clip)
    votes = _votes(view)
    colours = votes.argmax(-1)
    sight = _sight(_cover(view, table(COLOURS)[colours]))
    return _reading(view, sight, colours, start, np.ones(len(clip), bool))


def read_pair(clip: np.ndarray, scene: Scene, i: int, start: int = 0) -> tuple[Reading, Reading]:
    """What the two shapes of a clip [t H W 3] are and do, found by the colours that scene `i` asks.

    Frames in which the one in front hides some of the one behind say nothing of the one behind.
    """
    view = _view(clip)
    asked = scene.colour[i]
    colours = table(COLOURS)[asked]
    sights = [
        _sight(_cover(view, colours[None, w]) * _nearer(view.pixels, *colours[[w, 1 - w]])) for w in (0, 1)
    ]
    behind = sights[1].areas
    clear = np.ones(len(clip), bool), behind >= 0.95 * np.quantile(behind, 0.9)
    front, back = (
        _reading(view, s, np.full(len(clip), k), start, c)
        for s, k, c in zip(sights, asked, clear, strict=True)
    )
    return front, back


def compare(reading: Reading, scene: Scene, i: int, which: int = 0) -> Verdict:
    """Whether a clip shows what scene `i` asks of its shape `which`."""

    def asked(words, indices) -> str:
        return list(words)[indices[i, which]]

    shape, colour = asked(SHAPES, scene.shape), asked(COLOURS, scene.colour)
    speed = np.linalg.norm(velocity(scene)[i, which])
    clear = np.flatnonzero(reading.clear)
    end = clear[-max(len(clear) // 4, 1) :]
    same = [(reading.shapes[k], reading.colours[k]) == (shape, colour) for k in end]
    path = reading.path
    return Verdict(
        shape=reading.shape == shape,
        colour=reading.colour == colour,
        size=reading.size == asked(SIZES, scene.size),
        direction=reading.direction == asked(DIRECTIONS, scene.direction),
        speed=bool(abs(reading.speed - speed) < 0.35 * speed),
        tone=reading.tone == list(TONES)[scene.tone[i]],
        possible=bool(reading.present.all()) and path.residual < STRAY and path.worst < WORST,
        smooth=reading.largest_jump < JUMP,
        kept=float(np.mean(same)) >= 0.75,
    )


def reaches(reading: Reading, picture: np.ndarray) -> bool:
    """Whether a clip ends as a picture [H W 3] shows: the same shape and colour, at the same place."""
    goal = read(picture[None])
    away = np.linalg.norm(reading.centres[-1] - goal.centres[0])
    same = reading.shapes[-1] == goal.shapes[0] and reading.colours[-1] == goal.colours[0]
    return bool(same and goal.shapes[0] != NOTHING and away < 0.06)


def continues(reading: Reading, scene: Scene, i: int, after: int) -> tuple[bool, float]:
    """Whether the shape goes on as scene `i` says from frame `after` on, and the relative error of its speed.

    The speed is that along the reflected path. It may be 10 % off, and the place on the path at `after`
    may be 0.25 off: without a bound on that, a shape that turns back could not be told from a reflected one.
    """
    margin = float(table(SIZES)[scene.size[i, 0]])
    asked, time = velocity(scene)[i, 0], after / (LENGTH - 1)
    times = (reading.first + np.arange(len(reading.centres))) / (LENGTH - 1)
    late = reading.clear & (times >= time - 1e-6)
    if not late.any():
        raise ValueError(f"no frame from {after} on shows the shape: give a frame of the clip")
    seen = np.array(reading.shapes)[late] != NOTHING
    path = _path(reading.centres[late], times[late], seen, margin)
    speed, wanted = np.linalg.norm(path.velocity), np.linalg.norm(asked)
    error = float(abs(speed - wanted) / wanted)
    lap = 2 - 4 * margin
    found = path.start - margin + path.velocity * time
    true = np.clip(scene.start[i, 0], margin, 1 - margin) - margin + asked * time
    # A path and its mirror image look the same.
    off = [abs((s * found - true + lap / 2) % lap - lap / 2) for s in (1, -1)]
    turned = np.where(off[1] < off[0], -path.velocity, path.velocity)
    right = _direction(turned) == list(DIRECTIONS)[scene.direction[i, 0]]
    return bool(right and np.minimum(*off).max() < 0.25 and error < 0.1), error


def seam(clip: np.ndarray, at: int) -> Seam:
    """How much more changes between frames `at` − 1 and `at` of a clip [t H W 3] than between others.

    The change of colour is that of the mean colour in CIELAB (ΔE, CIE 1976).
    """
    reading = read(clip)
    changes = np.linalg.norm(np.diff(_lab((clip.mean((1, 2)) + 1) / 2), axis=0), axis=-1)
    step = np.linalg.norm(reading.centres[at] - reading.centres[at - 1])
    # Floors: a change that nobody sees, and a tenth of the slowest step of the world.
    usual, usual_step = max(np.median(changes), 0.1), max(reading.speed, 0.03) / (LENGTH - 1)
    return Seam(float(changes[at - 1] / usual), float(step / usual_step))


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of colours [... 3] in sRGB, 0 … 1, under D65."""
    rgb = np.clip(rgb, 0, 1)
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    xyz = xyz / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _view(clip: np.ndarray) -> _View:
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
    return _View(pixels, tone, background, np.linalg.norm(pixels - background, axis=-1))


def _apart(pixels: np.ndarray, tone: np.ndarray) -> np.ndarray:
    """How far colours [... 3] are from a tone made lighter or darker, as backgrounds are by their relief."""
    off = pixels - tone
    grey = np.clip(off @ np.full(3, 1 / 3, np.float32), -0.15, 0.15)
    off -= grey[..., None]
    return np.sqrt(np.einsum("...c,...c->...", off, off))


def _votes(view: _View) -> np.ndarray:
    """How much of each frame has each of COLOURS [t colour], counting only what is not background."""
    frame, y, x = np.nonzero(view.apart > 0.2)
    off = view.pixels[frame, y, x, None] - table(COLOURS)
    nearest = np.einsum("nkc,nkc->nk", off, off).argmin(-1)
    colours, frames = len(COLOURS), len(view.pixels)
    # The edges of shapes, which are mixed with the background, may look like another colour.
    weight = view.apart[frame, y, x] ** 2
    votes = np.bincount(frame * colours + nearest, weight, frames * colours)
    return votes.reshape(frames, colours)


def _nearer(pixels: np.ndarray, colour: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where pixels [t H W 3] are more like one colour [3] than like another."""
    return pixels @ (colour - other) > (colour @ colour - other @ other) / 2


def _cover(view: _View, colours: np.ndarray) -> np.ndarray:
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


def _sight(cover: np.ndarray) -> _Sight:
    """Where the shape that covers pixels [t H W] is, and what it looks like."""
    _, height, width = cover.shape
    centres = _centres(cover)
    return _Sight(centres, cover.sum((1, 2)) / height**2, _fits(cover, centres))


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


def _reading(view: _View, sight: _Sight, colours: np.ndarray, first: int, clear: np.ndarray) -> Reading:
    """Puts what was seen of a shape into words; `colours` [t] are indices."""
    centres, areas, fits = sight
    best = fits.reshape(len(fits), -1)
    seen = best.max(-1) >= FIT
    sure = seen & clear
    there = sure.sum() >= max(clear.sum() / 2, 1)
    shape, radius = np.unravel_index((fits * sure[:, None, None]).sum(0).argmax(), fits.shape[1:])
    size = abs(RADII[radius] - table(SIZES)).argmin()
    expected = _area(shape, float(table(SIZES)[size]))
    present = (areas > AREA[0] * expected) & (areas < AREA[1] * expected) | ~clear
    times = (first + np.arange(len(centres))) / (LENGTH - 1)
    path = _path(centres[clear], times[clear], seen[clear], float(table(SIZES)[size]))
    jump, largest = _jumps(view.pixels)
    words = list(SHAPES), list(COLOURS), list(SIZES)
    return Reading(
        shape=words[0][shape] if there else NOTHING,
        colour=words[1][np.bincount(colours[sure]).argmax()] if there else NOTHING,
        size=words[2][size] if there else NOTHING,
        direction=_direction(path.velocity) if there else NOTHING,
        speed=float(np.linalg.norm(path.velocity)) if there else 0.0,
        tone=_tone(view.tone),
        path=path,
        shapes=tuple(
            words[0][f // len(RADII)] if s else NOTHING for f, s in zip(best.argmax(-1), seen, strict=True)
        ),
        colours=tuple(words[1][c] if s else NOTHING for c, s in zip(colours, seen, strict=True)),
        centres=centres,
        areas=areas,
        present=present,
        clear=clear,
        first=first,
        jump=jump,
        largest_jump=largest,
    )


def _area(shape: int, radius: float) -> float:
    """Area of one of SHAPES in squared heights."""
    return (np.pi, 1.7**2, 1.573, 0.75 * np.pi)[shape] * radius**2


def _tone(colour: np.ndarray) -> str:
    """The nearest of TONES."""
    return list(TONES)[np.linalg.norm(table(TONES) - colour, axis=-1).argmin()]


def _direction(moved: np.ndarray) -> str:
    """The nearest of DIRECTIONS."""
    if np.linalg.norm(moved) < STILL:
        return NOTHING
    return list(DIRECTIONS)[(table(DIRECTIONS) @ moved).argmax()]


def _jumps(pixels: np.ndarray) -> tuple[float, float]:
    """Mean change between successive frames of pixels [t H W 3], and the largest over the median of them.

    The second is of squares, of means over 3 × 3 pixels, less what is noise: it is in most of the frame.
    """
    if len(pixels) < 2:
        return 0.0, 1.0
    change = np.diff(pixels, axis=0)
    broad = change[:, :-2] + change[:, 1:-1] + change[:, 2:]
    broad = (broad[:, :, :-2] + broad[:, :, 1:-1] + broad[:, :, 2:]) / 9
    square = (broad * broad).sum(-1)
    # Of the squares of three normal variables, the median is 0.79 of the mean.
    noise = np.median(square) / 0.79
    moved = square.mean((1, 2)) - noise
    # Of 32 changes of noise alone the largest is 0.08 of the noise above its mean.
    usual = max(np.median(moved), 0.06 * noise, 1e-5)
    return float(abs(change).mean()), float(moved.max() / usual)


def _reflected(way: np.ndarray, margin: float) -> np.ndarray:
    """Places on an axis with walls, of a way that begins at the first wall."""
    room = 1 - 2 * margin
    return margin + abs((way + room) % (2 * room) - room)


def _path(centres: np.ndarray, times: np.ndarray, kept: np.ndarray, margin: float) -> Path:
    """The path that is nearest to most of the centres [t 2] that are kept [t]; its residuals are of all."""
    fitted = [_axis(c, times[kept], margin) for c in centres[kept].T] if kept.any() else [(0.5, 0.0)] * 2
    start, speed = np.array(fitted).T
    off = np.linalg.norm(_reflected(start - margin + times[:, None] * speed, margin) - centres, axis=-1)
    return Path(start, speed, float(np.sqrt((off**2).mean())), float(off.max()))


def _axis(places: np.ndarray, times: np.ndarray, margin: float) -> tuple[float, float]:
    """Start and velocity, along one axis, of the path that is nearest to most of the places [t]."""
    room, speed = 1 - 2 * margin, 1.4
    # Over a longer clip, a step of velocity moves the end further.
    count = 56 * int(np.ceil(max(times.max(), 1))) + 1
    starts, speeds = np.linspace(0, room, 25), np.linspace(-speed, speed, count)
    step = np.array([starts[1], speeds[1] + speed])
    for _ in range(5):
        way = starts[:, None, None] + speeds[:, None] * times
        # Cut off, so that a few frames gone astray do not bend the path.
        cost = np.minimum(abs(_reflected(way, margin) - places), 0.1).sum(-1)
        row, column = np.unravel_index(cost.argmin(), cost.shape)
        start, speed = starts[row], speeds[column]
        spread = np.linspace(-1, 1, 9)[:, None] * step
        starts, speeds = np.clip(start + spread[:, 0], 0, room), speed + spread[:, 1]
        step /= 4
    # The way into a wall from the wall itself is the way out of it, and this is what is seen.
    if min(start, room - start) < 0.01 and (start < room / 2) == (speed < 0):
        start, speed = 2 * room * (start > room / 2) - start, -speed
    return float(start + margin), float(speed)
