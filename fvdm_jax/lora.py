"""Adapters: what was learned beside a network's parameters, run beside them or merged into them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from fvdm_jax.models.layers import precision

Strength = float | Float[Array, ""]


class Adapters(NamedTuple):
    """Changes to a network's parameters, in trees that mirror them where there is something to change.

    `low_rank` has at a Dense layer {"a": [in r], "b": [r out], "scale": [], "rank": []}, or in a stack
    [layers …] of each; it adds scale·a·b to the kernel. In a stack r is the largest rank, the others are
    padded with zeros, and a layer of rank 0 is not adapted. `delta` has at a parameter what is added to it.
    """

    low_rank: dict
    delta: dict


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
