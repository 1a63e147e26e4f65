"""Wan's causal video VAEs, 2.1 and 2.2, as two configs of one network; of a whole clip, or piece by piece.

A clip of t = 4·f − 3 frames becomes f latent frames; no frame ever sees a later one. The first frame is
encoded alone, so an image is a clip of one frame. Source: Wan2.1 wan/modules/vae.py and Wan2.2
wan/modules/vae2_2.py, whose chunk cache equals the whole-clip forms used here.

A clip may come piece by piece (models/causal.py); `begun` says of a piece that it is not the clip's first.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat

from fvdm_jax.kernels.attention import attention
from fvdm_jax.models.causal import Conv, Frames, framewise
from fvdm_jax.models.layers import named
from fvdm_jax.shapes import Latents, Video


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of one VAE. `temporal` says of each halving of the frame whether it halves time as well;
    `shortcuts` are Wan 2.2's parameter-free averages and copies around every level."""

    width: int
    decoder_width: int
    latent: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    temporal: tuple[bool, ...] = (False, True, True)
    blocks: int = 2
    patch: int = 1
    shortcuts: bool = False
    dtype: str = "float32"

    @property
    def spatial(self) -> int:
        """Pixels to a side of one latent pixel."""
        return self.patch * 2 ** len(self.temporal)

    @property
    def apart(self) -> int:
        """Levels at the pixels' end that join no frames."""
        return [*self.temporal, True].index(True)

    @property
    def stride(self) -> int:
        """Frames to a latent frame, but for the first."""
        return 2 ** sum(self.temporal)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


_MEAN_2_1 = _numbers("""
    -0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 0.4134 -0.0715 0.5517 -0.3632 -0.1922
    -0.9497 0.2503 -0.2921
""")
_STD_2_1 = _numbers("""
    2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253
    2.8251 1.9160
""")
_MEAN_2_2 = _numbers("""
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891 0.1570
    -0.0098 0.0375 -0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322
    0.1109 0.1567 -0.0729 0.0899 -0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520
    0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667
""")
_STD_2_2 = _numbers("""
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885 0.6165
    0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917
    0.4069 0.4999 0.6866 0.4093 0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 0.3971 1.0600
    0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
""")
"""Mean and spread of each latent channel, as published."""

SIZES = {
    "wan_2_1": VAEConfig(96, 96, 16, _MEAN_2_1, _STD_2_1),
    "wan_2_2": VAEConfig(160, 256, 48, _MEAN_2_2, _STD_2_2, patch=2, shortcuts=True),
}
"""The published sizes; Wan2.2's A14B models use `wan_2_1`, only its TI2V-5B uses `wan_2_2`."""


class Norm(nn.Module):
    """x divided by its root mean square over the channels, times a learned scale; float32 inside."""

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        scale = self.param("scale", named(nn.initializers.ones, "conv_in"), (x.shape[-1],))
        y = x.astype(jnp.float32)
        # The floor on the length, 1e-12, is put under the root so that a frame of zeros has a gradient.
        length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(y), -1, keepdims=True), 1e-24))
        return (y / length * x.shape[-1] ** 0.5 * scale.astype(jnp.float32)).astype(x.dtype)


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice, beside the input (through a 1×1×1 convolution where widths differ)."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        y = Conv(self.features, dtype=self.dtype, name="conv_0")(nn.silu(Norm(name="norm_0")(x)))
        y = Conv(self.features, dtype=self.dtype, name="conv_1")(nn.silu(Norm(name="norm_1")(y)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1, 1), dtype=self.dtype, name="shortcut")(x)
        return x + y


class FrameAttention(nn.Module):
    """One head of attention over the pixels of each frame by itself."""

    dtype: str

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        b, _, h, _, c = x.shape
        qkv = Conv(3 * c, (1, 1, 1), dtype=self.dtype, name="qkv")(Norm(name="norm")(x))
        q, k, v = rearrange(qkv, "b t h w (three c) -> three (b t) (h w) 1 c", three=3)
        out = rearrange(attention(q, k, v), "(b t) (h w) 1 c -> b t h w c", b=b, h=h)
        return x + Conv(c, (1, 1, 1), dtype=self.dtype, name="out")(out)


