"""Which axis of an array lies along which axis of the mesh of devices: one table."""

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")

TABLE = (
    ("vocabulary", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("conv_out", "tensor"),
    ("embed", "fsdp"),
    ("embed_in", "fsdp"),
    ("conv_in", "fsdp"),
    ("rank", "fsdp"),
)
"""Logical axis of a parameter → axis of the mesh; what is not named is whole on every device."""


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


def shardings(over: Mesh, abstract):
    """The sharding of every parameter of a tree of `abstract`; an axis that does not divide stays whole."""
    specs = nn.logical_to_mesh(nn.get_partition_spec(abstract), TABLE)

    def fitting(leaf, spec: PartitionSpec) -> NamedSharding:
        fits = (
            axis if axis is not None and size % over.shape[axis] == 0 else None
            for size, axis in zip(leaf.shape, spec, strict=False)
        )
        return NamedSharding(over, PartitionSpec(*fits))

    return jax.tree.map(fitting, nn.meta.unbox(abstract), specs)


TOKENS = PartitionSpec(("data", "fsdp"), None, "context")
"""Of what passes between layers, [b f n d]: clips over data and fsdp, the tokens of a frame over context."""

CLIPS = PartitionSpec(("data", "fsdp"))
"""Of a batch: clips over data and fsdp."""


def constrained(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """x laid out as `spec` says on the mesh that is set; x itself where none is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def spatial(over: Mesh) -> NamedSharding:
    """For clips [b f h w c], latents or pixels: frames split along their width over "context"."""
    return NamedSharding(over, PartitionSpec("data", None, None, "context"))


def replicated(over: Mesh) -> NamedSharding:
    """For arrays that every device holds whole."""
    return NamedSharding(over, PartitionSpec())


def across(width: int, least: int = 8) -> Mesh:
    """As many devices as divide frames of this width, in latent pixels, into parts of `least` or more."""
    counts = [n for n in range(1, len(jax.devices()) + 1) if width % n == 0 and width // n >= least]
    return mesh(context=max(counts, default=1))
