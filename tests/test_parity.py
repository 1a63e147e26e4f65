"""Against the reference implementations in one process: how long the published sizes take on this CPU.

By hand: pytest -m parity tests/test_parity.py -s. XLA and torch take turns, two threads each.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from fvdm_jax.models import streaming, text, vae

pytestmark = pytest.mark.parity
TURNS = 3


def raced(ours: Callable, theirs: Callable, work: str, capsys) -> float:
    """Seconds of the CPU that ours takes for one of theirs, the least of TURNS each after one to warm up."""
    taken = {"ours": [], "theirs": []}
    for turn in range(1 + TURNS):
        for name, function in (("ours", ours), ("theirs", theirs)):
            began, cpu = time.perf_counter(), time.process_time()
            function()
            if turn:
                taken[name].append((time.process_time() - cpu, time.perf_counter() - began))
    (cpu, wall), (their_cpu, their_wall) = min(taken["ours"]), min(taken["theirs"])
    with capsys.disabled():
        for name, seconds in taken.items():
            print(f"\n{work}, {name}: {min(seconds)} s of the CPU and on the clock", end="")
        print(f"\n  ratio {cpu / their_cpu:.2f} and {wall / their_wall:.2f}", flush=True)
    return cpu / their_cpu


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_the_vae_is_as_fast_as_diffusers(method, capsys):
    """Three latent frames of 256x256 through Wan 2.1's VAE of full width, float32, streamed by both."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(2)
    config, frames, side = vae.SIZES["wan_2_1"], 3, 256
    params = jax.device_put(small.drawn(vae.abstract(config)))
    shape = (
        (1, frames, side // 8, side // 8, 16) if method == "decode" else (1, 4 * frames - 3, side, side, 3)
    )
    clip = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    stream = streaming.Stream(config, method, params, jnp.asarray(clip[:, :1]))
    network = AutoencoderKLWan().eval()
    theirs = torch.from_numpy(np.ascontiguousarray(np.moveaxis(clip, -1, 1)))

    def reference():
        with torch.no_grad():
            getattr(network, method)(theirs)

    ratio = raced(
        lambda: [np.asarray(piece) for piece in stream(clip)], reference, f"VAE 2.1 {method}", capsys
    )
    assert ratio < 1.25


def test_the_text_encoder_is_as_fast_as_transformers(capsys):
    """Four layers of umT5-XXL's width, 512 tokens, float32; its vocabulary, which costs nothing, in part."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    torch.set_num_threads(2)
    config = text.TextConfig(vocabulary=4096, layers=4, dtype="float32")
    tree = jax.eval_shape(lambda: text.abstract(config))
    params = jax.tree.map(jnp.asarray, small.drawn(tree))
    tokens = np.random.default_rng(0).integers(2, 4096, (1, 512)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    encode = jax.jit(lambda *x: text.TextEncoder(config).apply({"params": params}, *x))
    network = UMT5EncoderModel(
        UMT5Config(
            vocab_size=4096,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=4,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )
    network = network.eval()
    ids = torch.from_numpy(tokens.astype(np.int64))

    def reference():
        with torch.no_grad():
            network(input_ids=ids, attention_mask=torch.ones_like(ids))

    ratio = raced(lambda: np.asarray(encode(tokens, mask)), reference, "umT5-XXL, 4 layers", capsys)
    assert ratio < 1.25
