"""The bundled tiny model, from nothing: every weight in fvdm_jax/assets/tiny is made by this file.

    python configs/tiny.py vae        # pixels ↔ latents, on textures and moving shapes
    python configs/tiny.py text       # captions → states from which every word of them can be read
    python configs/tiny.py latents    # a store of encoded clips with their captions
    python configs/tiny.py dit        # noisy latents, levels and text states → velocity
    python configs/tiny.py pack       # the folder that the package carries

Each step reads what those before it left in runs/tiny, and prints its loss every 100 steps.
"""

import dataclasses
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

from fvdm_jax import levels, process  # noqa: E402
from fvdm_jax.checkpoint import Networks, load_tree, save, save_tree  # noqa: E402
from fvdm_jax.data import source  # noqa: E402
from fvdm_jax.models.dit import DiT, DiTConfig  # noqa: E402
from fvdm_jax.models.text import TextConfig, TextEncoder  # noqa: E402
from fvdm_jax.models.tokenizer import VOCABULARY, byte_tokens  # noqa: E402
from fvdm_jax.models.vae import VAE, VAEConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs/tiny"
LATENT = 32
"""Channels: twice Wan's, since so small a VAE squeezes less."""

UNIT = (0.0,) * LATENT, (1.0,) * LATENT
VAE_SIZES = VAEConfig(
    16, 32, LATENT, *UNIT, multipliers=(1, 2, 2), temporal=(True, True), blocks=1, patch=2, shortcuts=True
)

TEXT_SIZES = TextConfig(VOCABULARY, 128, 4, 32, 256, 3, length=128, dtype="float32")
DIT_SIZES = DiTConfig(192, 768, 3, 4, LATENT, LATENT, text_width=128, dtype="float32")
FRAMES, SIDE, CLIPS = 25, 80, 12000

VAE_STEPS, TEXT_STEPS, DIT_STEPS = 4500, 1200, 3600
VAE_SIDE, IMAGE_BATCH, CLIP_BATCH = 64, (12, 1, 64), (2, 33, 32)
"""Pixels in which scenes are drawn for the VAE; count, frames and side of a batch of images and of clips."""
KL = 1e-4


SAMPLING = {
    "process": "flow",
    "prompt": "a large yellow circle moves right and bounces on a cloudy navy background",
    "negative": "",
    "frames": FRAMES,
    "size": [SIDE, SIDE],
    "steps": 30,
    "solver": "unipc",
    "spacing": "wan",
    "shift": 3.0,
    "guidance": 3.0,
    "fps": 12,
}


def optimiser(rate: float, steps: int):
    """AdamW, warmed up and let down along a cosine, gradients clipped."""
    plan = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps, rate / 50)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(plan, b2=0.99, weight_decay=1e-3))


