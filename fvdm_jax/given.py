"""From files that are kept to what a sampler starts from: a task, or what Wan's own I2V networks take."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fvdm_jax import checkpoint, conditioning, programs, tasks, video
from fvdm_jax.checkpoint import Networks
from fvdm_jax.keeps import Keep
from fvdm_jax.models.dit import Extra
from fvdm_jax.models.streaming import Stream
from fvdm_jax.progress import Stages
from fvdm_jax.request import Request
from fvdm_jax.shapes import Latents


class Given:
    """Reads and encodes what requests of one model and size keep; the VAE is loaded for the first of them."""

    def __init__(self, request: Request, networks: Networks, stages: Stages):
        self._request, self._networks, self._stages = request, networks, stages

    def task(self, request: Request, shape: tuple[int, ...]) -> tasks.Task:
        """The task of a clip of this shape."""
        task = tasks.text_to_video(shape)
        for keep in request.keeps:
            pixels = self._pixels(request, keep)
            # After the first latent frame each stands for four pictures, which a still image can fill.
            still = request.still and keep.first > 0 and keep.kind == "image"
            latents = self._encoded(np.repeat(pixels, 1 + video.STRIDE, 1) if still else pixels)
            task = task.keep(latents[:, 1:] if still else latents, keep.first, keep.strength)
        return task

    def extra(self, request: Request, pictures: int) -> Extra:
        """Mask and latents of a clip that is gray but for what is kept, and CLIP's tokens of its `pictures`.

        An image, and the first of a clip, stands at the last pixel frame of its latent frame, as FLF2V has
        the last one, so that what is kept to the end reaches it. Source: `conditioning`; but pictures are
        scaled to cover the video and cropped, with Lanczos' filter, where Wan chooses the video's sides by
        the picture and scales it with torch's bicubic one.
        """
        placed = {}
        for keep in request.keeps:
            placed[video.STRIDE * keep.first] = self._pixels(request, keep)[0]
        latents = self._encoded(conditioning.canvas(placed, request.frames, request.size))
        channels = conditioning.channels(latents, conditioning.given(placed, request.frames))
        return Extra(channels, self._seen(request, pictures) if self._networks.dit.image_width else None)

    def forget(self) -> None:
        """Gives back the memory of the networks that look at pictures."""
        for name in ("_encoder", "_tower"):
            self.__dict__.pop(name, None)

    def _pixels(self, request: Request, keep: Keep) -> np.ndarray:
        with self._stages("read"):
            pixels = video.read(keep.path, keep.frames, request.size, keep.skip, request.fps)
            return video.to_unit(pixels)[None]

    def _encoded(self, pixels: np.ndarray) -> Latents:
        encode = self._encoder
        with self._stages("encode"):
            return jax.block_until_ready(jnp.concatenate(list(encode(pixels)), axis=1))

    @functools.cached_property
    def _encoder(self) -> Stream:
        with self._stages("load"):
            params = jax.device_put(checkpoint.load(self._request.model, ("vae",))[1]["vae"])
        with self._stages("compile"):
            first = jnp.zeros((1, 1, *self._request.size, 3))
            compiled = partial(programs.compiled, self._stages.say)
            return Stream(self._networks.vae, "encode", params, first, compiled)

    def _seen(self, request: Request, pictures: int):
        """What CLIP sees of the first picture, or of the first and the last, each at its own size."""
        shown = []
        first, last = request.keeps[0], request.keeps[-1]
        for keep, at in ((first, first.skip), (last, last.skip + last.frames - 1))[:pictures]:
            held = video.probe(keep.path)
            pixels = video.read(keep.path, 1, (held.height, held.width), at, request.fps)
            shown.append(video.to_unit(pixels)[0])
        params, look = self._tower
        with self._stages("encode"):
            return jax.block_until_ready(look(params, shown))

    @functools.cached_property
    def _tower(self) -> tuple:
        """CLIP's parameters, and the function that looks."""
        with self._stages("load"):
            networks, params = checkpoint.load(self._request.model, ("clip",))
        return params, jax.jit(networks.look)
