"""Adapters: what was learned beside a network's parameters, run beside them or merged into them."""

import re
import zlib
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from fvdm_jax import sharding
from fvdm_jax.kernels.parallel import Attending, described
from fvdm_jax.models import dit
from fvdm_jax.models.layers import pair_names, precision
from fvdm_jax.shapes import Latents, Levels, TextStates

Strength = float | Float[Array, ""]


class Adapters(NamedTuple):
    """Changes to a network's parameters, in trees that mirror them where there is something to change.

    `low_rank` has at a Dense layer {"a": [in r], "b": [r out], "scale": [], "rank": []}, or in a stack
    [layers …] of each; it adds scale·a·b to the kernel. In a stack r is the largest rank, the others are
    padded with zeros, and a layer of rank 0 is not adapted. `delta` has at a parameter what is added to it.
    """

    low_rank: dict
    delta: dict


class Network(NamedTuple):
    """A transformer and the adapters beside it, as functions of their parameters.

    These are {"dit": the network's, "adapters": pairs (Adapters, strength)}, the latter if there are any.
    `remat` and `attending` are as of `DiT`.
    """

    config: dit.DiTConfig
    remat: str = "none"
    attending: Attending = Attending()

    def velocity(
        self,
        params: dict,
        x: Latents,
        timestep: Levels,
        text: TextStates | dit.Prompt,
        extra: dit.Extra = dit.NO_EXTRA,
    ) -> Latents:
        """What the transformer says of x [b f h w c] at timesteps [b f], told [b l e] or a Prompt.

        Of `extra` a Prompt has the image already, and only the channels are used then.
        """
        adapted = variables(params["dit"], params.get("adapters", []))
        return dit.DiT(*self).apply(adapted, x, timestep, text, extra)

    def told(self, params: dict, text: TextStates, extra: dit.Extra = dit.NO_EXTRA) -> dit.Prompt:
        """What every step of a sampler needs of the text [b l e] and of the image of `extra`, made once."""
        return dit.told(self.config, variables(params["dit"], params.get("adapters", [])), text, extra)

    def attention(self, over: Mesh, clip: tuple[int, int, int]) -> str:
        """How attention is computed on the mesh for clips of (f, h, w) in latents.

        ValueError where it cannot be as asked for.
        """
        c, tokens = self.config, clip[1] // dit.PATCH * (clip[2] // dit.PATCH)
        with jax.set_mesh(over):
            return described(self.attending, c.dtype, c.heads, c.width // c.heads, tokens)


TARGETS = r"blocks/(self_attn|cross_attn)/[qkvo]|blocks/ffn/(up|down)"
"""The ten matrices of a block that Pusa adapts (arXiv 2507.16116; its q, k, v, o, ffn.0 and ffn.2)."""


def abstract(params: dict, rank: int, where: str = TARGETS) -> dict:
    """The pairs {"a", "b"} of adapters of this rank as float32 shapes with logical axis names.

    `params` are the network's, as of `dit.abstract`. Adapted are the Dense layers whose path, such as
    "blocks/self_attn/q", the pattern `where` matches whole. Raises ValueError where it matches none.
    """
    pairs = {}
    for path, box in flatten_dict(params, sep="/").items():
        module, _, name = path.rpartition("/")
        if name == "kernel" and re.fullmatch(where, module):
            (*stack, fan_in, fan_out), (*layers, rows, columns) = box.value.shape, box.names
            shapes = (fan_in, rank), (rank, fan_out)
            for part, shape, names in zip("ab", shapes, pair_names((rows, columns)), strict=True):
                leaf = jax.ShapeDtypeStruct((*stack, *shape), jnp.float32)
                pairs[f"{module}/{part}"] = nn.LogicallyPartitioned(leaf, (*layers, *names))
    if not pairs:
        raise ValueError(f"{where!r} matches no layer; the default is {TARGETS!r}")
    return unflatten_dict(pairs, sep="/")


def shardings(over: Mesh, params: dict, adapters: Adapters) -> Adapters:
    """Where each array of `adapters` lies on the mesh, beside `params`, as of `dit.abstract`."""
    boxes = flatten_dict(params, sep="/")

    def place(spec: PartitionSpec, leaf: Array) -> NamedSharding:
        return NamedSharding(over, sharding.fitting(spec, jnp.shape(leaf), over))

    low_rank = flatten_dict(adapters.low_rank, sep="/")
    for path, leaf in low_rank.items():
        module, _, part = path.rpartition("/")
        *layers, rows, columns = boxes[f"{module}/kernel"].names
        names = dict(zip("ab", pair_names((rows, columns)), strict=True)).get(part, ())
        low_rank[path] = place(sharding.kept((*layers, *names)), leaf)
    delta = {
        path: place(sharding.kept(boxes[path].names), leaf)
        for path, leaf in flatten_dict(adapters.delta, sep="/").items()
    }
    return Adapters(unflatten_dict(low_rank, sep="/"), unflatten_dict(delta, sep="/"))


def init(key: jax.Array, abstract: dict) -> dict:
    """Pairs for the shapes of `abstract`: a uniform within ±1/√in, b zero, so that nothing is changed yet.

    Each is drawn by a key of its name. Source: PEFT's default, as Pusa trains from.
    """

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
        if path.endswith("/b"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        own, bound = jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape[-2] ** -0.5
        return jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)

    leaves = flatten_dict(nn.meta.unbox(abstract), sep="/")
    return unflatten_dict({path: draw(path, leaf) for path, leaf in leaves.items()}, sep="/")


def scaled(pairs: dict, scale: float) -> Adapters:
    """Pairs {"a", "b"} as Adapters that add scale·a·b; scale is alpha/rank."""
    leaves = flatten_dict(pairs, sep="/")
    for path, a in list(leaves.items()):
        if path.endswith("/a"):
            module = path.removesuffix("/a")
            leaves[f"{module}/scale"] = jnp.full(a.shape[:-2], scale, jnp.float32)
            leaves[f"{module}/rank"] = jnp.full(a.shape[:-2], a.shape[-1], jnp.int32)
    return Adapters(unflatten_dict(leaves, sep="/"), {})


@jax.jit
def changes(params: dict, adapters: Adapters) -> dict[str, Float[Array, "..."]]:
    """‖scale·a·b‖/‖kernel‖ by module, [layers] in a stack: Frobenius norms, without making a·b."""
    leaves = flatten_dict(params, sep="/")

    def ratio(name: str, layer: dict) -> Array:
        a, b = layer["a"].astype(jnp.float32), _scaled(layer, 1.0)
        # ‖ab‖² is the sum of (aᵀa)∘(bbᵀ), of r × r numbers.
        inner = jnp.einsum("...ir,...is->...rs", a, a, precision="highest")
        outer = jnp.einsum("...ro,...so->...rs", b, b, precision="highest")
        square = jnp.maximum(jnp.sum(inner * outer, (-2, -1)), 0)
        kernel = leaves[f"{name}/kernel"].astype(jnp.float32)
        return jnp.sqrt(square / jnp.sum(jnp.square(kernel), (-2, -1)))

    return {name: ratio(name, layer) for name, layer in _checked(leaves, adapters).items()}


def variables(params: dict, adapters: list[tuple[Adapters, Strength]]) -> dict:
    """What `DiT.apply` takes for the parameters with every (adapters, strength) at work, none merged.

    Low ranks become the collection "lora", side by side along r; deltas are summed into the parameters in
    float32 and rounded once to the parameter's dtype. Strengths may be traced, so that a change compiles
    nothing. Raises ValueError, naming the module, where an adapter does not fit.
    """
    leaves, pairs, changes = flatten_dict(params, sep="/"), {}, {}
    for each, strength in adapters:
        for name, layer in _checked(leaves, each).items():
            pairs.setdefault(name, []).append((layer["a"], _scaled(layer, strength)))
        for name, delta in flatten_dict(each.delta, sep="/").items():
            changes.setdefault(name, []).append((delta, strength))
    for name, terms in changes.items():
        leaves[name] = _sum(leaves[name], terms).astype(leaves[name].dtype)
    return {"params": unflatten_dict(leaves, sep="/"), "lora": _side_by_side(pairs)}


def check(params: dict, adapters: Adapters) -> None:
    """Raises ValueError, naming the module, unless the adapters fit the parameters; shapes will do."""
    jax.eval_shape(variables, params, [(adapters, 1.0)])


def merge(params: dict, adapters: Adapters, strength: Strength) -> dict:
    """The parameters with the adapters added: computed in float32, one layer of a stack at a time, and
    rounded once to each parameter's dtype. What is not adapted is the same array as before.

    Raises ValueError, naming the module, where an adapter does not fit.
    """
    leaves = flatten_dict(params, sep="/")
    strength = jnp.asarray(strength, jnp.float32)
    modules = {f"{name}/kernel": layer for name, layer in _checked(leaves, adapters).items()}
    deltas = flatten_dict(adapters.delta, sep="/")
    for name in modules.keys() | deltas.keys():
        leaves[name] = _merged(leaves[name], deltas.get(name), modules.get(name), strength)
    return unflatten_dict(leaves, sep="/")


@jax.jit
def _merged(leaf: Array, delta: Array | None, layer: dict | None, strength: Strength) -> Array:
    def one(parts: tuple) -> Array:
        leaf, delta, layer = parts
        total = _sum(leaf, [] if delta is None else [(delta, strength)])
        return (total + (0 if layer is None else _product(layer, strength))).astype(leaf.dtype)

    parts = (leaf, delta, layer)
    # The float32 of a whole stack is 11 GB for one kernel of the 14B network.
    return jax.lax.map(one, parts) if layer is not None and jnp.ndim(layer["scale"]) else one(parts)


def _product(layer: dict, strength: Strength) -> Float[Array, "i o"]:
    return jnp.matmul(
        layer["a"].astype(jnp.float32), _scaled(layer, strength), precision=precision(jnp.float32)
    )


def _scaled(layer: dict, strength: Strength) -> Float[Array, "... r o"]:
    """strength·scale·b, in float32."""
    factor = jnp.asarray(strength, jnp.float32) * jnp.asarray(layer["scale"], jnp.float32)
    return factor[..., None, None] * jnp.asarray(layer["b"]).astype(jnp.float32)


def _sum(leaf: Array, terms: list[tuple[Array, Strength]]) -> Array:
    """leaf + Σ strength·delta, in float32."""
    total = jnp.asarray(leaf).astype(jnp.float32)
    for delta, strength in terms:
        total = total + jnp.asarray(strength, jnp.float32) * jnp.asarray(delta).astype(jnp.float32)
    return total


def _side_by_side(pairs: dict[str, list[tuple[Array, Array]]]) -> dict:
    """The collection "lora" of the pairs (a, b) of each module: a·b of the joined is the sum of theirs."""
    joined = {}
    for name, layers in pairs.items():
        a, b = (list(map(jnp.asarray, each)) for each in zip(*layers, strict=True))
        dtype = a[0].dtype if len({each.dtype for each in a}) == 1 else jnp.float32
        joined[f"{name}/a"] = jnp.concatenate([each.astype(dtype) for each in a], -1)
        joined[f"{name}/b"] = jnp.concatenate(b, -2)
    return unflatten_dict(joined, sep="/")


def _checked(leaves: dict[str, Array], adapters: Adapters) -> dict[str, dict]:
    """The adapted modules by name. Raises ValueError for the first thing that the network cannot take."""
    modules: dict[str, dict] = {}
    for path, array in flatten_dict(adapters.low_rank, sep="/").items():
        name, _, part = path.rpartition("/")
        modules.setdefault(name, {})[part] = array
    for name, layer in modules.items():
        _check_module(name, layer, leaves.get(f"{name}/kernel"))
    for name, delta in flatten_dict(adapters.delta, sep="/").items():
        if name not in leaves:
            raise ValueError(f"{name}: the network has no such parameter; it is another network's adapter")
        if jnp.shape(delta) != jnp.shape(leaves[name]):
            shapes = f"the difference is {jnp.shape(delta)}, the parameter {jnp.shape(leaves[name])}"
            raise ValueError(f"{name}: {shapes}; it is another network's adapter")
    return modules


def _check_module(name: str, layer: dict, kernel: Array | None) -> None:
    if kernel is None:
        raise ValueError(f"{name}: the network has no such layer; it is another network's adapter")
    if missing := {"a", "b", "scale"} - layer.keys():
        raise ValueError(f"{name}: the adapter lacks {', '.join(sorted(missing))}")
    a, b, scale = (jnp.shape(layer[part]) for part in ("a", "b", "scale"))
    stack, ends = jnp.shape(kernel)[:-2], jnp.shape(kernel)[-2:]
    # An adapter's rank is its own; everything else is the kernel's.
    if a[:-1] != (*stack, ends[0]) or b != (*stack, a[-1], ends[1]) or scale != stack:
        shapes = f"a is {a}, b {b} and scale {scale}, the kernel {jnp.shape(kernel)}"
        raise ValueError(f"{name}: {shapes}; it is another network's adapter")
