"""Wan's diffusion transformer with a timestep for every frame.

At equal timesteps it is Wan 2.1's network; at any others it is what Pusa (arXiv 2507.16116) and Wan 2.2's
TI2V-5B compute. The modulation stays [b f 6 d] and broadcasts over the tokens of a frame: the reference
implementations repeat it for every token, 4.6 GB at 14B and 720p where this is 2.6 MB.
"""

import dataclasses
from functools import partial, reduce
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fvdm_jax import sharding
from fvdm_jax.defaults import PATCH
from fvdm_jax.kernels.parallel import Attending, cross_attention, self_attention
from fvdm_jax.models.layers import (
    Dense,
    LayerNorm,
    RMSNorm,
    gelu,
    layer_norm,
    named,
    rope_table,
    rotate,
    sinusoid,
    stacked,
)
from fvdm_jax.shapes import Latents, Levels, TextStates

FrameTokens = Float[Array, "b f n d"]

FREQUENCIES = 256
"""Width of the sinusoid of the timestep."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of one network. `image_width` > 0 adds the CLIP branch of Wan2.1's I2V models,
    `image_tokens` > 0 FLF2V's learned position for each of its image tokens."""

    width: int
    ffn: int
    heads: int
    layers: int
    channels_in: int = 16
    channels_out: int = 16
    text_width: int = 4096
    image_width: int = 0
    image_tokens: int = 0
    dtype: str = "bfloat16"


_14B = DiTConfig(5120, 13824, 40, 40)
SIZES = {
    "wan_1_3b": DiTConfig(1536, 8960, 12, 30),
    "wan_5b": DiTConfig(3072, 14336, 24, 30, channels_in=48, channels_out=48),
    "wan_14b": _14B,
    "wan_14b_i2v": dataclasses.replace(_14B, channels_in=36, image_width=1280),
    "wan_14b_flf2v": dataclasses.replace(_14B, channels_in=36, image_width=1280, image_tokens=514),
    "wan_a14b_i2v": dataclasses.replace(_14B, channels_in=36),
}
"""The published sizes; `wan_14b` is also each expert of Wan2.2's T2V-A14B, `wan_a14b_i2v` of its I2V-A14B."""


class Extra(NamedTuple):
    """What Wan's own I2V models take beside text: latents joined to x's channels, and CLIP's image tokens."""

    channels: Latents | None = None
    image: Float[Array, "b n e"] | None = None


NO_EXTRA = Extra()


class Keys(NamedTuple):
    """Keys and values [b m a k] of what is attended to."""

    k: Float[Array, "b m a k"]
    v: Float[Array, "b m a k"]


class Prompt(NamedTuple):
    """What cross-attention needs of a text, and of an image where there is one: of one layer, or stacked."""

    text: Keys
    image: Keys | None = None


class Attention(nn.Module):
    """Wan's attention: q and k normalised over the full width before the heads are split.

    Where `rotated` it is self-attention over the tokens of all frames, by a rope table; else cross-attention
    to a prompt, and of an image in it there is a second softmax, of the same queries, before the output.
    """

    config: DiTConfig
    attending: Attending = Attending()
    rotated: bool = False

    def setup(self):
        c, halved = self.config, self.config.heads if self.rotated else 0
        for name in ("q", "k", "v", "k_img", "v_img"):
            heads = halved if name in ("q", "k") else 0
            setattr(self, name, Dense(c.width, ("embed", "heads"), c.dtype, heads=heads))
        for name in ("norm_q", "norm_k", "norm_k_img"):
            setattr(self, name, RMSNorm(axis="heads", heads=halved))
        self.o = Dense(c.width, ("heads", "embed"), c.dtype)

    def __call__(self, x: FrameTokens, prompt: Prompt | None = None, rope=None) -> FrameTokens:
        q = self._heads(self.norm_q(self.q(x)))
        if self.rotated:
            k, v = self._heads(self.norm_k(self.k(x))), self._heads(self.v(x))
            out = self_attention(rotate(q, rope), rotate(k, rope), v, self.attending)
        else:
            out = cross_attention(q, *prompt.text, self.attending)
            if prompt.image is not None:
                out = out + cross_attention(q, *prompt.image, self.attending)
        return self.o(rearrange(out, "b f n a k -> b f n (a k)"))

    def prompt(self, text: TextStates, image: Float[Array, "b n e"] | None = None) -> Prompt:
        """What this layer attends to of the embedded text and image."""
        keys = Keys(self._heads(self.norm_k(self.k(text))), self._heads(self.v(text)))
        if image is None:
            return Prompt(keys)
        return Prompt(
            keys, Keys(self._heads(self.norm_k_img(self.k_img(image))), self._heads(self.v_img(image)))
        )

    def _heads(self, y):
        return rearrange(y, "... (a k) -> ... a k", a=self.config.heads)


