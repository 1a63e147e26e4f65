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

from fvdm_jax.models import streaming, vae

ROOT = Path(__file__).resolve().parents[1]
WAN = vae.SIZES["wan_2_1"]


def stream(method: str, frames: int, size: tuple[int, int]) -> list[tuple[float, float]]:
    """(peak resident GiB, seconds) after each latent frame of a clip through the 2.1 VAE of full width."""
    import resource

    params = jax.device_put(small.drawn(vae.abstract(WAN)))
    rng, (height, width) = np.random.default_rng(0), (side // WAN.spatial for side in size)
    if method == "decode":
        clip = rng.normal(size=(1, frames, height, width, WAN.latent)).astype(np.float32)
    else:
        clip = rng.uniform(-1, 1, (1, 4 * frames - 3, *size, 3)).astype(np.float32)
    run = streaming.Stream(WAN, method, params, jnp.asarray(clip[:, :1]))
    began, found = time.perf_counter(), []
    for piece in run(clip):
        np.asarray(piece)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found.append((round(peak, 2), round(time.perf_counter() - began, 1)))
        print(f"{method} {len(found)}/{frames} {found[-1]}", file=sys.stderr, flush=True)
    return found


def measured(method: str, frames: int, size: tuple[int, int]) -> list[tuple[float, float]]:
    """`stream` in a process of its own, whose peak is nobody else's."""
    code = "import json, sys; sys.path[:0] = ['tests', '.']; import test_full_size as t\n"
    code += f"print(json.dumps(t.stream({method!r}, {frames}, {size})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("method", ["decode", "encode"])
def test_memory_is_flat_at_480p(method):
    """An hour on two cores for decoding, half of that for encoding."""
    found = measured(method, 21, (480, 832))
    peaks = [peak for peak, _ in found]
    # What it is after five latent frames is what a clip of five takes.
    assert peaks[-1] < 10 and peaks[4] >= 0.85 * peaks[-1], found
