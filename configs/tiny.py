"""The bundled tiny model, from nothing: every weight in fvdm_jax/assets/tiny is made by this file.

    python configs/tiny.py vae        # pixels ↔ latents, on textures and moving shapes
    python configs/tiny.py latents    # a store of encoded clips with their captions
    python configs/tiny.py dit        # captions → velocity, text encoder and transformer together
    python configs/tiny.py pack       # the folder that the package carries
"""

import functools
import json
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm_jax.checkpoint import load_tree, save_tree  # noqa: E402
from fvdm_jax.data import source  # noqa: E402
from fvdm_jax.models.vae import VAE, VAEConfig  # noqa: E402

RUNS = Path("runs/tiny")
LATENT = 16
UNIT = (0.0,) * LATENT, (1.0,) * LATENT
VAE_SIZES = VAEConfig(
    16, 32, LATENT, *UNIT, multipliers=(1, 2, 2), temporal=(True, True), blocks=1, patch=2, shortcuts=True
)

VAE_STEPS = 3000
IMAGE_BATCH, CLIP_BATCH = (12, 1, 64), (2, 13, 48)
"""Count, frames and side in pixels of a batch of single frames and of one of clips."""
KL = 1e-4


def optimiser(rate: float, steps: int):
    """AdamW, warmed up and let down along a cosine, gradients clipped."""
    plan = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps, rate / 50)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(plan, b2=0.99, weight_decay=1e-3))


def vae_batch(step: int):
    """Pixels [b t H W 3], half textures and half moving shapes: clips at every fourth step, else single frames,
    of which three quarters are textures."""
    count, frames, side = CLIP_BATCH if step % 4 == 3 else IMAGE_BATCH
    shapes = count // 2 if step % 4 == 3 else count // 4
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step), count - shapes)
    return _vae_pixels(keys, source.scenes(np.random.default_rng((1, step)), shapes), frames, side)


@functools.partial(jax.jit, static_argnames=("frames", "side"))
def _vae_pixels(keys, scene, frames, side):
    textures = jax.vmap(lambda key: source.textures(key, frames, side, side))(keys)
    return jnp.concatenate([textures, source.moving_shapes(scene, frames, side, side)])


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
    tx = optimiser(2e-3, steps)
    params = nn.meta.unbox(jax.jit(VAE(VAE_SIZES).init)(jax.random.key(0), vae_batch(0)))["params"]
    print("parameters", sum(x.size for x in jax.tree.leaves(params)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, video, key):
        (_, error), grads = jax.value_and_grad(vae_loss, has_aux=True)(params, video, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, error

    train(params, tx, steps, vae_batch, update, "vae")


def train(params, tx, steps, batch, update, name):
    """A plain loop: batch, update, a line and a stored copy every 100 steps; stops on a loss that is not finite."""
    RUNS.mkdir(parents=True, exist_ok=True)
    state, began, errors = tx.init(params), time.time(), []
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(2), step)
        params, state, error = update(params, state, batch(step), key)
        errors.append(error)
        if step % 100 == 99:
            mean = float(np.mean(errors))
            if not np.isfinite(mean):
                raise SystemExit(f"{name}: loss is {mean} between steps {step - 99} and {step}")
            print(f"{name} {step + 1}/{steps} loss {mean:.5f} {time.time() - began:.0f} s", flush=True)
            errors = []
            save_tree(RUNS / f"{name}.safetensors", params)


if __name__ == "__main__":
    {"vae": train_vae}[sys.argv[1]](*map(int, sys.argv[2:]))