class Down(nn.Module):
    """Halves the frame and, where `temporal`, the frames after the clip's first, which passes by alone."""

    temporal: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Frames, begun: bool = False) -> Frames:
        c = x.shape[-1]
        x = Conv(c, (1, 3, 3), stride=2, dtype=self.dtype, name="conv")(x)
        if not self.temporal:
            return x
        # Called for an image too: its parameters must exist, and the frame be remembered.
        y = Conv(c, (3, 1, 1), dtype=self.dtype, name="time_conv")(x)
        return y[:, 1::2] if begun else jnp.concatenate([x[:, :1], y[:, 2::2]], axis=1)


class Up(nn.Module):
    """Doubles the frames after the clip's first, where `temporal`, and the frame, to `features` channels."""

    temporal: bool
    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Frames, begun: bool = False) -> Frames:
        if self.temporal:
            time = Conv(2 * x.shape[-1], (3, 1, 1), dtype=self.dtype, name="time_conv")
            first, later = (x[:, :0], x) if begun else (x[:, :1], x[:, 1:])
            # After an image nothing is doubled, but zeros are remembered: no frame sees the clip's first.
            doubled = time(later if later.shape[1] else 0 * first)
            doubled = rearrange(doubled, "b t h w (two c) -> b (t two) h w c", two=2)
            x = jnp.concatenate([first, doubled[:, : 2 * later.shape[1]]], axis=1)
        x = repeat(x, "b t h w c -> b t (h p) (w q) c", p=2, q=2)
        return Conv(self.features, (1, 3, 3), dtype=self.dtype, name="conv")(x)


def average_down(x: Frames, features: int, time: int, space: int) -> Frames:
    """Wan 2.2's shortcut down: the values of each cell, averaged in groups to `features` channels."""
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (t i) (h p) (w q) c -> b t h w (c i p q)", i=time, p=space, q=space)
    return reduce(x, "b t h w (o g) -> b t h w o", "mean", o=features)


