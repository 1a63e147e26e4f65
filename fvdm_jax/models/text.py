"""The encoder of umT5: what the network reads of a prompt."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fvdm_jax.models.layers import Dense, RMSNorm, named, precision, stacked
from fvdm_jax.shapes import Mask, TextStates, Tokens

BUCKETS = 32
FARTHEST = 128
"""Relative positions are told apart exactly up to a quarter of the buckets, then more coarsely to this."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the encoder; the defaults are umT5-XXL's."""

    vocabulary: int = 256384
    width: int = 4096
    heads: int = 64
    head_width: int = 64
    ffn: int = 10240
    layers: int = 24
    length: int = 512
    dtype: str = "bfloat16"


def relative_buckets(length: int) -> np.ndarray:
    """Bucket [query, key] of each relative position, T5's bidirectional rule; the logarithm in float32."""
    relative = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = BUCKETS // 2, BUCKETS // 4
    distance = np.maximum(np.abs(relative), 1).astype(np.float32)
    scale = np.float32(half - exact) / np.log(np.float32(FARTHEST / exact))
    coarse = exact + (np.log(distance / np.float32(exact)) * scale).astype(np.int32)
    bucket = np.where(np.abs(relative) < exact, np.abs(relative), np.minimum(coarse, half - 1))
    return bucket + half * (relative > 0)


class SelfAttention(nn.Module):
    """umT5's attention: scores not divided by √k, a position table of its own, softmax in float32."""

    config: TextConfig

    @nn.compact
    def __call__(self, x, mask, buckets):
        c = self.config
        inner = c.heads * c.head_width

        def heads(name, variance=1.0):
            init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
            y = Dense(inner, ("embed", "heads"), c.dtype, bias=False, initializer=init, name=name)(x)
            return rearrange(y, "b n (a k) -> b n a k", a=c.heads)

        table = self.param(
            "positions", named(nn.initializers.normal(0.02), None, "heads"), (BUCKETS, c.heads)
        )
        scores = jnp.einsum(
            "b n a k, b m a k -> b a n m",
            # Scores are not divided by √k, so queries begin smaller by as much, as T5's do.
            heads("q", 1 / c.head_width),
            heads("k"),
            precision=precision(c.dtype),
            preferred_element_type=jnp.float32,
        )
        scores = scores + rearrange(table.astype(jnp.float32)[buckets], "n m a -> a n m")
        scores = jnp.where(rearrange(mask, "b m -> b 1 1 m"), scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(c.dtype)
        out = rearrange(
            jnp.einsum("b a n m, b m a k -> b n a k", weights, heads("v")), "b n a k -> b n (a k)"
        )
        return Dense(c.width, ("heads", "embed"), c.dtype, bias=False, name="o")(out)


class Layer(nn.Module):
    """Attention, then a gated feed-forward, each on the normalised stream and added to it."""

    config: TextConfig

    @nn.compact
    def __call__(self, x, mask, buckets):
        c = self.config
        x = x + SelfAttention(c, name="attention")(RMSNorm(name="norm_attention")(x), mask, buckets)
        y = RMSNorm(name="norm_ffn")(x)
        gate = Dense(c.ffn, ("embed", "mlp"), c.dtype, bias=False, name="gate")(y)
        up = Dense(c.ffn, ("embed", "mlp"), c.dtype, bias=False, name="up")(y)
        return x + Dense(c.width, ("mlp", "embed"), c.dtype, bias=False, name="down")(
            nn.gelu(gate) * up
        ), None


class TextEncoder(nn.Module):
    """States [b l e] of tokens [b l], zero where the mask [b l] is False; float32 out.

    Source: Wan2.1 wan/modules/t5.py. Wan cuts the rows after the true length and pads with zeros
    afterwards, which is the same.
    """

    config: TextConfig

    @nn.compact
    def __call__(self, tokens: Tokens, mask: Mask) -> TextStates:
        c = self.config
        init = named(nn.initializers.normal(1.0), "vocabulary", "embed")
        embedding = self.param("embedding", init, (c.vocabulary, c.width))
        x = jnp.asarray(embedding, c.dtype)[tokens]
        x, _ = stacked(Layer, c.layers)(c, name="layers")(x, mask, relative_buckets(tokens.shape[1]))
        x = RMSNorm(name="norm")(x).astype(jnp.float32)
        return x * mask[..., None].astype(jnp.float32)


def abstract(config: TextConfig):
    """The parameters of the encoder as shapes with logical axis names; none is allocated."""
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    return jax.eval_shape(TextEncoder(config).init, jax.random.key(0), tokens, mask)["params"]
