"""A world whose truth is known: clips of moving shapes, made on the fly, with captions that say what moves.

Everything about a clip follows from (seed, index). It is drawn by arithmetic alone, so that a model can be
trained, tested and judged without any file. `fvdm_jax.judge` reads clips back.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from fvdm_jax.data.textures import cloud, pixels
from fvdm_jax.shapes import Video

SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = {
    "red": (0.87, 0.12, 0.12), "green": (0.13, 0.65, 0.2), "blue": (0.13, 0.3, 0.87),
    "yellow": (0.96, 0.85, 0.15), "orange": (0.96, 0.5, 0.1), "purple": (0.55, 0.17, 0.7),
    "white": (0.97, 0.97, 0.97), "black": (0.05, 0.05, 0.05),
}  # fmt: skip
SIZES = {"small": 0.19, "large": 0.26}
"""Radius of the shape in heights of the frame."""
DIRECTIONS = {
    "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0),
    "up-left": (-0.7071, -0.7071), "up-right": (0.7071, -0.7071),
    "down-left": (-0.7071, 0.7071), "down-right": (0.7071, 0.7071),
}  # fmt: skip
SPEEDS = {"slowly": 0.25, "": 0.5, "fast": 0.8}
"""How far a shape moves in a clip, in heights of the frame."""
BACKGROUNDS = ("plain", "shaded", "striped", "cloudy")
TONES = {
    "gray": (0.5, 0.5, 0.5), "brown": (0.42, 0.28, 0.17), "navy": (0.1, 0.14, 0.34),
    "teal": (0.12, 0.45, 0.47), "pink": (0.93, 0.68, 0.73), "cream": (0.92, 0.87, 0.72),
}  # fmt: skip
AHEAD = 0.12
"""How far a shape moves at least before it meets the edge, in heights of the frame."""
CONTRAST = 0.42
"""Least distance in RGB, 0 … 1, between what is to be told apart in one clip."""


class Scene(NamedTuple):
    """Clips of one or two moving shapes, as indices into the tables above and numbers; arrays over the batch.

    What is said of a shape is [n 2]: of the one in front, and of the one behind, which is shown where `pair`.
    `start` is the middle of the shape, x and y, 0 … 1.
    """

    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    direction: np.ndarray
    speed: np.ndarray
    start: np.ndarray
    pair: np.ndarray
    background: np.ndarray
    tone: np.ndarray
    seed: np.ndarray


def scenes(seed: int, index: Iterable[int], pairs: float = 0.0) -> Scene:
    """The scenes of a seed with these indices; every word is as likely as the others, but where colours are
    too much alike to tell. `pairs` is the share of clips with two shapes.
    """
    return Scene(*map(np.stack, zip(*(_scene(seed, i, pairs) for i in index), strict=True)))


def _scene(seed: int, index: int, pairs: float) -> Scene:
    rng = np.random.default_rng((seed, index))
    shape, size, direction, speed = (
        rng.integers(len(t), size=2) for t in (SHAPES, SIZES, DIRECTIONS, SPEEDS)
    )
    colours, tones = table(COLOURS), table(TONES)
    while True:
        colour, tone = rng.integers(len(COLOURS), size=2), rng.integers(len(TONES))
        apart = np.linalg.norm(colours[colour] - tones[tone], axis=-1)
        between = np.linalg.norm(colours[colour[0]] - colours[colour[1]])
        if min(*apart, between) > CONTRAST:
            break
    # Against the direction of motion, so that bouncing is an event and not the rule, and never at once.
    heading, margin = table(DIRECTIONS)[direction], table(SIZES)[size][:, None]
    start = rng.uniform(0.2, 0.8, (2, 2)) - heading * rng.uniform(0, 0.4, (2, 1))
    room = AHEAD * np.maximum(heading, 0), AHEAD * np.maximum(-heading, 0)
    start = np.clip(start, margin + room[1], 1 - margin - room[0])
    rest = rng.random() < pairs, rng.integers(len(BACKGROUNDS)), tone, rng.integers(2**31)
    return Scene(shape, colour, size, direction, speed, start, *rest)


def caption(scene: Scene, i: int, full: bool = True) -> str:
    """What scene `i` of the batch shows in square frames, in the words of the tables.

    Not `full`: without the background.
    """
    said = _said(scene, i, 0)
    if scene.pair[i]:
        said = f"{said} before {_said(scene, i, 1)}"
    place = BACKGROUNDS[scene.background[i]], list(TONES)[scene.tone[i]]
    return f"{said} on a {' '.join(place)} background" if full else said


def _said(scene: Scene, i: int, which: int) -> str:
    """One shape, and how it moves."""

    def word(words, index) -> str:
        return list(words)[index[i, which]]

    adjectives = word(SIZES, scene.size), word(COLOURS, scene.colour)
    motion = "moves", word(DIRECTIONS, scene.direction), word(SPEEDS, scene.speed)
    ending = "and bounces" if bounces(scene, i, which) else ""
    return " ".join(w for w in ("a", *adjectives, word(SHAPES, scene.shape), *motion, ending) if w)


def bounces(scene: Scene, i: int, which: int) -> bool:
    """Whether the shape meets the edge of a square frame."""
    margin = table(SIZES)[scene.size[i, which]]
    end = scene.start[i, which] + velocity(scene)[i, which]
    return bool(np.any((end < margin - 1e-3) | (end > 1.001 - margin)))


def velocity(scene: Scene) -> np.ndarray:
    """How far shapes move in a clip before they bounce, [n 2 xy] in heights of the frame."""
    return table(DIRECTIONS)[scene.direction] * table(SPEEDS)[scene.speed][..., None]


def table(words: dict) -> np.ndarray:
    """What the words stand for, as an array that their indices go into."""
    return np.array(list(words.values()), np.float32)


def moving_shapes(scene: Scene, frames: int, height: int, width: int, length: int = 33) -> Video:
    """The clips [b t H W 3] of a batch of scenes, −1 … 1; a shape that meets the edge is reflected.

    Speeds are of clips of `length` frames; a longer clip goes on as they do.
    """
    time = jnp.arange(frames, dtype=jnp.float32) / (length - 1)
    return jax.vmap(lambda s: _draw(s, time, height, width))(jax.tree.map(jnp.asarray, scene))


def _draw(scene: Scene, time: Float[Array, "t"], height: int, width: int) -> Float[Array, "t H W 3"]:
    picture = _background(scene, height, width)
    for which in (1, 0):
        shown = jnp.where(scene.pair, 1.0, 1.0 - which)
        cover = shown * _cover(scene, which, time, height, width)[..., None]
        shade = jnp.asarray(table(COLOURS))[scene.colour[which]]
        picture = cover * shade + (1 - cover) * picture
    return 2 * picture - 1


def _cover(scene: Scene, which: int, time, height: int, width: int) -> Float[Array, "t H W"]:
    """How much of each pixel a shape covers."""
    aspect = width / height
    radius = jnp.asarray(table(SIZES))[scene.size[which]]
    heading = jnp.asarray(table(DIRECTIONS))[scene.direction[which]]
    travel = heading * jnp.asarray(table(SPEEDS))[scene.speed[which]]
    margin = jnp.stack([radius / aspect, radius])
    room = 1 - 2 * margin
    way = jnp.clip(scene.start[which], margin, 1 - margin) - margin + time[:, None] * travel
    centre = margin + jnp.abs((way + room) % (2 * room) - room)
    y, x = pixels(height, width)
    x = (x - rearrange(centre[:, 0], "t -> t 1 1")) * aspect
    y = rearrange(y, "h -> h 1") - rearrange(centre[:, 1], "t -> t 1 1")
    return jnp.clip(0.5 - distance(x, y, radius)[scene.shape[which]] * height, 0, 1)


def distance(x, y, r) -> Float[Array, "shape t H W"]:
    """Signed distance to the outline of each of SHAPES, in heights of the frame."""
    x, y = jnp.broadcast_arrays(x, y)
    circle = jnp.hypot(x, y) - r
    square = jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.85 * r
    triangle = jnp.maximum(0.866 * jnp.abs(x) - 0.5 * y, y) - 0.55 * r
    ring = jnp.abs(circle + 0.25 * r) - 0.25 * r
    return jnp.stack([circle, square, triangle, ring])


def _background(scene: Scene, height: int, width: int) -> Float[Array, "1 H W 3"]:
    key, first, second = jax.random.split(jax.random.key(scene.seed), 3)
    turn, phase = jax.random.uniform(first, (2,)) * 2 * jnp.pi
    pitch = jax.random.uniform(second, minval=10, maxval=18)
    y, x = pixels(height, width)
    y, x = y[:, None] - 0.5, (x[None] - 0.5) * width / height
    along = x * jnp.cos(turn) + y * jnp.sin(turn)
    plain = 0 * along
    shaded = 0.25 * along
    striped = 0.07 * jnp.clip(3 * jnp.sin(pitch * along + phase), -1, 1)
    cloudy = 0.07 * cloud(key, height, width)
    relief = jnp.take(jnp.stack([plain, shaded, striped, cloudy]), scene.background, axis=0)
    tone = jnp.asarray(table(TONES))[scene.tone]
    return jnp.clip(tone + relief[None, ..., None], 0, 1)