def vae_batch(step: int):
    """Pixels [b t H W 3], half textures, half moving shapes: at every third step clips, else images."""
    count, frames, side = CLIP_BATCH if step % 3 == 2 else IMAGE_BATCH
    rng = np.random.default_rng((1, step))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step), count // 2)
    corner = rng.integers(0, VAE_SIDE - side + 1, 2)
    return _vae_pixels(keys, source.scenes(rng, count // 2), corner, frames, side)


@functools.partial(jax.jit, static_argnames=("frames", "side"))
def _vae_pixels(keys, scene, corner, frames, side):
    shapes = source.moving_shapes(scene, frames, VAE_SIDE, VAE_SIDE)
    textures = jax.vmap(lambda key: source.textures(key, frames, VAE_SIDE, VAE_SIDE))(keys)
    video = jnp.concatenate([textures, shapes])
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
    params = nn.meta.unbox(jax.jit(VAE(VAE_SIZES).init)(jax.random.key(0), vae_batch(0)))["params"]
    train(params, optimiser(2e-3, steps), steps, vae_batch, vae_loss, "vae")


def train(params, tx, steps, batch, loss, name):
    """A plain loop with a running average of the weights, which is what is stored, every 100 steps."""

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(params, average, state, data, key, decay):
        (_, error), grads = jax.value_and_grad(loss, has_aux=True)(params, data, key)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
        return params, average, state, error

    RUNS.mkdir(parents=True, exist_ok=True)
    print(name, sum(x.size for x in jax.tree.leaves(params)), "parameters", flush=True)
    average, state = jax.tree.map(jnp.array, params), tx.init(params)
    began, errors = time.time(), []
    for step in range(steps):
        key, decay = jax.random.fold_in(jax.random.key(2), step), min(0.998, step / (step + 10))
        params, average, state, error = update(params, average, state, batch(step), key, decay)
        errors.append(error)
        if step % 100 == 99 or step == steps - 1:
            mean = float(np.mean(errors))
            if not np.isfinite(mean):
                raise SystemExit(f"{name}: loss is {mean} between steps {step - 99} and {step}")
            print(f"{name} {step + 1}/{steps} loss {mean:.5f} {time.time() - began:.0f} s", flush=True)
            errors = []
            save_tree(RUNS / f"{name}.safetensors", average)


WORDS = (source.SHAPES, source.COLOURS, source.SIZES, source.DIRECTIONS, source.SPEEDS, source.BACKGROUNDS)
CLASSES = [len(table) for table in (*WORDS, source.TONES)]
"""How many words there are for what a scene's first seven fields say."""


LONGEST = 96
"""Bytes of the longest caption and a little more; prompts may be longer."""


def text_batch(step: int):
    """Tokens, mask and scenes of 32 captions."""
    scenes = source.scenes(np.random.default_rng((3, step)), 32)
    tokens, mask = byte_tokens([source.caption(scenes, i) for i in range(32)], LONGEST)
    return tokens, mask, np.stack(scenes[: len(CLASSES)], -1)


def text_loss(params, data, key):
    """How badly words can be read off the mean of a caption's states: cross-entropy, and share misread."""
    tokens, mask, answers = data
    states = TextEncoder(TEXT_SIZES).apply({"params": params["encoder"]}, tokens, mask)
    pooled = states.sum(1) / mask.sum(1, keepdims=True)
    logits = jnp.split(pooled @ params["reader"], np.cumsum(CLASSES)[:-1], axis=-1)
    loss = sum(
        optax.softmax_cross_entropy_with_integer_labels(guess, answers[:, i]).mean()
        for i, guess in enumerate(logits)
    )
    wrong = jnp.mean(jnp.stack([guess.argmax(-1) for guess in logits], -1) != answers)
    return loss, wrong


def train_text(steps: int = TEXT_STEPS):
    """Trains the text encoder by reading captions back, far cheaper than by making videos of them."""
    tokens, mask, _ = text_batch(0)
    encoder = nn.meta.unbox(jax.jit(TextEncoder(TEXT_SIZES).init)(jax.random.key(0), tokens, mask))["params"]
    reader = jnp.zeros((TEXT_SIZES.width, sum(CLASSES)))
    params = {"encoder": encoder, "reader": reader}
    train(params, optimiser(2e-3, steps), steps, text_batch, text_loss, "text")


def store_latents(clips: int = CLIPS):
    """Encodes clips, four of five of moving shapes, the fifth of textures, and stores them with captions."""
    params = load_tree(RUNS / "vae.safetensors")
    shape = (FRAMES, SIDE, SIDE)

    @jax.jit
    def encode(scene, keys):
        textures = jax.vmap(lambda key: source.textures(key, *shape))(keys)
        video = jnp.concatenate([source.moving_shapes(scene, *shape), textures])
        return VAE(VAE_SIZES).apply({"params": params}, video, method="encode").astype(jnp.float16)

    captions, began = [], time.time()
    size = (clips, 1 + FRAMES // 4, SIDE // VAE_SIZES.spatial, SIDE // VAE_SIZES.spatial, LATENT)
    store = np.lib.format.open_memmap(RUNS / "latents.npy", "w+", np.float16, size)
    for i in range(0, clips, 20):
        scene = source.scenes(np.random.default_rng((4, i)), 16)
        store[i : i + 20] = encode(scene, jax.random.split(jax.random.fold_in(jax.random.key(4), i), 4))
        captions += [source.caption(scene, j, full=(i + j) % 4 > 0) for j in range(16)]
        captions += ["textures drift"] * 4
        if i % 400 == 380:
            print(f"latents {i + 20}/{clips} {time.time() - began:.0f} s", flush=True)
    store.flush()
    (RUNS / "captions.json").write_text(json.dumps(captions))


def load_latents():
    """The store [n f h w c], its captions as tokens and mask, and the mean and spread of each channel."""
    store = np.load(RUNS / "latents.npy", mmap_mode="r")
    sample = np.asarray(store[::7], np.float32)
    tokens = byte_tokens(json.loads((RUNS / "captions.json").read_text()), LONGEST)
    return store, tokens, sample.mean((0, 1, 2, 3)), sample.std((0, 1, 2, 3))


def draw(key, batch: int, frames: int):
    """Levels [b f]: PTSS at ½, shifted towards noise, and in half of the clips clean frames at either end."""
    apart, coin, first, last = jax.random.split(key, 4)
    level = levels.shifted(levels.ptss, SAMPLING["shift"])(apart, batch, frames, probability=0.5)
    at, frame = jnp.arange(frames), (batch, 1)
    head = jax.random.randint(first, frame, 0, 5)
    tail = jnp.maximum(jax.random.randint(last, frame, -1, 3), 0)
    kept = ((at < head) | (at >= frames - tail)) & jax.random.bernoulli(coin, 0.5, frame)
    return jnp.where(kept, 0.0, level)


def train_dit(steps: int = DIT_STEPS, batch: int = 16):
    """Trains the transformer on the store of latents, while the text encoder stands still."""
    store, captions, mean, std = load_latents()
    encoder = load_tree(RUNS / "text.safetensors")["encoder"]
    silence = byte_tokens([""], LONGEST)

    def dit_batch(step: int):
        rng = np.random.default_rng((5, step))
        chosen = np.sort(rng.choice(len(store), batch, replace=False))
        told = rng.random((batch, 1)) > 0.1
        words = [np.where(told, said[chosen], none) for said, none in zip(captions, silence, strict=True)]
        return (store[chosen].astype(np.float32) - mean) / std, *words

    def dit_loss(params, data, key):
        clean, tokens, mask = data
        text = TextEncoder(TEXT_SIZES).apply({"params": encoder}, tokens, mask)
        # As if the captions had been padded to the full length: what follows them is 0, and attended.
        text = jnp.pad(text, ((0, 0), (0, TEXT_SIZES.length - LONGEST), (0, 0)))
        level_key, noise_key = jax.random.split(key)
        level, noise = draw(level_key, *clean.shape[:2]), jax.random.normal(noise_key, clean.shape)
        x = process.mix(process.flow, clean, noise, level)
        said = DiT(DIT_SIZES).apply({"params": params}, x, process.flow.timestep(level), text)
        error = jnp.mean(jnp.square(said - process.flow.target(clean, noise, level)), (2, 3, 4))
        # Nothing can be learnt from clean frames: their noise cannot be seen.
        error = jnp.sum(error * (level > 0)) / jnp.sum(level > 0)
        return error, error

    clean, *words = dit_batch(0)
    text = jnp.zeros((1, TEXT_SIZES.length, TEXT_SIZES.width))
    init = jax.jit(DiT(DIT_SIZES).init)(jax.random.key(0), clean[:1], jnp.zeros((1, clean.shape[1])), text)
    train(nn.meta.unbox(init)["params"], optimiser(1.5e-3, steps), steps, dit_batch, dit_loss, "dit")


def pack():
    """Puts the trained weights and their configs where the package carries them."""
    *_, mean, std = load_latents()
    vae = dataclasses.replace(VAE_SIZES, mean=tuple(map(float, mean)), std=tuple(map(float, std)))
    params = {name: load_tree(RUNS / f"{name}.safetensors") for name in ("vae", "text", "dit")}
    params["text"] = params["text"]["encoder"]
    networks = Networks(dit=DIT_SIZES, vae=vae, text=TEXT_SIZES)
    save(ROOT / "fvdm_jax/assets/tiny", networks, params, {"sampling": SAMPLING})


STAGES = {"vae": train_vae, "text": train_text, "latents": store_latents, "dit": train_dit, "pack": pack}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        raise SystemExit(f"error: give a stage: {', '.join(STAGES)}")
    STAGES[sys.argv[1]](*map(int, sys.argv[2:]))
