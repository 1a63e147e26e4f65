"""Layers that more than one network uses."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

Names = tuple[str | None, ...]


def named(init: Callable, *names: str | None) -> Callable:
    """The initialiser, with a logical name for every axis of the parameter; `sharding` reads the names."""
    return nn.with_logical_partitioning(init, names)


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """That of products of this type: float32 means float32, where TPUs and GPUs would round to less."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """x·kernel in x's dtype."""
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision(x.dtype))


class Dense(nn.Module):
    """x [… in] → [… features]: x·kernel + bias, computed in `dtype` from float32 parameters.

    Where the `lora` collection holds `a` [in r] and `b` [r out] for this layer, x·a·b is added.
    """

    features: int
    names: Names = ("embed", "embed_out")
    dtype: DTypeLike = jnp.float32
    bias: bool = True
    initializer: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = self.param("kernel", named(self.initializer, *self.names), (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = product(x, kernel)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y = y + product(product(x, a), b)
        if self.bias:
            y = y + self.param("bias", named(nn.initializers.zeros, self.names[-1]), (self.features,)).astype(
                self.dtype
            )
        return y


class RMSNorm(nn.Module):
    """x/√(mean x² + ε)·scale over the last axis; statistics and product in float32, returned in x's dtype."""

    epsilon: float = 1e-6
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", named(nn.initializers.ones, self.axis), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.epsilon)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Float[Array, "... d"], epsilon: float = 1e-6) -> Float[Array, "... d"]:
    """(x − mean)/√(variance + ε) over the last axis, biased variance, no parameters; float32 out."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + epsilon)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned scale and bias; float32 inside, x's dtype out."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", named(nn.initializers.ones, "embed"), (x.shape[-1],))
        bias = self.param("bias", named(nn.initializers.zeros, "embed"), (x.shape[-1],))
        y = layer_norm(x, self.epsilon) * scale.astype(jnp.float32) + bias.astype(jnp.float32)
        return y.astype(x.dtype)


ATTENTION = "attention"
"""The name under which what attention gives is kept for the gradient, by the policies below that keep it."""

_policies = jax.checkpoint_policies
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,
    "attention": _policies.save_only_these_names(ATTENTION),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ATTENTION],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What of a layer is kept for the gradient, by name: everything; nothing but its input; that and what its
self-attention gave, whose computation grows with the square of the tokens; the same, in the host's memory."""


def stacked(layer: type[nn.Module], length: int, remat: str = "none"):
    """`layer` scanned over `length` layers: one compiled layer whatever the depth.

    The layer takes (x, *what is the same for all) and gives (x, None). Parameters and adapters are stacked
    on a first axis named "layers"; what `remat`, a name of REMAT, does not keep is computed again for the
    gradient.
    """
    policy = REMAT[remat]
    return nn.scan(
        nn.remat(layer, prevent_cse=False, policy=policy) if policy else layer,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _leading_bits(x: np.ndarray, bits: int) -> np.ndarray:
    """x with all but the first `bits` bits of its significand set to zero."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)


def sinusoid(timestep: Float[Array, "..."], width: int) -> Float[Array, "... d"]:
    """cos(t·ωᵢ) then sin(t·ωᵢ), ωᵢ = 10000^(−i/(width/2)); timestep 0 … 1024, float32, fractions allowed.

    Wan computes the angles in float64, which plain float32 misses by 2e-5 at t = 1000. Here they are counted
    in turns, and the frequencies split on the host into 12 leading bits, 12 more and a rest: the product of
    the first with a whole timestep is exact, so that quarter turns drop out of it without rounding, and the
    result is within 2e-7 of float64.
    """
    half = width // 2
    turns = 10000.0 ** (-np.arange(half) / half) / (2 * np.pi)
    high = _leading_bits(turns, 12)
    middle = _leading_bits(turns - high, 12)
    whole = jnp.floor(timestep)[..., None]
    part = (timestep - jnp.floor(timestep))[..., None]

    exact = whole * np.float32(high)
    quarters = jnp.round(4 * exact)
    rest = whole * np.float32(middle) + whole * np.float32(turns - high - middle) + part * np.float32(turns)
    turn = (exact - quarters / 4) + rest
    more = jnp.round(4 * turn)
    angle = 2 * np.pi * (turn - more / 4)
    quadrant = ((quarters + more) % 4).astype(jnp.int32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    cosine = jnp.select([quadrant == 0, quadrant == 1, quadrant == 2], [cos, -sin, -cos], sin)
    sine = jnp.select([quadrant == 0, quadrant == 1, quadrant == 2], [sin, cos, -sin], -cos)
    return jnp.concatenate([cosine, sine], axis=-1)


def rope_angles(positions: int, width: int) -> np.ndarray:
    """Angles [positions, width/2] of rotary embedding on one axis, float64 on the host: p·θ^(−2i/width)."""
    return np.outer(np.arange(positions), 10000.0 ** (-np.arange(0, width, 2) / width))


def rope_table(grid: tuple[int, int, int], width: int) -> tuple[Array, Array]:
    """(cos, sin) [f·h·w, width/2] of Wan's 3-D rotary embedding for a grid (f, h, w) of tokens.

    The head's pairs are dealt to the axes as Wan does: height and width get ⌊width/6⌋ pairs each, time the
    rest (22, 21, 21 of 64 for width 128), each axis with frequencies of its own width. Built per axis in
    float64 and broadcast on the device, so that no constant grows with the product of the axes.
    """
    side = 2 * (width // 6)
    widths = (width - 2 * side, side, side)
    f, h, w = grid
    patterns = ("f k -> f 1 1 k", "h k -> 1 h 1 k", "w k -> 1 1 w k")

    def table(function: Callable) -> Array:
        axes = [
            jnp.broadcast_to(
                rearrange(jnp.asarray(function(rope_angles(n, k)), jnp.float32), pattern), (f, h, w, k // 2)
            )
            for n, k, pattern in zip(grid, widths, patterns, strict=True)
        ]
        return rearrange(jnp.concatenate(axes, -1), "f h w k -> (f h w) k")

    return table(np.cos), table(np.sin)


def rotate(x: Float[Array, "b n a k"], table: tuple[Array, Array]) -> Float[Array, "b n a k"]:
    """x with its interleaved pairs (x₀,x₁), (x₂,x₃)… turned by the table's angles; float32 inside."""
    cos, sin = (rearrange(t, "n k -> n 1 k") for t in table)
    pairs = rearrange(x.astype(jnp.float32), "b n a (k two) -> two b n a k", two=2)
    turned = jnp.stack([pairs[0] * cos - pairs[1] * sin, pairs[0] * sin + pairs[1] * cos])
    return rearrange(turned, "two b n a k -> b n a (k two)").astype(x.dtype)
