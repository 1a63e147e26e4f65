"""A model with random weights, smaller than the bundled one, how it samples, and small training runs."""

import socket
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from fvdm_jax import checkpoint
from fvdm_jax.models.dit import DiTConfig
from fvdm_jax.models.text import TextConfig
from fvdm_jax.models.vae import VAEConfig

SAMPLING = {
    "process": "flow",
    "prompt": "a red circle",
    "negative": "",
    "frames": 9,
    "size": [32, 48],
    "steps": 3,
    "solver": "unipc",
    "spacing": "wan",
    "shift": 3.0,
    "guidance": 2.0,
    "fps": 8,
}
NETWORKS = checkpoint.Networks(
    dit=DiTConfig(32, 64, 2, 2, 4, 4, text_width=16, dtype="float32"),
    vae=VAEConfig(8, 8, 4, (0.1,) * 4, (2.0,) * 4, (1, 1, 1), (True, True), 1, 2, True),
    text=TextConfig(259, 16, 2, 8, 32, 1, length=24, dtype="float32"),
)

TRAINING = """
from fvdm_jax import levels
from fvdm_jax.config import Training
from fvdm_jax.models.dit import DiTConfig
from fvdm_jax.optimisers import Optimiser


def config(rate=1e-3, **others):
    return Training(**{{
        "model": "nowhere", "dit": DiTConfig(8, 16, 2, 1, 4, 4, text_width=4, dtype="float32"),
        "clip": "2x2x2", "text": 3, "optimizer": Optimiser(rate=rate, warmup=2, clip=1.0),
        "curriculum": levels.constant(levels.ptss),
    }} | {settings!r} | others)
"""


def drawn(abstract) -> dict:
    """Parameters for a tree of shapes: normal, divided by the root of what goes into each output."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 1
        return (rng.normal(size=leaf.shape) * fan_in**-0.5).astype(np.float32)

    return jax.tree.map(draw, nn.meta.unbox(abstract))


def save(folder: Path) -> None:
    """Writes the model to a folder."""
    params = {name: drawn(checkpoint.KINDS[name][1](getattr(NETWORKS, name))) for name in NETWORKS.there}
    checkpoint.save(folder, NETWORKS, params, {"sampling": SAMPLING})


def training(folder: Path, **settings) -> Path:
    """A config in the folder, of a network whose steps take milliseconds."""
    path = folder / "config.py"
    path.write_text(TRAINING.format(settings=settings))
    return path


def train(config: Path, out: Path, *more: str) -> int:
    """The exit code of a training run on noise."""
    from fvdm_jax.train import main

    return main([str(config), "--out", str(out), "--synthetic", *more])


def far(ours, golden) -> float:
    """The root mean square of the difference, relative to that of `golden`."""
    return float(np.linalg.norm(np.float64(ours) - np.float64(golden)) / np.linalg.norm(np.float64(golden)))


def equations(jaxpr) -> Iterator:
    """All of a program, those of loops, branches and functions in it too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def address() -> str:
    """One of this host's that is free, for processes that are to find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
