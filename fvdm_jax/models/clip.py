"""CLIP's image tower: what Wan2.1's I2V and FLF2V networks read of a picture."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float

from fvdm_jax.kernels.attention import attention
from fvdm_jax.models.layers import Dense, LayerNorm, named, stacked

Image = Float[Array, "b H W 3"]
ImageTokens = Float[Array, "b n e"]

EPSILON = 1e-5
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of each colour of pixels 0 … 1, as published with CLIP."""

CUBIC = -0.75
"""torch's coefficient of the cubic; jax.image.resize has −0.5 and takes no other."""


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the tower; the defaults are ViT-H/14's. `layers` counts the last one, which is never run."""

    image: int = 224
    patch: int = 14
    width: int = 1280
    heads: int = 16
    ffn: int = 5120
    layers: int = 32
    dtype: str = "bfloat16"


def cubic_weights(before: int, after: int) -> np.ndarray:
    """Weights [after before] that resize one axis as torch's bicubic does without antialiasing; float32.

    Source: torch.nn.functional.interpolate(mode="bicubic", align_corners=False).
    """
    # torch rounds the ratio of the sizes to float32, then product and difference together. For noise of
    # 1920 × 1080, exact positions would be 3e-4 from its pixels, and two roundings 1e-4.
    ratio = float(np.float32(before) / np.float32(after))
    centre = (ratio * (np.arange(after) + 0.5) - 0.5).astype(np.float32).astype(np.float64)
    taps = np.floor(centre)[:, None] + np.arange(-1, 3)
    x = np.abs(centre[:, None] - taps)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x**2 + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    weights = np.zeros((after, before))
    # What falls beyond the border is read at the border, so several taps may add up there.
    columns = np.clip(taps, 0, before - 1).astype(int)
    np.add.at(weights, (np.arange(after)[:, None], columns), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


def preprocess(image: Image, size: int = CLIPConfig.image) -> Image:
    """Images [b H W 3] in −1 … 1 as CLIP's pixels [b size size 3], colours normalised; float32.

    The sides are resized each for itself, whatever their ratio, and overshoot is not clipped.
    Source: Wan2.1 wan/modules/clip.py, CLIPModel.visual; diffusers crops and antialiases instead.
    """
    image = jnp.asarray(image, jnp.float32)
    rows, columns = (jnp.asarray(cubic_weights(n, size)) for n in image.shape[1:3])
    exact = jax.lax.Precision.HIGHEST
    image = jnp.einsum("i H, b H W c -> b i W c", rows, image, precision=exact)
    image = jnp.einsum("j W, b i W c -> b i j c", columns, image, precision=exact)
    return (image * 0.5 + 0.5 - jnp.asarray(MEAN)) / jnp.asarray(STD)


class Block(nn.Module):
    """Attention, then Dense, GELU (exact form), Dense, each on the normalised stream and added to it."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, x: ImageTokens):
        c = self.config
        y = LayerNorm(EPSILON, name="norm_attention")(x)
        y = Dense(3 * c.width, ("embed", "heads"), c.dtype, name="qkv")(y)
        q, k, v = rearrange(y, "b n (qkv a k) -> qkv b n a k", qkv=3, a=c.heads)
        y = rearrange(attention(q, k, v), "b n a k -> b n (a k)")
        x = x + Dense(c.width, ("heads", "embed"), c.dtype, name="o")(y).astype(x.dtype)
        y = Dense(c.ffn, ("embed", "mlp"), c.dtype, name="up")(LayerNorm(EPSILON, name="norm_ffn")(x))
        y = Dense(c.width, ("mlp", "embed"), c.dtype, name="down")(nn.gelu(y, approximate=False))
        return x + y.astype(x.dtype), None


class ImageEncoder(nn.Module):
    """Tokens [b n e] of pixels [b s s 3] from `preprocess`, the class token first; float32 out.

    s is `config.image` and n is 1 + (s/patch)²: 257. They are the states before the last block, so neither
    that block nor the norm after it has parameters here.
    Source: Wan2.1 wan/modules/clip.py, VisionTransformer with use_31_block. It runs in float16; here the
    products run in `config.dtype` and the stream between blocks is float32: with bfloat16 for both, the
    rounding of 31 blocks would be twice as far from float32.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(self, pixels: Image) -> ImageTokens:
        c = self.config
        x = rearrange(pixels, "b (h p) (w q) c -> b (h w) (c p q)", p=c.patch, q=c.patch)
        x = Dense(c.width, ("patch", "embed"), c.dtype, bias=False, name="patch_embedding")(x)
        init = nn.initializers.normal(c.width**-0.5)
        first = self.param("class_token", named(init, "embed"), (c.width,))
        positions = self.param("positions", named(init, None, "embed"), (x.shape[1] + 1, c.width))
        first = repeat(first.astype(jnp.float32), "e -> b 1 e", b=x.shape[0])
        x = jnp.concatenate([first, x.astype(jnp.float32)], axis=1) + positions.astype(jnp.float32)
        x = LayerNorm(EPSILON, name="norm_in")(x)
        return stacked(Block, c.layers - 1)(c, name="layers")(x)[0]


def abstract(config: CLIPConfig):
    """The parameters of the tower as shapes with logical axis names; none is allocated."""
    pixels = jnp.zeros((1, config.image, config.image, 3))
    return jax.eval_shape(ImageEncoder(config).init, jax.random.key(0), pixels)["params"]
