"""What Wan's own image-to-video networks are shown of pictures: a clip that is empty but for them, and CLIP's
tokens.

Source: Wan2.1 wan/image2video.py and wan/first_last_frame2video.py, Wan2.2 wan/image2video.py.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float

from fvdm_jax.models.clip import CLIPConfig, ImageEncoder, ImageTokens, preprocess
from fvdm_jax.models.dit import DiTConfig, Extra
from fvdm_jax.shapes import Latents, Video
from fvdm_jax.video import STRIDE

Pictures = Mapping[int, Float[np.ndarray, "H W 3"] | Float[np.ndarray, "k H W 3"]]
"""Pictures or clips in −1 … 1 by the pixel frame at which each starts; negative: from the end."""


def canvas(pictures: Pictures, frames: int, size: tuple[int, int]) -> Video:
    """A clip [1 t H W 3] of so many frames, on the host: gray, which is 0, but for the pictures.

    A frame that is given twice has the later. Raises ValueError where a picture is not of this size (H, W),
    or does not fit in the clip.
    """
    clip = np.zeros((1, frames, *size, 3), np.float32)
    for at, picture in pictures.items():
        pixels = np.asarray(picture)
        if pixels.shape[-3:] != (*size, 3) or pixels.ndim not in (3, 4):
            raise ValueError(f"a picture is {pixels.shape}; give {(*size, 3)}, or a clip of such")
        if pixels.dtype.kind in "biu":
            raise ValueError(f"a picture is of {pixels.dtype}; give floats in −1 … 1, as of video.to_unit")
        clip[0, _place(at, pixels, frames)] = pixels
    return clip


def given(pictures: Pictures, frames: int) -> Bool[np.ndarray, "t"]:
    """Which pixel frames of `canvas` are pictures. Raises ValueError where one does not fit in the clip."""
    flags = np.zeros(frames, bool)
    for at, picture in pictures.items():
        flags[_place(at, picture, frames)] = True
    return flags


def _place(at: int, picture, frames: int) -> slice:
    count = 1 if np.ndim(picture) == 3 else np.shape(picture)[0]
    start = at + (frames if at < 0 else 0)
    if not 0 <= start <= frames - count:
        raise ValueError(f"{count} frames from {at} on do not fit a clip of {frames} frames")
    return slice(start, start + count)


def mask(given: Bool[Array, "t"]) -> Float[Array, "f 4"]:
    """Wan's mask: which of the four pixel frames of each latent frame are given; the first counts four times.

    Raises ValueError where t is not 1 + 4n.
    """
    flags = jnp.asarray(given)
    if flags.ndim != 1 or flags.shape[0] % STRIDE != 1:
        raise ValueError(f"the frames given are {flags.shape}; give [t] of 1 + {STRIDE}n frames")
    flags = jnp.concatenate([jnp.repeat(flags[:1], STRIDE), flags[1:]])
    return rearrange(flags.astype(jnp.float32), "(f m) -> f m", m=STRIDE)


def channels(latents: Latents, given: Bool[Array, "t"]) -> Latents:
    """The channels that join x's: the mask of the pixel frames [t], then the latents of `canvas`.

    Raises ValueError where the latents are not of t = 4f − 3 frames.
    """
    b, f, h, w, _ = latents.shape
    flags = mask(given)
    if len(flags) != f:
        raise ValueError(f"the latents have {f} frames, and what is given is told of {len(flags)}")
    flags = repeat(flags.astype(latents.dtype), "f m -> b f h w m", b=b, h=h, w=w)
    return jnp.concatenate([flags, latents], axis=-1)


def image_tokens(
    config: CLIPConfig, params: dict, pictures: Sequence[Float[Array, "H W 3"]]
) -> Float[Array, "1 n e"]:
    """CLIP's tokens of pictures in −1 … 1, each of any size: 257 of the first, then those of the others.

    FLF2V takes those of the first and of the last frame. Raises ValueError where there is no picture, or
    what is given is none.
    """
    if not pictures:
        raise ValueError("there is no picture; give one, or for FLF2V the first and the last frame")
    if odd := [np.shape(picture) for picture in pictures if np.ndim(picture) != 3 or picture.shape[2] != 3]:
        raise ValueError(f"a picture is {odd[0]}; give [H W 3]")
    pixels = jnp.concatenate([preprocess(picture[None], config.image) for picture in pictures])
    tokens: ImageTokens = ImageEncoder(config).apply({"params": params}, pixels)
    return rearrange(tokens, "pictures n e -> 1 (pictures n) e")


def check(config: DiTConfig, extra: Extra) -> None:
    """Raises ValueError unless `extra` is what the network takes beside text; shapes will do."""
    wanted = config.channels_in - config.channels_out
    found = 0 if extra.channels is None else extra.channels.shape[-1]
    if found != wanted:
        what = f"the network takes {wanted} channels beside its own {config.channels_out}, and {found} came"
        raise ValueError(
            f"{what}; give those of conditioning.channels to networks with 36, and none to others"
        )
    count, width = (0, 0) if extra.image is None else extra.image.shape[1:]
    if width != config.image_width:
        what = f"the network takes image tokens of width {config.image_width}, and of {width} came"
        raise ValueError(f"{what}; give those of conditioning.image_tokens where the width is not 0")
    if config.image_tokens not in (0, count):
        what = f"the network takes {config.image_tokens} image tokens, and {count} came"
        raise ValueError(f"{what}; give those of two pictures, the first and the last frame")
