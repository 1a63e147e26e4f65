"""How much each frame counts in the loss, as a function of its level: levels [b f] → weights [b f].

Whatever the weight, a clean frame (level 0) weighs nothing: of its noise nothing can be seen.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fvdm_jax import schedule
from fvdm_jax.process import Process
from fvdm_jax.shapes import Levels

Weight = Callable[[Levels], Float[Array, "b f"]]


def uniform(level: Levels) -> Float[Array, "b f"]:
    """1 for every frame that is noised."""
    return (level > 0).astype(jnp.float32)


def _bump_scale() -> float:
    level = schedule.pusa(1000, 5.0)[:-1].astype(np.float64)
    return float(1 / np.mean(np.expm1(2 * level * (1 - level))))


_BUMP = _bump_scale()


def bump(level: Levels) -> Float[Array, "b f"]:
    """Pusa's bump: largest, 2.0764, at level ½, 0 at clean and at noise, and of mean 1 over its grid.

    Source: the scheduler of DiffSynth and Pusa V1.0, exp(−2·(l − ½)²) less its smallest value on the grid of
    1000 levels at shift 5, exp(−½) at l = 1. In the form here it is exactly 0 at both ends.
    """
    return _BUMP * jnp.expm1(2 * level * (1 - level))


def min_snr(process: Process, gamma: float = 5.0) -> Weight:
    """min(SNR, γ) as the weight of an error of the clean clip, turned into that of the process's output.

    SNR is α²/σ². ddpm (ε): min(SNR, γ)/SNR. ddpm_v: min(SNR, γ)/(SNR + 1). flow: min(SNR, γ)·l², which is
    min((1 − l)², γ·l²) and so 0 at l = 1 as well. Raises ValueError unless gamma is positive. Source: Hang
    et al. 2023 (arXiv 2303.09556); flow by the same rule.
    """
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma is {gamma}; give a positive number, such as 5")

    def weight(level: Levels) -> Float[Array, "b f"]:
        # An output that is off by 1 puts the noise off by `slope`, and the clean clip by −σ/α·slope.
        slope = process.read(jnp.zeros_like(level), jnp.ones_like(level), level).noise
        alpha = jnp.maximum(process.alpha(level), 1e-6)
        return jnp.minimum(1.0, gamma * (process.sigma(level) / alpha) ** 2) * slope**2

    return weight


def together(weight: Weight) -> Weight:
    """The weight with those of a clip replaced by their mean: Pusa's switch for parity.

    Its loss is the mean error of a clip times the mean weight of its frames.
    """

    def averaged(level: Levels) -> Float[Array, "b f"]:
        weights = weight(level)
        return jnp.broadcast_to(jnp.mean(weights, axis=1, keepdims=True), weights.shape)

    return averaged


WEIGHTS = {"uniform": lambda process: uniform, "bump": lambda process: bump, "min_snr": min_snr}
"""The weights by name: functions of the process that return one."""