class FeedForward(nn.Module):
    """Dense, GELU (tanh form), Dense."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x):
        x = Dense(self.config.ffn, ("embed", "mlp"), self.config.dtype, name="up")(x)
        return Dense(self.config.width, ("mlp", "embed"), self.config.dtype, name="down")(gelu(x))


def modulation_table(module: nn.Module, rows: int, width: int) -> Float[Array, "rows d"]:
    """The learned table that is added to a frame's modulation; Wan draws it N(0, 1/width)."""
    init = nn.initializers.normal(width**-0.5)
    table = module.param("modulation", named(init, None, "embed"), (rows, width))
    return table.astype(jnp.float32)


def split_modulation(table, embedded) -> list[Float[Array, "b f 1 d"]]:
    """Table [r d] + embedded [b f r d], as r arrays that broadcast over the tokens of a frame."""
    return list(rearrange(table + embedded, "b f r d -> r b f 1 d"))


def gated(x: FrameTokens, gate: Float[Array, "b f 1 d"], y: FrameTokens) -> FrameTokens:
    """x + gate·y, in float32, returned in x's dtype."""
    return (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(x.dtype)


class Block(nn.Module):
    """One layer: self-attention and feed-forward, modulated and gated per frame, around cross-attention.

    `prompt` is a Prompt of this layer, or the embedded (text, image) of which it is made.
    """

    config: DiTConfig
    attending: Attending = Attending()

    @nn.compact
    def __call__(self, x: FrameTokens, embedded, prompt, rope):
        c, dtype = self.config, self.config.dtype
        x = sharding.constrained(x, sharding.TOKENS)
        table = modulation_table(self, 6, c.width)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = split_modulation(table, embedded)

        y = layer_norm(x) * (1 + scale_a) + shift_a
        x = gated(x, gate_a, Attention(c, self.attending, True, name="self_attn")(y.astype(dtype), rope=rope))
        cross = Attention(c, self.attending, name="cross_attn")
        prompt = prompt if isinstance(prompt, Prompt) else cross.prompt(*prompt)
        x = x + cross(LayerNorm(name="norm3")(x), prompt)
        y = layer_norm(x) * (1 + scale_f) + shift_f
        return gated(x, gate_f, FeedForward(c, name="ffn")(y.astype(dtype))), None


class MLP(nn.Module):
    """Dense, activation, Dense: the embeddings of time and text."""

    features: int
    activation: str
    dtype: str

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(0.02)
        x = Dense(self.features, ("embed_in", "embed"), self.dtype, initializer=init, name="up")(x)
        x = {"silu": nn.silu, "gelu": gelu}[self.activation](x)
        return Dense(self.features, ("embed", "embed_out"), self.dtype, initializer=init, name="down")(x)


class ImageEmbedding(nn.Module):
    """CLIP's tokens [b n e] to the width of the network; ε is 1e-5 and GELU is exact here, as in CLIP."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        if c.image_tokens:
            init = named(nn.initializers.zeros, None, "embed_in")
            positions = self.param("positions", init, (c.image_tokens, c.image_width))
            x = x + positions.astype(x.dtype)
        x = LayerNorm(1e-5, name="norm_in")(x)
        x = Dense(c.image_width, ("embed_in", "embed_in_out"), c.dtype, name="up")(x)
        x = Dense(c.width, ("embed_in", "embed"), c.dtype, name="down")(nn.gelu(x, approximate=False))
        return LayerNorm(1e-5, name="norm_out")(x)


class Head(nn.Module):
    """Tokens to patches of velocity, modulated by the time embedding itself, not its projection.

    In float32, as Wan has it: guidance would multiply any rounding of the velocity.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, x: FrameTokens, embedded: Float[Array, "b f d"]):
        c = self.config
        table = modulation_table(self, 2, c.width)
        shift, scale = split_modulation(table, rearrange(embedded, "b f d -> b f 1 d"))
        x = layer_norm(x) * (1 + scale) + shift
        init = nn.initializers.zeros
        return Dense(PATCH**2 * c.channels_out, ("embed", "patch"), "float32", initializer=init, name="out")(
            x
        )


