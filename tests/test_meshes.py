"""The same training over every kind of mesh: how far it comes from one device's, as one table."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from test_training import PLAIN, SIZES, clips, stood

from fvdm_jax import trainer

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
KINDS = {
    "data": ["data=2", "data=4", "data=8"],
    "fsdp": ["fsdp=2", "fsdp=4", "fsdp=8"],
    "context": ["context=2", "context=4"],
    "tensor": ["tensor=2"],
    "two axes": ["data=2,fsdp=2", "data=2,fsdp=4", "data=4,context=2", "fsdp=4,tensor=2"],
    "three axes": ["data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2", "data=2,fsdp=2,context=2"],
}
APART = ["data=2,fsdp=4", "fsdp=2,context=2,tensor=2"]
"""Meshes over two processes of four devices."""
PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import test_meshes
for number, mesh in enumerate(test_meshes.APART):
    found = test_meshes.trained(mesh, jax.devices())
    if sys.argv[2] == "0":
        np.savez(f"{sys.argv[3]}/{number}.npz", *found)
"""


def trained(mesh: str, devices: list) -> list[np.ndarray]:
    """The losses of some steps, the parameters after them, and those before the first."""
    made = trainer.build(dataclasses.replace(PLAIN, mesh=mesh), SIZES, devices)
    frozen, state, losses = stood(made), made.start(), []
    began = whole(state.params)
    index, count = made.rows()
    for step in range(STEPS):
        latents, text, nothing = clips(PLAIN.batch, step)
        rows = slice(index * PLAIN.batch // count, (index + 1) * PLAIN.batch // count)
        state, told = made.step(state, frozen, made.batch(latents[rows], text[rows], nothing))
        losses.append(float(told["loss"]))
    return [np.array(losses), *whole(state.params), *began]


def whole(tree) -> list[np.ndarray]:
    """The arrays of a tree, also where they lie on two processes."""
    from jax.experimental import multihost_utils

    return jax.tree.leaves(multihost_utils.process_allgather(tree, tiled=True))


def apart(folder: Path) -> list[list[np.ndarray]]:
    """What two processes have made over each mesh."""
    address = small.address()
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", PROCESS, address]
    processes = [
        subprocess.Popen([*command, str(i), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    found = []
    for number in range(len(APART)):
        with np.load(folder / f"{number}.npz") as arrays:
            found.append([arrays[f"arr_{i}"] for i in range(len(arrays.files))])
    return found


def row(one: list[np.ndarray], other: list[np.ndarray]) -> tuple[float, float, float]:
    """Of the first loss and of all the largest difference, relative; of a parameter at the end, absolute.

    Those that training begins with are the same to the bit.
    """
    half = (len(one) - 1) // 2
    pairs = list(zip(one[1:], other[1:], strict=True))
    assert all(np.array_equal(a, b) for a, b in pairs[half:])
    losses = np.abs(other[0] / one[0] - 1)
    return losses[0], losses.max(), max(float(np.abs(a - b).max()) for a, b in pairs[:half])


@pytest.mark.slow
@pytest.mark.fault("T10")
def test_no_mesh_comes_far_from_one_device(tmp_path, capsys):
    """After twenty steps in float32; sums in another order make up the differences."""
    one, rows = trained("", jax.devices()[:1]), []

    def told(what: str, other: list[np.ndarray]) -> None:
        rows.append(row(one, other))
        with capsys.disabled():
            print(f"\n{what:44}" + "".join(f"{each:12.1e}" for each in rows[-1]), end="", flush=True)

    with capsys.disabled():
        print(f"\n{'mesh':44}{'first loss':>12}{'losses':>12}{'parameters':>12}", end="")
    for kind, meshes in KINDS.items():
        for mesh in meshes:
            sizes = [int(size.split("=")[1]) for size in mesh.split(",")]
            told(f"{kind}: {mesh}", trained(mesh, jax.devices()[: np.prod(sizes)]))
    for mesh, found in zip(APART, apart(tmp_path), strict=True):
        told(f"two processes: {mesh}", found)
    largest = np.array(rows).max(0)
    assert (largest < (1e-6, 1e-5, 2e-5)).all(), largest
