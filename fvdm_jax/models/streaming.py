"""Clips through the VAE piece by piece: memory does not grow with their length.

A piece is a latent frame and the pictures that belong to it: one for the first, then as many as the VAE
joins. What the convolutions remember from piece to piece is the carry of one scan. The results are those of
the whole clip up to rounding. Frames split over devices, by their sharding, stay so.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fvdm_jax.models.causal import MEMORY
from fvdm_jax.models.vae import VAE, VAEConfig
from fvdm_jax.shapes import Latents, Video


def piece(config: VAEConfig, method: str, params: dict, x, memory: dict | None = None):
    """(result, memory for the next piece) of `method`, encode or decode, for a piece of a clip.

    Without memory x is the first piece; it may be of any length that a clip may have, later ones of any that
    adds whole latent frames.
    """
    variables = {"params": params} | ({} if memory is None else {MEMORY: memory})
    begun = memory is not None
    result, changed = VAE(config).apply(variables, x, begun, method=method, mutable=[MEMORY])
    return result, changed[MEMORY]


def _scanned(config: VAEConfig, method: str, params: dict, first, rest):
    """The results of the first piece and of the rest, which are stacked on a first axis; None of none."""
    result, memory = piece(config, method, params, first)
    if not len(rest):
        # The loop would be compiled though it never turns.
        return result, None

    def step(memory, x):
        result, memory = piece(config, method, params, x, memory)
        return memory, result

    return result, jax.lax.scan(step, memory, rest)[1]


def _joined(first, rest):
    """One clip of a first piece [b t h w c] and, if there are any, others [n b t h w c]."""
    if rest is None:
        return first
    return jnp.concatenate([first, rearrange(rest, "n b t h w c -> b (n t) h w c")], axis=1)


def encode(config: VAEConfig, params: dict, video: Video) -> Latents:
    """Normalised latents [b f h w c] of pixels [b t H W 3], −1 … 1, as `VAE.encode`."""
    if (video.shape[1] - 1) % config.stride:
        raise ValueError(f"the clip has {video.shape[1]} frames; give 1 + {config.stride}n")
    later = rearrange(video[:, 1:], "b (n t) h w c -> n b t h w c", t=config.stride)
    return _joined(*_scanned(config, "encode", params, video[:, :1], later))


def decode(config: VAEConfig, params: dict, latents: Latents) -> Video:
    """Pixels [b t H W 3] of normalised latents [b f h w c], as `VAE.decode`."""
    later = rearrange(latents[:, 1:], "b n h w c -> n b 1 h w c")
    return _joined(*_scanned(config, "decode", params, latents[:, :1], later))


OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}
"""Of the compiler, by platform. XLA's CPU backend by itself orders operations for concurrency, with which a
piece at 480x832 has temporaries of 4.3 GiB, not 2.9."""


Compile = Callable[[jax.stages.Lowered, str, Mapping | None], jax.stages.Compiled]
"""Compiles a lowered program, under a name for people, with the compiler's options."""


def silently(lowered: jax.stages.Lowered, what: str, options: Mapping | None) -> jax.stages.Compiled:
    """The compiled program; nobody is told."""
    return lowered.compile(options)


class Stream:
    """Encodes or decodes clips of one size, compiled once for the first piece and once for all the others."""

    def __init__(self, config: VAEConfig, method: str, params: dict, first, compile: Compile = silently):
        """`first`, the first piece of a clip, tells sizes and sharding; nothing is computed.

        It and `params` may be shapes with shardings. It is a picture [b 1 H W 3] to "encode", a latent frame
        [b 1 h w c] to "decode".
        """
        self._length = config.stride if method == "encode" else 1
        later = (first.shape[0], self._length, *first.shape[2:])
        later = jax.ShapeDtypeStruct(later, first.dtype, sharding=first.sharding)
        run = partial(piece, config, method)
        self._run, self._params, self._later = run, params, later
        self._memory = jax.eval_shape(run, params, first)[1]
        self._options = OPTIONS.get(_platform(first))
        self._compile, self._what = compile, f"{method} ({first.shape[2]}x{first.shape[3]})"
        lowered = jax.jit(run).lower(params, first)
        self._begin = compile(lowered, f"first piece to {self._what}", self._options)

    @functools.cached_property
    def _proceed(self):
        """The program of all pieces but the first; an image has none."""
        # Memory stays where the first piece left it, or the second of the others would be compiled anew.
        _, placed = self._begin.output_shardings
        memory = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), self._memory, placed
        )
        proceed = jax.jit(self._run, out_shardings=(None, placed), donate_argnums=2)
        lowered = proceed.lower(self._params, self._later, memory)
        return self._compile(lowered, f"later pieces to {self._what}", self._options)

    @property
    def programs(self) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
        """The compiled program of the first piece, and that of all others."""
        return self._begin, self._proceed

    @property
    def bytes(self) -> int:
        """What a piece takes of a device's memory, beside the parameters and the clip."""
        sizes = self._proceed.memory_analysis()
        return sizes.temp_size_in_bytes + sizes.output_size_in_bytes

    def __call__(self, clip) -> Iterator:
        """The result for each piece of a clip [b t …] in turn, computed while the one before is being used.

        The clip may be on the host; then a piece at a time goes to the device. Raises ValueError where it
        does not end with a whole piece.
        """
        if (clip.shape[1] - 1) % self._length:
            raise ValueError(f"the clip has {clip.shape[1]} frames; give 1 + {self._length}n")
        ends = range(1, clip.shape[1] + 1, self._length)
        return self.each(clip[:, max(0, end - self._length) : end] for end in ends)

    def each(self, pieces: Iterable) -> Iterator:
        """The result for each of the pieces [b t …] of one clip, which may come one by one.

        The first is a picture or a latent frame, the others are of the length that the VAE joins.
        """
        ready = None
        for piece in pieces:
            if ready is None:
                ready, memory = self._begin(self._params, self._placed(piece))
                continue
            coming, memory = self._proceed(self._params, self._placed(piece), memory)
            yield ready
            ready = coming
        if ready is not None:
            yield ready

    def _placed(self, x):
        return jax.device_put(x, self._later.sharding)


