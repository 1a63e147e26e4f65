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