class DiT(nn.Module):
    """Velocity [b f h w c] of noisy latents x [b f h w c] at a timestep 0 … 1000 for every frame.

    `text` [b l e] is zero after each prompt's true length and is attended unmasked, as Wan does; h and w
    are even. float32 in, float32 out; inside `config.dtype`, with the time embedding, norms, modulation,
    softmax and head in float32. Instead of `text` a Prompt, as of `told`, will do. `extra` is for the
    networks with 36 input channels; `remat`, a name of `layers.REMAT`, and `attending` change memory and time
    and not results.
    Source: Wan2.1 wan/modules/model.py; per frame as Wan2.2's, with the modulation not repeated per token.
    """

    config: DiTConfig
    remat: str = "none"
    attending: Attending = Attending()

    @nn.compact
    def __call__(
        self, x: Latents, timestep: Levels, text: TextStates | Prompt, extra: Extra = NO_EXTRA
    ) -> Latents:
        c = self.config
        if extra.channels is not None:
            x = jnp.concatenate([x, extra.channels], axis=-1)
        f, h, w = x.shape[1], x.shape[2] // PATCH, x.shape[3] // PATCH

        tokens = rearrange(x, "b f (h p) (w q) c -> b f (h w) (c p q)", p=PATCH, q=PATCH)
        tokens = Dense(c.width, ("patch", "embed"), c.dtype, name="patch_embedding")(tokens)
        time = MLP(c.width, "silu", "float32", name="time_embedding")(sinusoid(timestep, FREQUENCIES))
        projected = Dense(6 * c.width, ("embed", "mlp"), "float32", name="time_projection")(nn.silu(time))
        projected = rearrange(projected, "b f (r d) -> b f r d", r=6)
        given, prompt = isinstance(text, Prompt), text
        if not given:
            image = None if extra.image is None else ImageEmbedding(c, name="image_embedding")(extra.image)
            prompt = MLP(c.width, "gelu", c.dtype, name="text_embedding")(text), image

        rope = rope_table((f, h, w), c.width // c.heads)
        axes = (nn.broadcast, 0 if given else nn.broadcast, nn.broadcast)
        tokens, _ = stacked(Block, c.layers, self.remat, axes)(c, self.attending, name="blocks")(
            tokens, projected, prompt, rope
        )
        patches = Head(c, name="head")(tokens, time)
        return rearrange(patches, "b f (h w) (p q c) -> b f (h p) (w q) c", h=h, p=PATCH, q=PATCH)


def told(config: DiTConfig, variables: dict, text: TextStates, extra: Extra = NO_EXTRA) -> Prompt:
    """The Prompt of all layers, stacked, which the steps of a sampler share.

    `variables` are as `DiT.apply` takes them.
    """

    def of(*path: str) -> dict:
        found = {
            kind: reduce(lambda tree, name: tree.get(name, {}), path, tree)
            for kind, tree in variables.items()
        }
        return {kind: tree for kind, tree in found.items() if tree}

    text = MLP(config.width, "gelu", config.dtype).apply(of("text_embedding"), text)
    image = extra.image
    if image is not None:
        image = ImageEmbedding(config).apply(of("image_embedding"), image)
    layer = partial(Attention(config).apply, method="prompt")
    prompts = jax.lax.map(lambda variables: layer(variables, text, image), of("blocks", "cross_attn"))
    return jax.tree.map(lambda keys: sharding.constrained(keys, sharding.KEYS), prompts)


def example(config: DiTConfig) -> tuple[Latents, Levels, TextStates, Extra]:
    """The smallest inputs that the network takes, of zeros."""
    x = jnp.zeros((1, 1, PATCH, PATCH, config.channels_out))
    extra = Extra(
        channels=jnp.zeros((1, 1, PATCH, PATCH, config.channels_in - config.channels_out))
        if config.channels_in > config.channels_out
        else None,
        image=jnp.zeros((1, config.image_tokens or 1, config.image_width)) if config.image_width else None,
    )
    return x, jnp.zeros((1, 1)), jnp.zeros((1, 1, config.text_width)), extra


def options(config: DiTConfig, platform: str) -> dict[str, str]:
    """Of the compiler, for programs with this network.

    XLA's new library of fusions for CPUs takes a fifth longer for products in float32 (jax 0.10 and 0.11).
    """
    return (
        {"xla_cpu_experimental_ynn_fusion_type": ""} if (platform, config.dtype) == ("cpu", "float32") else {}
    )


def stored(dtype: str, path: str, leaf: jax.ShapeDtypeStruct):
    """The type of a parameter that stands still: that which it is computed with, float32 or `dtype`."""
    return jnp.dtype(dtype) if path.startswith("blocks/") and path.endswith("/kernel") else jnp.float32


def abstract(config: DiTConfig):
    """The parameters of the network as shapes with logical axis names; none is allocated."""
    return jax.eval_shape(DiT(config).init, jax.random.key(0), *example(config))["params"]
