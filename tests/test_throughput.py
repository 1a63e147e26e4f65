"""The training step against torch's of the same network: diffusers' WanTransformer3DModel and AdamW.

By hand: pytest -m "parity and slow" tests/test_throughput.py -s. The sides take turns in a process of their
own, which has one device, as a run on this machine has; two threads each.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from einops import rearrange, repeat

from convert import convert, names, wan
from fvdm_jax import levels, trainer, training
from fvdm_jax.config import Training
from fvdm_jax.models import dit
from fvdm_jax.optimisers import Optimiser

ROOT = Path(__file__).resolve().parents[1]
SIZES = dit.DiTConfig(1536, 8960, 12, 4, dtype="float32")
CLIP = 5, 30, 52
OPTIMISER = Optimiser(rate=1e-5, decay=0.01, decay_all=True)
SETTINGS = Training(
    dit=SIZES,
    fresh=True,
    curriculum=levels.constant(levels.per_frame),
    dropout=0.0,
    batch=1,
    optimizer=OPTIMISER,
    remat="none",
)
TURNS = 5


def reference(sizes: dit.DiTConfig):
    """diffusers' transformer of these sizes, its weights drawn as torch does."""
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.width // sizes.heads,
        in_channels=sizes.channels_in,
        out_channels=sizes.channels_out,
        text_dim=sizes.text_width,
        ffn_dim=sizes.ffn,
        num_layers=sizes.layers,
    )


def ours(sizes: dit.DiTConfig, params: dict, batches: list) -> Iterator[float]:
    """The losses of step after step."""
    made = trainer.build(SETTINGS, sizes, jax.devices()[:1])
    state = made.start(params)
    for latents, text, _, _ in batches:
        state, told = made.step(state, {}, made.batch(latents, text, np.zeros_like(text[0])))
        jax.block_until_ready(state.params)
        yield float(told["loss"])


def theirs(network, optimizer, batches: list, each: bool) -> Iterator[float]:
    """The losses of step after step: with a timestep for every frame, which diffusers takes for every token,
    or with the first frame's for all, which is another function and less to compute."""
    import torch

    for latents, text, noise, level in batches:
        clean, noise = (torch.from_numpy(rearrange(x, "b f h w c -> b c f h w").copy()) for x in (latents, noise))
        l = torch.from_numpy(level if each else np.broadcast_to(level[:, :1], level.shape).copy())
        tokens = latents.shape[2] // dit.PATCH * (latents.shape[3] // dit.PATCH)
        timestep = 1000 * (l.repeat_interleave(tokens, 1) if each else l[:, 0])
        l = l[:, None, :, None, None]
        said = network((1 - l) * clean + l * noise, timestep, torch.from_numpy(text)).sample
        loss = torch.nn.functional.mse_loss(said, noise - clean)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def drawn(sizes: dit.DiTConfig, clip: tuple[int, int, int], text: int, steps: int) -> list[tuple]:
    """(latents, text, noise, level) of each step, noise and levels being those that our step draws."""
    made, rng = trainer.build(SETTINGS, sizes, jax.devices()[:1]), np.random.default_rng(0)
    key = jax.random.split(jax.random.key(SETTINGS.seed))[1]
    found = []
    for step in range(steps):
        latents = rng.standard_normal((1, *clip, sizes.channels_in), np.float32)
        states = rng.standard_normal((1, text, sizes.text_width), np.float32)
        batch = training.Batch(latents, states, np.zeros_like(states[0]))
        noised = training.noised(made.recipe.objective, batch, np.int32(step), jax.random.fold_in(key, step))
        found.append((latents, states, np.asarray(noised.noise), np.asarray(noised.level)))
    return found


def race() -> dict[str, dict[str, list[float]]]:
    """Losses, seconds on the clock and of the CPU of each side's steps, the first of which warms up."""
    import torch

    torch.set_num_threads(2)
    network = reference(SIZES)
    params = convert(wan.dit(), {names.official(k): v.detach().numpy() for k, v in network.state_dict().items()})
    adamw = torch.optim.AdamW(network.parameters(), lr=OPTIMISER.rate, weight_decay=OPTIMISER.decay)
    batches = drawn(SIZES, CLIP, 512, 1 + TURNS)
    sides = {"ours": ours(SIZES, params, batches), "theirs": theirs(network, adamw, batches, True)}
    if os.environ.get("ONE"):
        sides["one"] = theirs(network, adamw, batches, False)
    taken = {name: {"loss": [], "clock": [], "cpu": []} for name in sides}
    for turn in range(1 + TURNS):
        for name, side in sides.items():
            began, cpu = time.perf_counter(), time.process_time()
            found = next(side), time.perf_counter() - began, time.process_time() - cpu
            for kind, value in zip(taken[name], found, strict=True):
                taken[name][kind].append(value)
            print(turn, name, found, os.getloadavg(), file=sys.stderr, flush=True)
    return taken
