"""From latents to pictures, piece by piece, whole or in tiles as memory asks for."""

import functools
import itertools
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fvdm_jax import checkpoint, machine, programs, sharding, video
from fvdm_jax.models.streaming import Stream, Tiles, decode_tiled
from fvdm_jax.program import Refusal
from fvdm_jax.progress import Stages
from fvdm_jax.request import Request


class Projector:
    """Decodes latents; a VAE is loaded, and its programs are compiled, for the first of a model and size."""

    def __init__(self, stages: Stages):
        self._stages, self._decoders = stages, {}

    def pictures(self, request: Request, made: Iterable) -> Iterator[np.ndarray]:
        """The pictures, uint8 [H W 3], of pieces of latents [1 k h w c], one by one as they are decoded."""
        coming = iter(made)
        first = next(coming)
        config, decoder, tiles = self._decoder(request.model, first.shape[2:], request.tiles)
        self._stages.expect("decode", request.total)
        if tiles is None:
            pieces = itertools.chain([first], coming)
            pieces = decoder.each(piece[:, i : i + 1] for piece in pieces for i in range(piece.shape[1]))
        else:
            pieces = decode_tiled(decoder, np.concatenate([first, *coming], axis=1), tiles, config)
        while True:
            with self._stages("decode"):
                piece = next(pieces, None)
                if piece is None:
                    return
                piece = video.to_pixels(piece)[0]
                self._stages.step()
            yield from piece

    @functools.cache  # noqa: B019 a projector lives as long as its program
    def _vae(self, model: Path) -> tuple:
        with self._stages("load"):
            machine.keep_compiled_programs()
            networks, params = checkpoint.load(model, ("vae",))
            return networks.vae, params["vae"]

    def _decoder(self, model: Path, latent: tuple[int, int, int], asked: tuple[int, int]) -> tuple:
        known = model, latent, asked
        if known not in self._decoders:
            config, params = self._vae(model)
            self._decoders[known] = config, *self._compiled(config, params, latent, asked)
        return self._decoders[known]

    def _compiled(self, config, params: dict, latent: tuple[int, int, int], asked: tuple[int, int]) -> tuple:
        """What decodes frames of this size, and the tiles that they are cut into, if they are."""
        height, width, channels = latent
        chosen, free = any(asked), 0.9 * machine.free(jax.devices()[0])
        grid = Tiles(*asked) if chosen else Tiles(1, 1)
        if not grid.useful(height, width):
            what = f"{grid.rows}x{grid.columns} tiles of {height}x{width} latent pixels would overlap whole"
            raise Refusal("--tiles", what, "give fewer, or leave it out")
        while True:
            over = sharding.across(width) if grid == Tiles(1, 1) else sharding.mesh()
            tile = jnp.zeros((1, 1, *grid.sides(height, width), channels))
            tile = jax.device_put(tile, sharding.spatial(over))
            with self._stages("compile"):
                placed = jax.device_put(params, sharding.replicated(over))
                compiled = partial(programs.compiled, self._stages.say)
                decoder = Stream(config, "decode", placed, tile, compiled)
                enough = chosen or decoder.bytes < free
            if enough or grid.smallest(height, width):
                break
            grid = grid.finer(height, width)
        if grid == Tiles(1, 1):
            return decoder, None
        why = "" if chosen else f", since whole ones do not fit in the {free / 2**30:.1f} GiB that are free"
        print(f"note: frames are decoded in {grid.rows}x{grid.columns} blended tiles{why}", file=sys.stderr)
        return decoder, grid
