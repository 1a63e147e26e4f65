"""The real layout of Wan2.1-T2V-1.3B, with random weights: memory, speed, and every bit of the way back."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import wan, write
from convert.table import plan, unplan
from convert.tensors import DTYPES, Planned, Tensor, known
from fvdm_jax.models import dit

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = 5_676_070_424
"""Bytes of the published diffusion_pytorch_model.safetensors."""

MARGIN = 350 << 20
"""Bytes that a conversion, here or back, takes above a dry run of it, whatever the size of the file."""


def layout(config: dit.DiTConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint as published, of random weights that depend on nothing but their place."""
    import flax.linen as nn
    from flax.traverse_util import flatten_dict

    arrays = {}
    for path, leaf in flatten_dict(nn.meta.unbox(dit.abstract(config)), sep="/").items():
        layers = leaf.shape[0] if path.startswith("blocks/") else None
        arrays[path] = Planned(path, np.dtype(np.float32), leaf.shape, layers, lambda i: None)
    tensors = unplan(wan.dit(bool(config.image_width)), arrays, p=2, q=2)

    def drawn(n: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng(n).standard_normal(shape, np.float32) * np.float32(0.02)

    return {
        key: tensor._replace(read=lambda n=n, shape=tensor.shape: drawn(n, shape))
        for n, (key, tensor) in enumerate(tensors.items())
    }


MEASURE = """
import re, resource, sys
from convert.__main__ import main
from fvdm_jax.program import run

assert run(main) == 0
used = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss, which counts what the parent had when it made this process.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(used.ru_utime + used.ru_stime, peak)
"""


def measured(*arguments: str) -> tuple[float, float, int]:
    """Wall and CPU seconds and peak resident bytes of `python -m convert` in a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, "-c", MEASURE, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    cpu, peak = done.stdout.splitlines()[-1].split()
    return time.perf_counter() - began, float(cpu), int(peak)


def copied(source: Path, target: Path) -> float:
    """Seconds of a sequential copy that is on the disk when it ends."""
    began = time.perf_counter()
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as written:
        while piece := read.read(16 << 20):
            written.write(piece)
        os.fsync(written.fileno())
    return time.perf_counter() - began


def same(a: Path, b: Path) -> bool:
    with open(a, "rb") as first, open(b, "rb") as second:
        while piece := first.read(16 << 20):
            if piece != second.read(len(piece)):
                return False
        return not second.read(1)


SMALL = dit.DiTConfig(256, 1024, 2, 12)
LARGE = [dataclasses.replace(dit.SIZES["wan_1_3b"], layers=10), dit.SIZES["wan_1_3b"]]


SIZES = st.builds(
    lambda heads, head, ffn, layers, text, image: dit.DiTConfig(
        2 * head * heads, ffn, heads, layers, 36 if image else 16, text_width=text, image_width=image
    ),
    st.integers(1, 3), st.integers(3, 8), st.integers(1, 9), st.integers(1, 12), st.integers(1, 9),
    st.sampled_from([0, 5]),
)  # fmt: skip


@pytest.mark.thorough
@given(SIZES, st.sampled_from(["F32", "F16", "BF16", "F8_E4M3"]), st.integers(0, 2**32))
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_whatever_the_sizes_and_types_what_comes_in_goes_out_bit_for_bit(config, dtype, seed):
    """Of any bits, NaN's too."""
    rng, tensors = np.random.default_rng(seed), {}
    for key, tensor in layout(config).items():
        bits = rng.bytes(math.prod(tensor.shape) * np.dtype(DTYPES[dtype]).itemsize)
        tensors[key] = known(np.frombuffer(bits, DTYPES[dtype]).reshape(tensor.shape))
    rules = wan.dit(bool(config.image_width))
    arrays = {array.path: array for array in plan(rules, tensors, p=2, q=2)}
    again = unplan(rules, arrays, p=2, q=2)
    assert again.keys() == tensors.keys()
    for key, tensor in again.items():
        assert (tensor.dtype, tensor.shape) == (tensors[key].dtype, tensors[key].shape)
        assert tensor.read().tobytes() == tensors[key].read().tobytes(), key


@pytest.mark.parametrize(
    "config", [SMALL, *(pytest.param(each, marks=pytest.mark.slow) for each in LARGE)],
    ids=["small", "ten_layers", "wan_1_3b"],
)  # fmt: skip
def test_a_checkpoint_comes_in_and_goes_out_bit_for_bit_in_bounded_memory(tmp_path, config):
    source, model, back = (
        tmp_path / name for name in ("diffusion_pytorch_model.safetensors", "model", "back")
    )
    tensors = layout(config)
    write.safetensors(source, tensors, lambda count: None)
    size = source.stat().st_size
    told = {"num_heads": config.heads, "num_layers": config.layers}
    (tmp_path / "config.json").write_text(json.dumps(told))
    copy = copied(source, tmp_path / "copy")
    (tmp_path / "copy").unlink()

    _, _, base = measured(str(source), str(model), "--dry-run")
    wall, cpu, peak = measured(str(source), str(model))
    speed = copy / wall
    print(
        f"\n{size / 1e9:.2f} GB: copied in {copy:.1f} s; converted in {wall:.1f} s ({cpu:.1f} s CPU), "
        f"{size / wall / 1e9:.2f} GB/s, {speed:.2f} of the copy's speed; "
        f"peak {peak / 2**20:.0f} MiB, {(peak - base) / 2**20:.0f} above a dry run's {base / 2**20:.0f}; "
        f"at most {MARGIN / 2**20:.0f}"
    )
    assert peak < base + MARGIN
    wall, cpu, peak = measured(str(model), str(back), "--to", "official")
    print(f"exported in {wall:.1f} s ({cpu:.1f} s CPU), peak {peak / 2**20:.0f} MiB")
    assert peak < base + MARGIN
    assert same(source, back / source.name)
    if config is dit.SIZES["wan_1_3b"]:
        # The start of Python and jax counts too.
        assert size == PUBLISHED and speed >= 0.5
