"""Says what a clip of the synthetic world shows: which shape, of what colour and size, and how it moves.

Image processing alone: no network, nothing learned and nothing random. `fvdm_jax.data.source` draws what is
read here. Clips are [t H W 3], −1 … 1, of square frames; places are x and y, 0 … 1; lengths are in heights
of the frame, and velocities per clip of LENGTH frames. What cannot be seen is said to be NOTHING.
"""

import itertools
from collections.abc import Sequence
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
    bounces,
    table,
    velocity,
)
from fvdm_jax.metrics import delta_e
from fvdm_jax.sight import RADII, Sight, View, covered, located, nearer, parted, voted

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
NEAR = 0.03
"""Distance from a wall at which the way into it and the way out of it look the same: two pixels of 64."""
STILL = 0.5 * min(SPEEDS.values())
"""Least speed of a shape that moves."""


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
    """A place where two windows meet: its change of colour over the usual one, its step over the path's.

    `delta_e` is the change of colour itself.
    """

    colour: float
    motion: float
    delta_e: float


def read(clip: np.ndarray, start: int = 0) -> Reading:
    """What the shape of a clip [t H W 3] is and does; `start` is the number of its first frame."""
    view = parted(clip)
    votes = voted(view)
    colours = votes.argmax(-1)
    sight = located(covered(view, table(COLOURS)[colours]))
    return _reading(view, sight, colours, start, np.ones(len(clip), bool))


def read_pair(clip: np.ndarray, scene: Scene, i: int, start: int = 0) -> tuple[Reading, Reading]:
    """What the two shapes of a clip [t H W 3] are and do, found by the colours that scene `i` asks.

    Frames in which the one in front hides some of the one behind say nothing of the one behind.
    """
    view = parted(clip)
    asked = scene.colour[i]
    colours = table(COLOURS)[asked]
    sights = [
        located(covered(view, colours[None, w]) * nearer(view.pixels, *colours[[w, 1 - w]])) for w in (0, 1)
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
        direction=asked(DIRECTIONS, scene.direction) in _directions(reading, bounces(scene, i, which)),
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


def seams(clip: np.ndarray, reading: Reading, places: Sequence[int]) -> list[Seam]:
    """The Seam at each of `places`, from 1 on, of a clip [t H W 3]: how much more changes than elsewhere.

    `reading` is that of the whole clip.
    The change of colour is that of the mean colour in CIELAB (ΔE, CIE 1976).
    """
    mean = (clip.mean((1, 2), dtype=np.float64) + 1) / 2
    changes = delta_e(mean[1:], mean[:-1])
    steps = np.linalg.norm(np.diff(reading.centres, axis=0), axis=-1)
    # Floors: a change that nobody sees, and a tenth of the slowest step of the world.
    usual, usual_step = max(np.median(changes), 0.1), max(reading.speed, 0.03) / (LENGTH - 1)
    return [
        Seam(float(changes[at - 1] / usual), float(steps[at - 1] / usual_step), float(changes[at - 1]))
        for at in places
    ]


def _reading(view: View, sight: Sight, colours: np.ndarray, first: int, clear: np.ndarray) -> Reading:
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


def _directions(reading: Reading, turns: bool) -> set[str]:
    """What the direction may be called where a shape begins at a wall: that in which it leaves the wall, and
    of one that is to be reflected, that in which it may have come."""
    if reading.size == NOTHING:
        return {reading.direction}
    place, velocity = reading.path.start, reading.path.velocity
    beside = np.minimum(place, 1 - place) < SIZES[reading.size] + NEAR
    out = np.where(beside, np.abs(velocity) * np.where(place < 0.5, 1, -1), velocity)
    ways = itertools.product(*((1, -1) if at and turns else (1,) for at in beside))
    return {_direction(out * np.array(way)) for way in ways}


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
