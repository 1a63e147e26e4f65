"""Inference schedules: how one frame goes from noise to clean, and when each frame of a clip does."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fvdm_jax import zoo
from fvdm_jax.shapes import Schedule, Sigmas, Strength


def _evenly(first: float, steps: int) -> np.ndarray:
    if steps < 1:
        raise ValueError(f"steps is {steps}; sampling takes at least 1")
    return np.linspace(first, 0, steps + 1)[:-1]


def _shifted(base: np.ndarray, shift: float) -> Sigmas:
    if not 0 < shift < np.inf:
        raise ValueError(f"shift is {shift}; give a positive number (1 leaves the steps evenly spaced)")
    # The published shift·s/(1 + (shift−1)·s), in a form that is exact at 0 and at 1.
    return np.append(base / (base + (1 - base) / shift), 0.0).astype(np.float32)


def sigmas(steps: int, shift: float = 5.0) -> Sigmas:
    """Levels [steps + 1] of Wan's UniPC: evenly from 0.999 to 0, then shifted.

    Raises ValueError unless steps ≥ 1 and shift > 0. Source: Wan 2.1 and 2.2, FlowUniPCMultistepScheduler;
    after shift 5 the path starts at 0.9998, so the solver never meets α = 0. Wan starts from the noise
    itself; here it is mixed at that level, and so 0.02 % smaller.
    """
    return _shifted(_evenly(float(np.float32(0.999)), steps), shift)


def pusa(steps: int, shift: float = 5.0) -> Sigmas:
    """Levels [steps + 1] of Pusa: evenly from exactly 1 to 0, then shifted.

    Raises ValueError unless steps ≥ 1 and shift > 0. The same table is that of DiffSynth, of Wan's own DPM++,
    and, as pusa(4, 5), of the four-step Lightning checkpoints, distilled at 1000, 750, 500 and 250 before the
    shift.
    """
    return _shifted(_evenly(1.0, steps), shift)


def ddpm(steps: int, shift: float = 1.0) -> Sigmas:
    """Levels [steps + 1] of FVDM's respacing: indices round(k·999/(steps−1)) downwards, as (index+1)/1000.

    Raises ValueError unless 1 ≤ steps ≤ 1000 and shift > 0. Source: `space_timesteps` of the FVDM code, which
    knows no shift (1 is faithful); its last step, from index 0, ends at exactly clean as here.
    """
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps is {steps}; the process has 1 to 1000")
    return _shifted((np.round(np.linspace(999, 0, steps)) + 1) / 1000, shift)


SPACINGS = {"wan": sigmas, "pusa": pusa, "ddpm": ddpm}
"""How the levels of one frame are spaced, by name: functions (steps, shift) → [steps + 1]."""


def schedule(sigmas: Sigmas, strength: Strength, delay: Sequence[int] | np.ndarray | int = 0) -> Schedule:
    """The level of every frame at every step, [s + 1 + max(delay), f]: strength[f] · sigmas[step − delay[f]].

    Before its delay a frame waits at its first level, after its path it stays at the last. `sigmas` and
    `strength` may be traced; `delay`, in whole steps, is known beforehand since it sets the number of rows.
    Raises ValueError for a delay that is negative, fractional, or not one number or one per frame.
    """
    delay = np.asarray(delay)
    frames, last = strength.shape[0], sigmas.shape[0] - 1
    if delay.dtype.kind not in "iu" or delay.shape not in ((), (frames,)) or delay.min() < 0:
        raise ValueError(
            f"delay is {delay.tolist()}; give {frames} whole numbers from 0, or one for all frames"
        )
    done = zoo.delayed(np.broadcast_to(delay, (frames,)), last)
    return jnp.asarray(strength, jnp.float32) * jnp.asarray(sigmas, jnp.float32)[done]


def switch(levels: Sigmas | Schedule, boundary: float) -> int:
    """How many steps the high-noise expert takes: those that begin at a global level of `boundary` or more.

    `levels` are of one frame, or a schedule [s + 1, f] of frames of strength 1, and 0 for those kept bit for
    bit: what is kept loosely has no say, as `strength > 0` in place of strength makes sure. The global level
    is the largest of any frame; since levels only fall, all later steps are the low-noise expert's. Raises
    ValueError unless 0 ≤ boundary ≤ 1. Source: Wan 2.2 (timestep ≥ 1000·boundary), Pusa (low below 875).
    """
    if not 0 <= boundary <= 1:
        raise ValueError(f"boundary is {boundary}; give a level from 0 to 1, as 0.875 for timestep 875")
    begun = np.asarray(levels, np.float32).reshape(len(levels), -1)[:-1]
    # A level of 0.9 is in float32 less than 0.9 in float64.
    return int(np.sum(begun.max(1) >= np.float32(boundary)))