def _platform(x) -> str:
    """What the devices are that x lies on, which may be such as are only known by name."""
    if x.sharding is None:
        return jax.default_backend()
    return next(iter(x.sharding.device_set)).platform


OVERLAP = 8
"""Latent pixels that neighbouring tiles share."""


class Tiles(NamedTuple):
    """Frames cut into so many rows and columns of tiles of one size, which overlap and are blended."""

    rows: int
    columns: int

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a tile of a frame, all in latent pixels."""
        return _side(height, self.rows), _side(width, self.columns)

    def finer(self, height: int, width: int) -> "Tiles":
        """With one cut more, across the longer side of the tiles."""
        tall, wide = self.sides(height, width)
        return Tiles(self.rows + 1, self.columns) if tall > wide else Tiles(self.rows, self.columns + 1)

    def useful(self, height: int, width: int) -> bool:
        """Whether every cut makes the tiles of such a frame smaller."""
        return all(
            count == 1 or _side(length, count) < _side(length, count - 1)
            for length, count in ((height, self.rows), (width, self.columns))
        )

    def smallest(self, height: int, width: int) -> bool:
        """Whether tiles would hardly be smaller if there were more."""
        return max(self.sides(height, width)) <= 2 * OVERLAP


def _side(length: int, count: int) -> int:
    return min(length, -(-(length + (count - 1) * OVERLAP) // count))


def _corners(length: int, count: int) -> list[int]:
    return np.rint(np.linspace(0, length - _side(length, count), count)).astype(int).tolist()


def _fade(begin: int, size: int, length: int, scale: int) -> np.ndarray:
    """Weights of a tile's pixels along an axis: rising and falling over the overlap, not at the border."""
    at = (np.arange(size * scale) + 0.5) / (OVERLAP * scale)
    rising = np.minimum(1, at) if begin else np.ones_like(at)
    falling = np.minimum(1, at[::-1]) if begin + size < length else np.ones_like(at)
    return np.minimum(rising, falling).astype(np.float32)


def decode_tiled(decoder: Stream, latents: np.ndarray, tiles: Tiles, config: VAEConfig) -> Iterator[Video]:
    """The pictures [b t H W 3], on the host, of each latent frame of [b f h w c], decoded tile by tile.

    The `decoder` is of the tiles' size. Near to `decode` and not equal: a tile knows nothing of the frame
    beyond it. All is decoded before the first pictures come, and held as float32.
    """
    (h, w), scale = latents.shape[2:4], config.spatial
    tall, wide = tiles.sides(h, w)
    frames = 1 + (latents.shape[1] - 1) * config.stride
    total = np.zeros((latents.shape[0], frames, h * scale, w * scale, 3), np.float32)
    weight = np.zeros((h * scale, w * scale, 1), np.float32)
    for top, left in itertools.product(_corners(h, tiles.rows), _corners(w, tiles.columns)):
        part = latents[:, :, top : top + tall, left : left + wide]
        pixels = np.concatenate([np.asarray(piece) for piece in decoder(part)], axis=1)
        fade = np.multiply.outer(_fade(top, tall, h, scale), _fade(left, wide, w, scale))[..., None]
        rows, columns = (slice(at * scale, (at + n) * scale) for at, n in ((top, tall), (left, wide)))
        total[:, :, rows, columns] += pixels * fade
        weight[rows, columns] += fade
    total /= weight
    yield from np.split(total, range(1, frames, config.stride), axis=1)
