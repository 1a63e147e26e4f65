"""Which axis of an array lies along which axis of the mesh of devices: one table."""

from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Names = tuple[str | None, ...]

AXES = ("data", "fsdp", "context", "tensor")

TENSOR = ("vocabulary", "heads", "mlp", "conv_out")
"""Logical axes of parameters, and of what is computed with them, that lie along "tensor"."""

ROWS = ("fsdp", "context")
"""Axes of the mesh over which the rows of matrices are kept in parts, to be gathered when they are used."""


def mesh(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """The first devices, or those given, as a mesh with these sizes along AXES."""
    sizes = data, fsdp, context, tensor
    devices = jax.devices() if devices is None else devices
    count = int(np.prod(sizes))
    if len(devices) < count:
        asked = dict(zip(AXES, sizes, strict=True))
        raise ValueError(f"a mesh of {asked} has {count} devices, and there are {len(devices)}")
    return Mesh(np.asarray(devices[:count]).reshape(sizes), AXES)


def sizes(text: str, devices: int) -> dict[str, int]:
    """The size along each of AXES for a text such as "fsdp=4,context=2"; "data" takes what is left.

    Raises ValueError, which says what would be right, where the text or the number of devices does not fit.
    """
    found = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or name in found or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"{part!r} is no axis and size; give some of {', '.join(AXES)}, as fsdp=8")
        found[name] = int(size)
    named = int(np.prod(list(found.values()), dtype=int))
    if devices % named or "data" in found and named != devices:
        raise ValueError(f"{text!r} is for {named} devices, and there are {devices}")
    return {name: found.get(name, devices // named if name == "data" else 1) for name in AXES}


def axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the mesh that an entry of a PartitionSpec names."""
    return (entry,) if isinstance(entry, str) else entry or ()


def fitting(spec: PartitionSpec, shape: tuple[int, ...], over: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` without the axes of the mesh that do not divide what they would cut, or cut something before."""
    taken = set()

    def fit(size: int, entry: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        cut, count = [], 1
        for axis in axes(entry):
            if axis not in taken and size % (count * over.shape[axis]) == 0:
                cut.append(axis)
                taken.add(axis)
                count *= over.shape[axis]
        return tuple(cut) or None

    return PartitionSpec(*(fit(size, entry) for size, entry in zip(shape, spec, strict=False)))


def used(names: Names) -> PartitionSpec:
    """Where a parameter with these logical axes lies while a layer computes with it."""
    return PartitionSpec(*("tensor" if name in TENSOR else None for name in names))


def kept(names: Names) -> PartitionSpec:
    """Where a parameter with these logical axes is kept: a matrix, or a stack of them, also cut along ROWS.

    Vectors are whole: together they are a thousandth of a network.
    """
    if len(names) < 2 or names[-2] in (None, "layers"):
        return used(names)
    *stack, rows, columns = used(names)
    return PartitionSpec(*stack, (*((rows,) if rows else ()), *ROWS), columns)


def shardings(over: Mesh, abstract):
    """The sharding of every parameter of a tree of `abstract`; an axis that does not divide stays whole."""

    def place(leaf) -> NamedSharding:
        named = isinstance(leaf, nn.LogicallyPartitioned)
        spec, leaf = (kept(leaf.names), leaf.value) if named else (PartitionSpec(), leaf)
        return NamedSharding(over, fitting(spec, leaf.shape, over))

    return jax.tree.map(place, abstract, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def placed(over: Mesh, abstract: dict, kind: Callable[[str, jax.ShapeDtypeStruct], object]) -> dict:
    """Shapes with shardings for a tree of `abstract`, of the type that `kind(path, leaf)` says."""
    if not abstract:
        return {}
    places = flatten_dict(shardings(over, abstract), sep="/")
    leaves = flatten_dict(nn.meta.unbox(abstract), sep="/")
    return unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, kind(path, leaf), sharding=places[path])
            for path, leaf in leaves.items()
        },
        sep="/",
    )


TOKENS = PartitionSpec(("data", "fsdp"), None, "context")
"""Of what passes between layers, [b f n d]: clips over data and fsdp, the tokens of a frame over context."""

CLIPS = PartitionSpec(("data", "fsdp"))
"""Of a batch: clips over data and fsdp."""


def activations(axes: int) -> PartitionSpec:
    """Of what a layer takes, but for the last of so many axes: TOKENS of [b f n d], and CLIPS of all else."""
    spec = TOKENS if axes == 4 else CLIPS
    return PartitionSpec(*spec, *(None,) * (axes - 1 - len(spec)))


KEYS = PartitionSpec(None, ("data", "fsdp"), None, "tensor")
"""Of the keys of a prompt in all layers, [layers b m a k]: clips over data and fsdp, heads over tensor."""


def constrained(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """x laid out as `spec` says on the mesh that is set, as far as it divides; x itself where none is."""
    over = jax.sharding.get_abstract_mesh()
    return x if over.empty else jax.lax.with_sharding_constraint(x, fitting(spec, x.shape, over))


def spatial(over: Mesh) -> NamedSharding:
    """For clips [b f h w c], latents or pixels: frames split along their width over "context"."""
    return NamedSharding(over, PartitionSpec("data", None, None, "context"))


def replicated(over: Mesh) -> NamedSharding:
    """For arrays that every device holds whole."""
    return NamedSharding(over, PartitionSpec())


def parts(width: int, most: int, least: int = 8) -> int:
    """Into how many parts of `least` or more, and `most` of them, a width of latent pixels divides."""
    return max((n for n in range(1, most + 1) if width % n == 0 and width // n >= least), default=1)


def across(width: int) -> Mesh:
    """As many devices as divide frames of this width, in latent pixels."""
    return mesh(context=parts(width, len(jax.devices())))
