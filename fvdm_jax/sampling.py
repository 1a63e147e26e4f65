"""The sampler's program over a mesh of devices: where parameters, prompts and clips lie."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fvdm_jax import layouts, lora, sharding
from fvdm_jax.guidance import Generation
from fvdm_jax.models import dit
from fvdm_jax.program import Refusal


def mesh(text: str, network: lora.Network, clip: tuple[int, int, int], guided: bool) -> tuple[Mesh, str]:
    """All devices, as `text` says or as is best for a clip of (f, h, w), and how attention is computed.

    Raises Refusal where the text or the clip does not fit, or attention is not to be had as asked for.
    """
    devices = jax.device_count()
    text = text or layouts.recommended("sample", network.config, clip, devices, 1 + guided)
    try:
        over = sharding.mesh(**sharding.sizes(text, devices))
    except ValueError as wrong:
        raise Refusal("--mesh", str(wrong)) from wrong
    try:
        return over, network.attention(over, clip)
    except ValueError as wrong:
        raise Refusal("--mesh, --attention", str(wrong)) from wrong


def placed(over: Mesh, params: dict, config: dit.DiTConfig) -> dict:
    """`params`, as `lora.Network` takes them, on the mesh: every device holds a part of each large array."""
    network = dit.abstract(config)
    places = {"dit": sharding.shardings(over, network)}
    if "adapters" in params:
        whole = sharding.replicated(over)
        places["adapters"] = [
            (lora.shardings(over, network, adapters), whole) for adapters, _ in params["adapters"]
        ]
    return jax.device_put(params, places)


def lower(
    network: lora.Network,
    generation: Generation,
    over: Mesh,
    clip: tuple[int, int, int],
    steps: int,
    text: int,
) -> jax.stages.Lowered:
    """The whole program of a clip of (f, h, w) in latents, `steps` steps and prompts of `text` tokens.

    Nothing is allocated, and the devices of the mesh may be such as are only known by name.
    """
    c, whole = generation.network.config, sharding.replicated(over)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)

    params = {"dit": sharding.placed(over, dit.abstract(c), partial(dit.stored, c.dtype))}
    latents, states = array(1, *clip, c.channels_out), array(1, text, c.text_width)
    inputs = (params, (states, states), array(), latents, latents, array(steps + 1, clip[0]))
    with jax.set_mesh(over):
        return jax.jit(generation.sample, out_shardings=whole).lower(*inputs)
