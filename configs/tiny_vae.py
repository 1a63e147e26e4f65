"""The VAE of the bundled tiny model: pixels ↔ latents, of textures and moving shapes.

    python configs/tiny_vae.py vae      # both ways; what was encoded before is of no use then
    python configs/tiny_vae.py decoder  # latents → pixels alone, once configs/tiny.py has stored latents

Both go on from what they find in runs/tiny; `decoder` from its own decoder.safetensors, of the same latents.
"""

import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tiny import DATA, FRAMES, RUNS, SIDE, VAE_SIZES, optimiser, started, train

from fvdm_jax.checkpoint import load_tree, save_tree
from fvdm_jax.data import source
from fvdm_jax.data.textures import textures
from fvdm_jax.models.vae import VAE

VAE_STEPS, DECODER_STEPS = 4500, 3000
IMAGE_BATCH, CLIP_BATCH = (12, 1, 64), (3, 33, 32)
"""Count, frames and side of the VAE's batches of images and of clips."""
PAIRS = 0.1
"""The share of clips with two shapes."""
KL = 3e-5
WHOLE = 2
"""Whole clips of a batch that the decoder learns from."""
NOISE = 0.3
"""Most noise in their latents, of these latents' spread: what a transformer makes is not quite right."""
STILL = 1.0
"""The weight of how much frames change that should not, beside the squared error."""


def vae_batch(step: int):
    """Pixels [b t H W 3], of which a third are textures, else moving shapes: images and clips in turn."""
    count, frames, side = CLIP_BATCH if step % 2 else IMAGE_BATCH
    others = count // 3
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step), others)
    corner = np.random.default_rng((1, step)).integers(0, SIDE - side + 1, 2)
    scene = source.scenes(1, range(step * count, (step + 1) * count - others), PAIRS)
    return _vae_pixels(keys, scene, corner, frames, side)


@partial(jax.jit, static_argnames=("frames", "side"))
def _vae_pixels(keys, scene, corner, frames, side):
    shapes = source.moving_shapes(scene, frames, SIDE, SIDE)
    drifting = jax.vmap(lambda key: textures(key, frames, SIDE, SIDE))(keys)
    video = jnp.concatenate([drifting, shapes])
    start = (0, 0, *corner, 0)
    return jax.lax.dynamic_slice(video, start, (*video.shape[:2], side, side, 3))


def vae_loss(params, video, key):
    """Mean squared error of the reconstruction, and a little of the KL divergence to a unit Gaussian."""
    model = VAE(VAE_SIZES)
    mean, log_variance = model.apply({"params": params}, video, method="moments")
    log_variance = jnp.clip(log_variance, -20, 10)
    drawn = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = jnp.mean(jnp.square(model.apply({"params": params}, drawn, method="decode") - video))
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    return error + KL * divergence, error


def train_vae(steps: int = VAE_STEPS):
    """Trains the VAE and stores it in RUNS, with the latents' mean and spread still 0 and 1."""
    params = (
        started("vae")
        or nn.meta.unbox(jax.jit(VAE(VAE_SIZES).init)(jax.random.key(0), vae_batch(0)))["params"]
    )
    train(params, optimiser(7e-4, steps), range(steps), vae_batch, vae_loss, "vae")
    # What it reads are other latents now.
    (RUNS / "decoder.safetensors").unlink(missing_ok=True)


@partial(jax.jit, static_argnames=("count", "frames"))
def _textures(key, params, count, frames):
    """Latents and pixels of textures."""
    video = jax.vmap(lambda k: textures(k, frames, SIDE, SIDE))(jax.random.split(key, count))
    return VAE(VAE_SIZES).apply({"params": params}, video, method="encode"), video


@jax.jit
def _shapes(scene):
    return source.moving_shapes(scene, FRAMES, SIDE, SIDE)


def decoder_batch(params: dict, store: np.ndarray, noise: np.ndarray, step: int):
    """Latents, how noisy they may be, and pixels: pictures of textures and clips by turns, of which every
    fourth batch is of textures too."""
    key = jax.random.fold_in(jax.random.key(5), step)
    if step % 2 == 0:
        latents, video = _textures(key, params, IMAGE_BATCH[0], 1)
    elif step % 8 == 7:
        latents, video = _textures(key, params, WHOLE, FRAMES)
    else:
        first = step // 2 * WHOLE % (len(store) - WHOLE)
        rows = range(first, first + WHOLE)
        return store[first : first + WHOLE].astype(np.float32), noise, _shapes(source.scenes(DATA, rows))
    return latents, 0 * noise, video


def decoder_loss(params, data, key):
    """The mean squared error of what is decoded, and with it how much frames change that should not."""
    latents, noise, video = data
    drawn, much = jax.random.split(key)
    share = jnp.square(jax.random.uniform(much, (len(latents), 1, 1, 1, 1)))
    latents = latents + share * noise * jax.random.normal(drawn, latents.shape)
    shown = VAE(VAE_SIZES).apply({"params": {"decoder": params}}, latents, method="decode")
    error = jnp.mean(jnp.square(shown - video))
    if video.shape[1] == 1:
        return error, error
    change = jnp.diff(shown, axis=1) - jnp.diff(video, axis=1)
    return error + STILL * jnp.mean(jnp.sqrt(jnp.square(change) + 1e-6)), error


def train_decoder(steps: int = DECODER_STEPS):
    """Trains the decoder of the VAE in RUNS, whose latents stay what they are, and puts it there."""
    vae, store = load_tree(RUNS / "vae.safetensors"), np.load(RUNS / "latents.npy", mmap_mode="r")
    start = started("decoder") or vae["decoder"]
    noise = NOISE * np.std(store[::100], axis=(0, 1, 2, 3), dtype=np.float32)
    batch = partial(decoder_batch, vae, store, noise)
    train(start, optimiser(1.5e-3, steps), range(steps), batch, decoder_loss, "decoder")
    save_tree(RUNS / "vae.safetensors", vae | {"decoder": load_tree(RUNS / "decoder.safetensors")})


STAGES = {"vae": train_vae, "decoder": train_decoder}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        raise SystemExit(f"error: give a stage: {', '.join(STAGES)}")
    STAGES[sys.argv[1]](*map(int, sys.argv[2:]))
