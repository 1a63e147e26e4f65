"""Clips with a photograph's statistics, drawn by arithmetic alone: for what is to do with photographs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def pixels(height: int, width: int) -> tuple[Float[Array, "H"], Float[Array, "W"]]:
    """Where the middles of rows and of columns are, 0 … 1."""
    return tuple((jnp.arange(n, dtype=jnp.float32) + 0.5) / n for n in (height, width))


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
    y, x = pixels(height, width)
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
