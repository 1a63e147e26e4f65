"""The sampler's programs over a mesh of devices: where parameters, prompts and clips lie."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fvdm_jax import layouts, lora, sharding
from fvdm_jax.guidance import Generation
from fvdm_jax.models import dit
from fvdm_jax.program import Refusal


class Layout(NamedTuple):
    """Where work is done: on which mesh, `attention` in words, and how many `clips` at a time.

    Several clips lie along "data", one by one, each with its rows of guidance; of a single one the rows do.
    """

    over: Mesh
    attention: str
    clips: int = 1

    @property
    def batch(self) -> NamedSharding:
        """For arrays [b …] of so many clips: whole on every device where it is one."""
        return NamedSharding(self.over, PartitionSpec("data" if self.clips > 1 else None))


def layout(
    text: str, network: lora.Network, clip: tuple[int, int, int], rows: int, many: bool = False
) -> Layout:
    """All devices, as `text` says or as is best for the `rows` of a clip of (f, h, w).

    With `many`, a text has as many clips made at a time as it has devices along "data". Raises Refusal where
    the text or the clip does not fit, or attention is not to be had as asked for.
    """
    devices = jax.device_count()
    try:
        sizes = sharding.sizes(
            text or layouts.recommended("sample", network.config, clip, devices, rows), devices
        )
        clips = sizes["data"] if text and many else 1
        # What no layout can share, every device does for itself; but nobody is to ask for that.
        if text and (wrong := layouts.problem(sizes, layouts.work(network.config, clip, clips * rows))):
            raise ValueError(wrong)
        over = sharding.mesh(**sizes)
    except ValueError as wrong:
        raise Refusal("--mesh", str(wrong)) from wrong
    try:
        return Layout(over, network.attention(over, clip), clips)
    except ValueError as wrong:
        raise Refusal("--mesh, --attention", str(wrong)) from wrong


def placed(over: Mesh, params: dict, config: dit.DiTConfig) -> dict:
    """`params`, as `lora.Network` takes them, on the mesh, in the types that are computed with.

    Every device holds a part of each large array, and gets no more.
    """
    network, whole = dit.abstract(config), sharding.replicated(over)
    wanted = sharding.placed(over, network, partial(dit.stored, config.dtype))

    def place(leaf, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(np.asarray(leaf).astype(like.dtype), like.sharding)

    adapters = [
        jax.device_put(pair, (lora.shardings(over, network, pair[0]), whole))
        for pair in params.get("adapters", [])
    ]
    return {"dit": jax.tree.map(place, params["dit"], wanted), "adapters": adapters}


class Programs(NamedTuple):
    """What samples a clip, jitted: methods of a Generation, of which `advance` is called at every step.

    What `begin`, `advance` and `cached` give lies where it was, so that one program serves all steps.
    """

    told: Callable
    begin: Callable
    advance: Callable
    cached: Callable
    changes: Callable


def programs(generation: Generation, over: Mesh, batch: NamedSharding | None = None) -> Programs:
    """Those of a generation over a mesh, which must be set when they are called.

    Clips lie as `batch` says, or else whole on every device.
    """
    whole = sharding.replicated(over)
    batch = batch or whole
    options = dit.options(generation.network.config, over.devices.flat[0].platform)
    return Programs(
        jax.jit(generation.told, compiler_options=options),
        jax.jit(generation.begin, out_shardings=batch),
        jax.jit(generation.advance, out_shardings=batch, compiler_options=options),
        jax.jit(generation.cached, out_shardings=batch, compiler_options=options),
        jax.jit(generation.changes, out_shardings=whole, compiler_options=options),
    )


def lower(
    generation: Generation, over: Mesh, clip: tuple[int, int, int], text: int
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """`told` for prompts of `text` tokens and one step of `advance` for a clip of (f, h, w) in latents.

    Nothing is allocated, and the devices of the mesh may be such as are only known by name.
    """
    c, whole = generation.network.config, sharding.replicated(over)

    def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def keys(leaf) -> jax.ShapeDtypeStruct:
        place = jax.NamedSharding(over, sharding.fitting(sharding.KEYS, leaf.shape, over))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    params = {"dit": sharding.placed(over, dit.abstract(c), partial(dit.stored, c.dtype))}
    latents, states, rows = array(1, *clip, c.channels_out), array(1, text, c.text_width), array(2, clip[0])
    with jax.set_mesh(over):
        made = programs(generation, over)
        told = made.told.lower(params, (states, states))
        prompt = jax.tree.map(keys, told.out_info)
        carry = jax.eval_shape(generation.begin, latents, latents, rows)
        carry = jax.tree.map(lambda leaf: array(*leaf.shape, dtype=leaf.dtype), carry)
        return told, made.advance.lower(params, prompt, array(), carry, rows)
