"""Programs of the published size, compiled for TPUs that are not there; the figures are the compiler's."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from fvdm_jax import sharding
from fvdm_jax.models import streaming, vae

GIB = 2**30


def placed(tree, at):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree)


@pytest.mark.tpu_aot
def test_a_streamed_decode_at_720p_fits_eight_chips(tpu, capsys):
    """In bfloat16; five minutes of the CPU. float32 is six products for one there, and takes much longer."""
    config = dataclasses.replace(vae.SIZES["wan_2_1"], dtype="bfloat16")
    over = sharding.mesh(context=8, devices=tpu("v5e:2x4"))
    params = placed(nn.meta.unbox(vae.abstract(config)), sharding.replicated(over))
    latents = placed(jnp.zeros((1, 21, 90, 160, 16)), sharding.spatial(over))
    decode = jax.jit(lambda params, x: streaming.decode(config, params, x))
    sizes = decode.lower(params, latents).compile().memory_analysis()
    peak = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    with capsys.disabled():
        print(f"\n81 frames of 720x1280 on v5e:2x4: {peak / GIB:.2f} GiB a chip\n{sizes}")
    assert peak < 16e9, "a chip of a v5e has 16 GB"
