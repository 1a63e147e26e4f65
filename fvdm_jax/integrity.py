"""Digests of arrays where they lie, and of files: damage is known on any mesh, before it is trained on.

A digest of an array is two sums, modulo 2³², of its elements' bits, each mixed with its place in the whole
array by a bijection. So one changed element always shows, and others but for one in 2⁶⁴; and it does not
depend on how the array is cut among devices.
"""

import hashlib
import json
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

FILES, SMALL = "files.json", 2**20
"""What a checkpoint's folder holds, in a file of it, with the hashes of those of at most so many bytes."""


class Digest(NamedTuple):
    """What is known of an array: its shape and type, its sums, whether it is finite, and `strays`: the
    devices that have something else than most of those that should have the same part."""

    shape: tuple[int, ...]
    dtype: str
    sums: str
    finite: bool = True
    strays: tuple[int, ...] = ()


class Summed(NamedTuple):
    """The paths of arrays; the devices of all processes, by number; and what each sums of its parts,
    [device n 3]: both sums, and whether all is finite."""

    paths: list[str]
    devices: list[int]
    sums: np.ndarray


def digests(tree) -> dict[str, Digest]:
    """The Digest of every array of a tree, by its path in it; the arrays lie over a mesh."""
    found = summed(tree)
    each = zip(found.paths, jax.tree.leaves(tree), strict=True)
    return {path: _digest(leaf, found.devices, found.sums[:, i]) for i, (path, leaf) in enumerate(each)}


def summed(tree) -> Summed:
    """The sums of every array of a tree on every device; the arrays lie over a mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # All are begun before the first is waited for.
    begun = [_sums(leaf, leaf.sharding.mesh, leaf.sharding.spec) for _, leaf in leaves]
    devices = [shard.device for shard in begun[0].addressable_shards]
    held = [{shard.device: np.asarray(shard.data)[0] for shard in each.addressable_shards} for each in begun]
    sums = np.array([[each[device] for each in held] for device in devices], np.uint32)
    numbers = np.array([device.id for device in devices])
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        numbers, sums = multihost_utils.process_allgather((numbers, sums), tiled=True)
    return Summed([path_name(path) for path, _ in leaves], numbers.tolist(), sums)


def path_name(path) -> str:
    """A path in a tree, as names with slashes between them."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _digest(leaf: jax.Array, devices: list[int], sums: np.ndarray) -> Digest:
    """Of what each of the devices has of an array, [device 3]."""
    places = {device.id: str(at) for device, at in leaf.sharding.devices_indices_map(leaf.shape).items()}
    parts = defaultdict(list)
    for device, row in zip(devices, sums.tolist(), strict=True):
        parts[places[device]].append((device, tuple(row)))
    usual = {place: Counter(row for _, row in held).most_common(1)[0][0] for place, held in parts.items()}
    strays = [device for place, held in parts.items() for device, row in held if row != usual[place]]
    first, second, _ = (sum(column) % 2**32 for column in zip(*usual.values(), strict=True))
    finite = all(row[2] for row in usual.values())
    return Digest(leaf.shape, str(leaf.dtype), f"{first:08x}{second:08x}", finite, tuple(strays))


@partial(jax.jit, static_argnames=("mesh", "spec"))
def _sums(leaf: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """[device 3]: of each device's part, on it, both sums and whether it is finite.

    Without a word between devices: many such programs are under way at once.
    """
    # What waits in the host's memory is summed on the device.
    near = jax.device_put(leaf, jax.memory.Space.Device) if leaf.ndim else leaf
    each = partial(_part, spec=spec)
    return jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(mesh.axis_names))(near)


def _part(part: jax.Array, spec: PartitionSpec) -> jax.Array:
    floating = jnp.issubdtype(part.dtype, jnp.floating)
    finite = jnp.all(jnp.isfinite(part)) if floating else jnp.bool_(True)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[part.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(part, unsigned).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        if axis < len(spec) and spec[axis] is not None:
            along += jax.lax.axis_index(spec[axis]).astype(jnp.uint32) * jnp.uint32(size)
        place = (place + along) * jnp.uint32(0x9E3779B1)
    first = _mixed(words ^ _mixed(place))
    sums = jnp.sum(first), jnp.sum(_mixed(first ^ jnp.uint32(0x85EBCA77)) ^ place), finite.astype(jnp.uint32)
    return jnp.stack(sums)[None]


def _mixed(words: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit moves every other: the finaliser of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size of every file of a folder, and a hash of the small ones; large ones hold arrays, with digests."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != FILES and not path.name.startswith("."):
            bytes_ = path.stat().st_size
            small = hashlib.sha256(path.read_bytes()).hexdigest() if bytes_ <= SMALL else ""
            found[path.relative_to(folder).as_posix()] = bytes_, small
    return found


def changed(folder: Path) -> list[str]:
    """The files that are not as `files` had them; none where a run ended before it could tell."""
    if not (folder / FILES).is_file():
        return []
    try:
        told = {name: tuple(what) for name, what in json.loads((folder / FILES).read_text("utf-8")).items()}
    except (ValueError, AttributeError, TypeError):
        return [FILES]
    found = files(folder)
    return sorted(name for name in told.keys() | found.keys() if told.get(name) != found.get(name))
