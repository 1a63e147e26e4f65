"""What a noise level means: how data and noise mix, what a network is trained to say, and how it is read."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fvdm_jax.shapes import Latents, Levels


class Prediction(NamedTuple):
    """What is believed of the clip behind noisy latents: its clean part and its noise, [b f h w c] each."""

    clean: Latents
    noise: Latents


class Process(NamedTuple):
    """Five functions of the noise level l of each frame; noisy latents are α(l)·clean + σ(l)·noise.

    `alpha` and `sigma` take levels of any shape. `target(clean, noise, level)` is what the network learns,
    `read(x, output, level)` turns what it said into a Prediction without dividing by σ, and `timestep(level)`
    is the number it is fed: the only place where 0 … 1000 occurs.
    """

    alpha: Callable[[Levels], Levels]
    sigma: Callable[[Levels], Levels]
    target: Callable[[Latents, Latents, Levels], Latents]
    read: Callable[[Latents, Latents, Levels], Prediction]
    timestep: Callable[[Levels], Levels]


def expand(level: Levels, x: Latents) -> Latents:
    """A number per frame [b f] as [b f 1 1 1], or with as many further dimensions as x has."""
    return jnp.expand_dims(level, tuple(range(level.ndim, x.ndim)))


def mix(process: Process, clean: Latents, noise: Latents, level: Levels) -> Latents:
    """Latents [b f h w c] at the given levels [b f]; a frame at level 0 is `clean` bit for bit."""
    alpha, sigma = (expand(part(level), clean) for part in (process.alpha, process.sigma))
    # Without the choice, 0·noise would turn −0 into +0, and compilers may fuse the sum.
    return jnp.where(expand(level, clean) == 0, clean, alpha * clean + sigma * noise)


def _flow_read(x: Latents, velocity: Latents, level: Levels) -> Prediction:
    level = expand(level, x)
    return Prediction(x - level * velocity, x + (1 - level) * velocity)


flow = Process(
    alpha=lambda level: 1 - level,
    sigma=lambda level: level,
    target=lambda clean, noise, level: noise - clean,
    read=_flow_read,
    timestep=lambda level: 1000 * level,
)
"""Rectified flow: α = 1 − l, σ = l, the network says the velocity noise − clean.

Source: Liu et al. 2022 (arXiv 2209.03003); per frame as in Pusa V1.0 (arXiv 2507.16116), eq. 5–11. The level
is the σ of Wan and Pusa. Their rounding of the timestep is left out: `flow._replace(timestep=…)` restores it.
"""


# log ᾱ at levels 0, 1/1000 … 1, summed in float64: the product itself loses digits.
_LOG_ALPHA_BAR = np.append(0.0, np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000)))).astype(np.float32)


def _log_alpha_bar(level: Levels) -> Levels:
    index = jnp.clip(jnp.floor(1000 * level).astype(jnp.int32), 0, 999)
    low, high = jnp.asarray(_LOG_ALPHA_BAR)[index], jnp.asarray(_LOG_ALPHA_BAR)[index + 1]
    return low + (1000 * level - index.astype(level.dtype)) * (high - low)


def _ddpm_sigma(level: Levels) -> Levels:
    # The root has no slope at 0, so a level of 0 must not reach it if levels are to be differentiated.
    variance = -jnp.expm1(_log_alpha_bar(jnp.where(level > 0, level, 1.0)))
    return jnp.where(level > 0, jnp.sqrt(variance), 0.0)


def _ddpm_alpha(level: Levels) -> Levels:
    return jnp.exp(_log_alpha_bar(level) / 2)


def _ddpm_read(x: Latents, noise: Latents, level: Levels) -> Prediction:
    alpha, sigma = expand(_ddpm_alpha(level), x), expand(_ddpm_sigma(level), x)
    return Prediction((x - sigma * noise) / alpha, noise)


ddpm = Process(
    alpha=_ddpm_alpha,
    sigma=_ddpm_sigma,
    target=lambda clean, noise, level: noise,
    read=_ddpm_read,
    timestep=lambda level: jnp.maximum(1000 * level - 1, 0.0),
)
"""FVDM's variance-preserving process: 1000 steps, linear β from 1e-4 to 0.02, the network says the noise.

Level 0 is exactly clean, level (k+1)/1000 is the discrete index k, and log ᾱ is linear in between. α is never
below 0.00635, so reading divides by it safely. Source: Ho et al. 2020 (arXiv 2006.11239) and the code of FVDM
(arXiv 2410.03160). There index 0 (σ = 0.01) doubles as clean; here clean frames are exact, and the network
is fed index 0 for them.
"""


def _v_target(clean: Latents, noise: Latents, level: Levels) -> Latents:
    return expand(_ddpm_alpha(level), clean) * noise - expand(_ddpm_sigma(level), clean) * clean


def _v_read(x: Latents, v: Latents, level: Levels) -> Prediction:
    alpha, sigma = expand(_ddpm_alpha(level), x), expand(_ddpm_sigma(level), x)
    return Prediction(alpha * x - sigma * v, sigma * x + alpha * v)


ddpm_v = ddpm._replace(target=_v_target, read=_v_read)
"""The same process, where the network says v = α·noise − σ·clean (Salimans & Ho 2022, arXiv 2202.00512)."""

PROCESSES = {"flow": flow, "ddpm": ddpm, "ddpm_v": ddpm_v}
"""The processes by name."""
