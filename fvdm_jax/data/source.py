"""Clips made on the fly: moving shapes with their captions, and textures with a photograph's statistics.

Both are drawn by arithmetic alone, so that a model can be trained and tested without any file.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray

from fvdm_jax.shapes import Video

SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = {
    "red": (0.87, 0.12, 0.12), "green": (0.13, 0.65, 0.2), "blue": (0.13, 0.3, 0.87),
    "yellow": (0.96, 0.85, 0.15), "orange": (0.96, 0.5, 0.1), "purple": (0.55, 0.17, 0.7),
    "white": (0.97, 0.97, 0.97), "black": (0.05, 0.05, 0.05),
}  # fmt: skip
SIZES = {"small": 0.11, "": 0.17, "large": 0.25}
"""Radius of the shape in heights of the frame."""
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SPEEDS = {"slowly": 0.25, "": 0.5, "fast": 0.9}
"""How much of the frame a shape crosses in a clip."""
BACKGROUNDS = ("plain", "striped", "checkered", "cloudy")
TONES = {
    "gray": (0.5, 0.5, 0.5), "brown": (0.42, 0.28, 0.17), "navy": (0.1, 0.14, 0.34),
    "teal": (0.12, 0.45, 0.47), "pink": (0.93, 0.68, 0.73), "cream": (0.92, 0.87, 0.72),
}  # fmt: skip


class Scene(NamedTuple):
    """One clip of a moving shape, as indices into the tables above and numbers 0 … 1; arrays of one batch."""

    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    direction: np.ndarray
    speed: np.ndarray
    background: np.ndarray
    tone: np.ndarray
    start: np.ndarray
    seed: np.ndarray


def scenes(rng: np.random.Generator, count: int) -> Scene:
    """`count` scenes, every word equally likely; a shape starts so that most of its path is in the frame."""
    lengths = [len(t) for t in (SHAPES, COLOURS, SIZES, DIRECTIONS, SPEEDS, BACKGROUNDS, TONES)]
    words = [rng.integers(n, size=count) for n in lengths]
    start = rng.uniform(0.15, 0.85, (count, 2))
    # Against the direction of motion, so that bouncing is an event and not the rule.
    heading = np.array(list(DIRECTIONS.values()))[words[3]]
    start -= heading * rng.uniform(0, 0.35, (count, 1))
    return Scene(*words, np.clip(start, 0.1, 0.9), rng.integers(2**31, size=count))


def caption(scene: Scene, i: int, full: bool = True) -> str:
    """What scene `i` of the batch shows in square frames, in the words of the tables.

    Not `full`: without the background.
    """

    def word(table, index) -> str:
        return list(table)[index[i]]

    adjectives = (word(SIZES, scene.size), word(COLOURS, scene.colour))
    motion = ("moves", word(DIRECTIONS, scene.direction), word(SPEEDS, scene.speed))
    ending = ("and bounces",) if _bounces(scene, i) else ()
    place = ("on a", word(BACKGROUNDS, scene.background), word(TONES, scene.tone), "background")
    words = ("a", *adjectives, word(SHAPES, scene.shape), *motion, *ending, *(place if full else ()))
    return " ".join(w for w in words if w)


def _bounces(scene: Scene, i: int) -> bool:
    """Whether the shape of scene `i` meets the edge of a square frame."""
    margin, travel = _table(SIZES)[scene.size[i]], _table(SPEEDS)[scene.speed[i]]
    start = np.clip(scene.start[i], margin, 1 - margin)
    end = start + _table(DIRECTIONS)[scene.direction[i]] * travel
    return bool(np.any((end < margin - 1e-3) | (end > 1.001 - margin)))


def _table(words: dict) -> np.ndarray:
    """What the words stand for, as an array that their indices go into."""
    return np.array(list(words.values()), np.float32)


def moving_shapes(scene: Scene, frames: int, height: int, width: int) -> Video:
    """The clips [b t H W 3] of a batch of scenes, −1 … 1; a shape that meets the edge is reflected."""
    return jax.vmap(lambda s: _draw(s, frames, height, width))(jax.tree.map(jnp.asarray, scene))


def _draw(scene: Scene, frames: int, height: int, width: int) -> Float[Array, "t H W 3"]:
    aspect = width / height
    centre = _path(scene, frames, aspect)
    y, x = _pixels(height, width)
    x = (x - rearrange(centre[:, 0], "t -> t 1 1")) * aspect
    y = rearrange(y, "h -> h 1") - rearrange(centre[:, 1], "t -> t 1 1")
    radius = jnp.asarray(_table(SIZES))[scene.size]
    cover = jnp.clip(0.5 - _distance(x, y, radius)[scene.shape] * height, 0, 1)[..., None]
    shade = jnp.asarray(_table(COLOURS))[scene.colour]
    behind = _background(scene, height, width)
    return 2 * (cover * shade + (1 - cover) * behind) - 1


def _pixels(height: int, width: int) -> tuple[Float[Array, "H"], Float[Array, "W"]]:
    """Where the middles of rows and of columns are, 0 … 1."""
    return tuple((jnp.arange(n, dtype=jnp.float32) + 0.5) / n for n in (height, width))


def _path(scene: Scene, frames: int, aspect: float) -> Float[Array, "t xy"]:
    """Centres of the shape, reflected between the walls."""
    radius = jnp.asarray(_table(SIZES))[scene.size]
    margin = jnp.stack([radius / aspect, radius])
    room = 1 - 2 * margin
    travel = jnp.asarray(_table(DIRECTIONS))[scene.direction] * jnp.asarray(_table(SPEEDS))[scene.speed]
    way = jnp.clip(scene.start, margin, 1 - margin) - margin
    way = way + jnp.linspace(0, 1, frames)[:, None] * travel
    folded = jnp.abs((way + room) % (2 * room) - room)
    return margin + folded


def _distance(x, y, r) -> Float[Array, "shape t H W"]:
    """Signed distance to the outline of each of SHAPES, in heights of the frame."""
    x, y = jnp.broadcast_arrays(x, y)
    circle = jnp.hypot(x, y) - r
    square = jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.85 * r
    triangle = jnp.maximum(0.866 * jnp.abs(x) - 0.5 * y, y) - 0.55 * r
    ring = jnp.abs(circle + 0.3 * r) - 0.3 * r
    return jnp.stack([circle, square, triangle, ring])


def _background(scene: Scene, height: int, width: int) -> Float[Array, "1 H W 3"]:
    key, first, second = jax.random.split(jax.random.key(scene.seed), 3)
    phase = jax.random.uniform(first, (2,)) * 2 * jnp.pi
    pitch = jax.random.uniform(second, minval=5, maxval=9)
    y, x = _pixels(height, width)
    y, x = y[:, None], x[None] * width / height
    wave_x, wave_y = jnp.sin(2 * pitch * x + phase[0]), jnp.sin(2 * pitch * y + phase[1])
    plain = jnp.zeros((height, width)) + 0.15 * (y - 0.5)
    striped = 0.12 * jnp.clip(4 * wave_x, -1, 1) + 0 * y
    checkered = 0.12 * jnp.clip(6 * wave_x * wave_y, -1, 1)
    cloudy = 0.13 * cloud(key, height, width)
    relief = jnp.take(jnp.stack([plain, striped, checkered, cloudy]), scene.background, axis=0)
    tone = jnp.asarray(_table(TONES))[scene.tone]
    return jnp.clip(tone + relief[None, ..., None], 0, 1)


def cloud(key: PRNGKeyArray, height: int, width: int, slope: float = 1.6) -> Float[Array, "H W"]:
    """Noise whose amplitude falls as 1/frequency^slope, as a photograph's does; unit variance."""
    fy, fx = jnp.fft.fftfreq(height)[:, None], jnp.fft.rfftfreq(width)[None]
    amplitude = (jnp.hypot(fx, fy) + 1 / max(height, width)) ** -slope
    white = jnp.fft.rfft2(jax.random.normal(key, (height, width)))
    noise = jnp.fft.irfft2(white * amplitude.astype(white.dtype), (height, width))
    return (noise - noise.mean()) / (noise.std() + 1e-6)


