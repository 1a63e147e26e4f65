"""Long video: windows of one length, each of which keeps the end of the one before."""

from collections.abc import Callable

import jax.numpy as jnp

from fvdm_jax.shapes import Latents
from fvdm_jax.tasks import Task, text_to_video


def extend(
    generate: Callable[[Task, int], Latents], start: Task, windows: int, overlap: int, strength: float = 0.0
) -> Latents:
    """The clip [b n h w c] of so many windows of f frames, n = f + (windows − 1)·(f − overlap).

    `generate(task, i)` makes window i, the first of `start`, the others of the last `overlap` latent frames
    before them, kept with this strength. These stay latents, so that nothing is lost in the VAE; where they
    are redrawn (strength above 0) the later window has them. The VAE's first latent frame stands for one
    picture and those that are kept for four, which a model may not have met in training. Raises ValueError
    unless windows ≥ 1 and 1 ≤ overlap < f.
    """
    frames = start.canvas.shape[1]
    if windows < 1 or not 1 <= overlap < frames:
        what = f"{windows} windows of {frames} frames that overlap by {overlap}"
        raise ValueError(f"{what}; give 1 window or more, and an overlap from 1 to {frames - 1}")
    made = generate(start, 0)
    for i in range(1, windows):
        task = text_to_video(start.canvas.shape).keep(made[:, -overlap:], at=0, strength=strength)
        made = jnp.concatenate([made[:, :-overlap], generate(task, i)], axis=1)
    return made
