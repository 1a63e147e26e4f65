"""Layers that more than one network uses."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

from fvdm_jax import sharding
from fvdm_jax.kernels.attention import platform
from fvdm_jax.kernels.flash import ATTENTION
from fvdm_jax.sharding import Names


def named(init: Callable, *names: str | None) -> Callable:
    """The initialiser, with a logical name for every axis of the parameter; `sharding` reads the names."""
    return nn.with_logical_partitioning(init, names)


def pair_names(names: Names) -> tuple[Names, Names]:
    """Logical axes of adapters a [in r] and b [r out] beside a kernel with these."""
    rows, columns = names
    return (rows, None), ("rank", columns)


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """That of products of this type: float32 means float32, where TPUs and GPUs would round to less."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(x: Float[Array, "... i"], kernel: Float[Array, "i o"], names: Names) -> Float[Array, "... o"]:
    """x·kernel in x's dtype, on the mesh that is set; `names` are the kernel's logical axes.

    The rows of the kernel come together from the devices that keep them, and its gradient goes back to them
    in parts: said step by step, since XLA by itself sends whole arrays and sums those of all devices. Both go
    in x's dtype: in bfloat16 the gradients of several devices are added as such, and the sum is then float32.
    """
    kernel = kernel.astype(x.dtype)
    over = jax.sharding.get_abstract_mesh()
    if over.empty or over.size == 1:
        return _multiplied(x, kernel)
    spec = sharding.fitting(sharding.kept(names), kernel.shape, over)
    parts = [axis for axis in sharding.axes(spec[0]) if axis in sharding.ROWS]
    inner, outer = (tuple(axis for axis in sharding.axes(cut) if axis not in parts) or None for cut in spec)

    def multiply(x, kernel):
        for axis in reversed(parts):
            kernel = jax.lax.all_gather(kernel, axis, axis=0, tiled=True)
        y = _multiplied(x, kernel)
        return jax.lax.psum(y, inner) if inner else y

    taken, given = (PartitionSpec(*sharding.activations(x.ndim), cut) for cut in (inner, outer))
    taken = sharding.fitting(taken, x.shape, over)
    given = sharding.fitting(given, (*x.shape[:-1], kernel.shape[1]), over)
    return jax.shard_map(multiply, in_specs=(taken, spec), out_specs=given, check_vma=False)(x, kernel)


def _multiplied(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    # On CPUs the fast products of bfloat16 are those whose results are float32; elsewhere it is all the same.
    wide = jnp.float32 if platform() == "cpu" else None
    product = jnp.matmul(x, kernel, precision=precision(x.dtype), preferred_element_type=wide)
    return product.astype(x.dtype)


class Dense(nn.Module):
    """x [… in] → [… features]: x·kernel + bias, computed in `dtype` from float32 parameters.

    Where the `lora` collection holds `a` [in r] and `b` [r out] for this layer, x·a·b is added. With `heads`
    the features come in the order of `halves`: to turn the parameters is cheaper than what they give.
    """

    features: int
    names: Names = ("embed", "embed_out")
    dtype: DTypeLike = jnp.float32
    bias: bool = True
    initializer: Callable = nn.initializers.xavier_uniform()
    heads: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = self.param("kernel", named(self.initializer, *self.names), (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = product(x, self._ordered(kernel), self.names)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", part) for part in "ab")
            of_a, of_b = pair_names(self.names)
            y = y + product(product(x, a, of_a), self._ordered(b), of_b)
        if self.bias:
            bias = self.param("bias", named(nn.initializers.zeros, self.names[-1]), (self.features,))
            y = y + self._ordered(bias)
        return y

    def _ordered(self, parameter):
        parameter = parameter.astype(self.dtype)
        return halves(parameter, self.heads) if self.heads else parameter


class RMSNorm(nn.Module):
    """x/√(mean x² + ε)·scale over the last axis; statistics and product in float32, returned in x's dtype.

    With `heads` x is in the order of `halves`.
    """

    epsilon: float = 1e-6
    axis: str | None = "embed"
    heads: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", named(nn.initializers.ones, self.axis), (x.shape[-1],))
        scale = halves(scale, self.heads) if self.heads else scale
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


def stacked(layer: type[nn.Module], length: int, remat: str = "none", axes=nn.broadcast):
    """`layer` scanned over `length` layers: one compiled layer whatever the depth.

    The layer takes (x, *others) and gives (x, None); `axes` says of each of the others whether it is the same
    for all, `nn.broadcast`, or 0, stacked. Parameters and adapters are stacked on a first axis named
    "layers"; what `remat`, a name of REMAT, does not keep is computed again for the gradient.
    """
    policy = REMAT[remat]
    return nn.scan(
        nn.remat(layer, prevent_cse=False, policy=policy) if policy else layer,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _leading_bits(x: np.ndarray, bits: int) -> np.ndarray:
    """x with all but the first `bits` bits of its significand set to zero."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """GELU in its tanh form. For its gradient it keeps its slope alone, and not five arrays."""
    return nn.gelu(x)


@gelu.defjvp
def _gelu_jvp(given: tuple[Array], moved: tuple[Array]) -> tuple[Array, Array]:
    (x,), (towards,) = given, moved
    root, cubed = np.sqrt(2 / np.pi).astype(x.dtype), np.array(0.044715, x.dtype)
    tanh = jnp.tanh(root * (x + cubed * x**3))
    cdf = 0.5 * (1 + tanh)
    slope = cdf + 0.5 * x * (1 - tanh**2) * root * (1 + 3 * cubed * x**2)
    return x * cdf, slope * towards


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
    """(cos, sin) [f, h·w, width/2] of Wan's 3-D rotary embedding for a grid (f, h, w) of tokens.

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
        return rearrange(jnp.concatenate(axes, -1), "f h w k -> f (h w) k")

    return table(np.cos), table(np.sin)


def halves(x: Float[Array, "... d"], heads: int) -> Float[Array, "... d"]:
    """The interleaved pairs (x₀,x₁), (x₂,x₃)… of every head as two halves: x₀, x₂, … and x₁, x₃, …"""
    return rearrange(x, "... (a k two) -> ... (a two k)", a=heads, two=2)


def rotate(x: Float[Array, "b f n a k"], table: tuple[Array, Array]) -> Float[Array, "b f n a k"]:
    """x with its pairs, of which each is in both `halves`, turned by the table's angles; float32 inside."""
    cos, sin = (rearrange(t, "f n k -> f n 1 k") for t in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x.dtype)