def copy_up(x: Frames, features: int, time: int, space: int, begun: bool = False) -> Frames:
    """Wan 2.2's shortcut up: channels repeated and dealt to the cell; the clip's first frame stays one."""
    x = repeat(x, "b t h w c -> b t h w (c r)", r=features * time * space**2 // x.shape[-1])
    x = rearrange(x, "b t h w (o i p q) -> b (t i) (h p) (w q) o", i=time, p=space, q=space)
    return x if begun else x[:, time - 1 :]


class Middle(nn.Module):
    """Residual, attention, residual at the smallest size."""

    dtype: str

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        x = Residual(x.shape[-1], self.dtype, name="block_0")(x)
        x = FrameAttention(self.dtype, name="attention")(x)
        return Residual(x.shape[-1], self.dtype, name="block_1")(x)


class Encoder(nn.Module):
    """Pixels to mean and log-variance of the latents, side by side on the channels."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Video, begun: bool = False) -> Frames:
        c, dtype = self.config, self.config.dtype
        apart = c.apart
        x = framewise(self, partial(Encoder._first, levels=apart), x, begun)
        for i in range(apart, len(c.multipliers)):
            x = self._level(i, x, begun)
        x = nn.silu(Norm(name="norm_out")(Middle(dtype, name="middle")(x)))
        x = Conv(2 * c.latent, dtype=dtype, name="conv_out")(x)
        return Conv(2 * c.latent, (1, 1, 1), dtype=dtype, name="quant")(x)

    def _first(self, x: Video, begun: bool, levels: int) -> Frames:
        """The first convolution and so many levels, which do not halve time."""
        p = self.config.patch
        x = rearrange(x, "b t (h q) (w p) c -> b t h w (c p q)", p=p, q=p)
        x = Conv(self.config.width, dtype=self.config.dtype, name="conv_in")(x)
        for i in range(levels):
            x = self._level(i, x, begun)
        return x

    def _level(self, i: int, x: Frames, begun: bool) -> Frames:
        c, features = self.config, self.config.multipliers[i] * self.config.width
        y, down = x, i < len(c.temporal)
        for j in range(c.blocks):
            y = Residual(features, c.dtype, name=f"level_{i}_block_{j}")(y)
        if down:
            y = Down(c.temporal[i], c.dtype, name=f"level_{i}_down")(y, begun)
        if c.shortcuts:
            y = y + average_down(x, features, 2 if down and c.temporal[i] else 1, 2 if down else 1)
        return y


class Decoder(nn.Module):
    """Latents, not normalised, to pixels."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Frames, begun: bool = False) -> Video:
        c, dtype = self.config, self.config.dtype
        x = Conv(c.latent, (1, 1, 1), dtype=dtype, name="post_quant")(x)
        x = Conv(c.multipliers[-1] * c.decoder_width, dtype=dtype, name="conv_in")(x)
        x = Middle(dtype, name="middle")(x)
        apart = len(c.temporal) - c.apart
        for i in range(apart):
            x = self._level(i, x, begun)
        return framewise(self, partial(Decoder._last, levels=apart), x, begun)

    def _level(self, i: int, x: Frames, begun: bool) -> Frames:
        c, features = self.config, self.config.multipliers[::-1][i] * self.config.decoder_width
        y = x
        for j in range(c.blocks + 1):
            y = Residual(features, c.dtype, name=f"level_{i}_block_{j}")(y)
        if i == len(c.temporal):
            return y
        narrow, temporal = features if c.shortcuts else features // 2, c.temporal[::-1][i]
        y = Up(temporal, narrow, c.dtype, name=f"level_{i}_up")(y, begun)
        return y + copy_up(x, features, 2 if temporal else 1, 2, begun) if c.shortcuts else y

    def _last(self, x: Frames, begun: bool, levels: int) -> Video:
        """The levels from `levels` on, which do not double time, and the last convolution."""
        c = self.config
        for i in range(levels, len(c.multipliers)):
            x = self._level(i, x, begun)
        x = Conv(3 * c.patch**2, dtype=c.dtype, name="conv_out")(nn.silu(Norm(name="norm_out")(x)))
        return rearrange(x, "b t h w (c p q) -> b t (h q) (w p) c", p=c.patch, q=c.patch)


class VAE(nn.Module):
    """`encode` and `decode` between pixels −1 … 1 and normalised latents; float32 in and out.

    A clip has 1 + 4n frames (whatever `temporal` halves to) and sides that `config.spatial` divides.
    """

    config: VAEConfig

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def moments(self, video: Video, begun: bool = False) -> tuple[Latents, Latents]:
        """Mean and log-variance of the latents [b f h w c], not normalised."""
        mean, log_variance = jnp.split(self.encoder(video, begun).astype(jnp.float32), 2, axis=-1)
        return mean, log_variance

    def encode(self, video: Video, begun: bool = False) -> Latents:
        """The mean of the latents, normalised; nothing is drawn."""
        c = self.config
        return (self.moments(video, begun)[0] - jnp.asarray(c.mean)) / jnp.asarray(c.std)

    def decode(self, latents: Latents, begun: bool = False) -> Video:
        """Pixels, not clipped to −1 … 1: Wan's wrapper clips, here whoever turns them into bytes does."""
        c = self.config
        x = latents * jnp.asarray(c.std) + jnp.asarray(c.mean)
        return self.decoder(x, begun).astype(jnp.float32)

    def __call__(self, video: Video) -> Video:
        return self.decode(self.encode(video))


def abstract(config: VAEConfig):
    """The parameters of the network as shapes with logical axis names; none is allocated."""
    image = jnp.zeros((1, 1, config.spatial, config.spatial, 3))
    return jax.eval_shape(VAE(config).init, jax.random.key(0), image)["params"]
