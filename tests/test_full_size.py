"""The networks around the transformer at their published sizes, with random weights: memory and time."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from fvdm_jax.models import streaming, text, vae

ROOT = Path(__file__).resolve().parents[1]
WAN = vae.SIZES["wan_2_1"]

MEASURE = """
import json, resource, sys, time
sys.path[:0] = ["tests", "."]
import test_full_size
began = time.perf_counter()
seconds = test_full_size.run(sys.argv[1], int(sys.argv[2]), (int(sys.argv[3]), int(sys.argv[4])))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"GiB": peak, "seconds": seconds}))
"""


def run(method: str, frames: int, size: tuple[int, int]) -> float:
    """Streams a clip of so many latent frames through the 2.1 VAE of full width, frames dropped as they come."""
    params = jax.device_put(small.drawn(vae.abstract(WAN)))
    rng = np.random.default_rng(0)
    height, width = (side // WAN.spatial for side in size)
    if method == "decode":
        latents = rng.normal(size=(1, frames, height, width, WAN.latent)).astype(np.float32)
        decoder = streaming.Decoder(WAN, params, jnp.asarray(latents[:, :1]))
        began = time.perf_counter()
        for index, piece in enumerate(decoder(jnp.asarray(latents))):
            np.asarray(piece)
            print(f"{method} {index + 1}/{frames} {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    else:
        clip = rng.uniform(-1, 1, (1, 4 * frames - 3, *size, 3)).astype(np.float32)
        encode = jax.jit(lambda p, x: streaming.encode(WAN, p, x)).lower(params, clip).compile()
        began = time.perf_counter()
        np.asarray(encode(params, clip))
    return time.perf_counter() - began


def measured(method: str, frames: int, size: tuple[int, int]) -> dict:
    """Peak resident GiB and seconds of `run` in a process of its own."""
    command = [sys.executable, "-c", MEASURE, method, str(frames), *map(str, size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["decode", "encode"])
def test_memory_is_flat_at_480p(method, capsys):
    short, long = (measured(method, frames, (480, 832)) for frames in (5, 21))
    with capsys.disabled():
        print(f"\n{method} at 480x832: 5 latent frames {short}, 21 {long}")
    assert long["GiB"] < 10 and short["GiB"] >= 0.85 * long["GiB"]