def textures(
    key: PRNGKeyArray, frames: int, height: int, width: int, leaves: int = 40
) -> Float[Array, "t H W 3"]:
    """A clip with a photograph's statistics: drifting opaque leaves of all sizes, textured and shaded.

    The dead-leaves model (Lee, Mumford and Huang 2001): radii by a power law, each leaf hiding those
    before it. −1 … 1.
    """
    keys = jax.random.split(key, 8)
    uniform = jax.random.uniform
    radius = 0.6 * (0.05 / 0.6) ** (uniform(keys[0], (leaves,)) ** 0.7)
    centre = uniform(keys[1], (leaves, 2), minval=-0.2, maxval=1.2) * jnp.asarray([width / height, 1.0])
    drift = 0.25 * jax.random.normal(keys[2], (leaves, 2)) * uniform(keys[3])
    turn, squareness = uniform(keys[4], (2, leaves)) * jnp.asarray([[jnp.pi], [1.0]])
    colour = _leaf_colours(keys[5], leaves)
    shading = jnp.stack([cloud(k, height, width) for k in jax.random.split(keys[6], 3)])
    grain = 0.35 * uniform(keys[7], (leaves, 3)) ** 2

    time = jnp.linspace(0, 1, frames)
    y, x = _pixels(height, width)
    x = x * width / height

    def lay(picture, leaf):
        radius, centre, drift, turn, squareness, colour, grain = leaf
        at = centre + time[:, None] * drift
        dx, dy = x[None, None] - at[:, :1, None], y[None, :, None] - at[:, 1:, None]
        u, v = dx * jnp.cos(turn) + dy * jnp.sin(turn), dy * jnp.cos(turn) - dx * jnp.sin(turn)
        box = jnp.maximum(jnp.abs(u), 2 * jnp.abs(v))
        outline = jnp.where(squareness > 0.5, box, jnp.hypot(u, (1 + squareness) * v)) - radius
        cover = jnp.clip(0.5 - outline * height, 0, 1)[..., None]
        shaded = colour + jnp.einsum("k,khw->hw", grain, shading)[..., None] * 0.5 + 0.3 * u[..., None]
        return picture * (1 - cover) + shaded * cover, None

    ground = _leaf_colours(keys[5], 1)[0] + 0.2 * shading[0][None, ..., None]
    picture = jnp.broadcast_to(ground, (frames, height, width, 3))
    picture, _ = jax.lax.scan(lay, picture, (radius, centre, drift, turn, squareness, colour, grain))
    return jnp.clip(picture, -1, 1)


def _leaf_colours(key: PRNGKeyArray, count: int) -> Float[Array, "n 3"]:
    """Mostly alike in hue and unlike in brightness, within one clip."""
    light, tint, each = jax.random.split(key, 3)
    bright = jax.random.uniform(light, (count, 1), minval=-1, maxval=1)
    return bright + 0.2 * jax.random.normal(tint, (3,)) + 0.2 * jax.random.normal(each, (count, 3))
