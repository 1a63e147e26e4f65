"""At which steps of a sampler the network is called, and at which what it last said is used again.

A step may be spared while the network's own embedding of time has changed little since it was last asked.
Frames are at levels of their own, so each has a change of its own; but the network is asked of all at once.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fvdm_jax.lora import Network, variables
from fvdm_jax.models.dit import FREQUENCIES, MLP
from fvdm_jax.models.layers import Dense, sinusoid
from fvdm_jax.process import Process
from fvdm_jax.shapes import Levels, Schedule
from fvdm_jax.zoo import Matrix

SETTLING = 0.3
"""How much of its path a frame takes by calls alone: the first steps decide what there is to see.

The bundled model's latents, of 20 steps for 3 prompts, are with 12 calls off by 0.06 (relative L2) from those
of 100 steps, where 12 steps without it are off by 0.17, and 20 by 0.08. Of an earlier one, 13 calls without
this were off by 0.18 from 20 steps, where 12 calls with it were by 0.06.
"""


def plan(
    rows: Matrix, change: Float[np.ndarray, "s f"], threshold: float, settling: float = SETTLING
) -> Bool[np.ndarray, "s"]:
    """At which steps of a schedule, rows [s + 1 f], the network is called.

    `change`, as of `changes`, adds up for every frame from the last call on. A call is made as soon as a
    frame that moves has come to the `threshold`, 0 for a call at every step; and whatever the threshold at
    the first step of a frame, since what was said while it waited is not of it, at those that begin within
    the first part `settling` of its steps, and where it becomes clean. With several transformers, each has a
    plan, of its own rows.

    Source: TeaCache (arXiv 2411.19108), which has one level for all frames, and passes the changes through a
    polynomial that was fitted to each published model: thresholds are not the same numbers here. `settling`
    is MagCache's retention ratio (arXiv 2506.09045), there 0.2.
    """
    moving = rows[1:] < rows[:-1]
    taken = np.cumsum(moving, axis=0) - moving
    first = (taken == 0) | (taken < settling * moving.sum(0))
    due = np.any(moving & (first | (rows[1:] == 0)), axis=1)
    calls, gone = np.zeros(len(moving), bool), np.zeros(rows.shape[1])
    for s in range(len(moving)):
        calls[s] = s == 0 or due[s] or np.any(moving[s] & (gone >= threshold))
        gone = change[s] + (0 if calls[s] else gone)
    return calls


def changes(network: Network, process: Process, params: dict, rows: Schedule) -> Float[Array, "s f"]:
    """By how much the network's projection of time changes from row to row, in every frame.

    That is |p' − p| / |p|, each summed over the 6·d numbers that modulate a frame; `params` are as `Network`
    takes them, `rows` [s + 1 f].
    """
    c, known = network.config, variables(params["dit"], params.get("adapters", []))

    def of(name: str) -> dict:
        return {kind: tree[name] for kind, tree in known.items() if name in tree}

    def projected(level: Levels) -> Float[Array, "b f d"]:
        # As in `DiT`, which has no method for it.
        wave = sinusoid(process.timestep(level), FREQUENCIES)
        time = MLP(c.width, "silu", "float32").apply(of("time_embedding"), wave)
        return Dense(6 * c.width, ("embed", "mlp"), "float32").apply(of("time_projection"), nn.silu(time))

    def next_row(before: Array, level: Levels) -> tuple[Array, Array]:
        now = projected(level)
        return now, jnp.abs(now - before).sum(-1) / jnp.abs(before).sum(-1)

    return jax.lax.scan(next_row, projected(rows[:1]), rows[1:, None])[1][:, 0]
