"""The bundled tiny model, from nothing: every weight in fvdm_jax/assets/tiny is made by this file.

    python configs/tiny.py vae        # pixels ↔ latents, on textures and moving shapes
    python configs/tiny.py text       # captions → states from which every word of them can be read
    python configs/tiny.py latents    # a store of encoded clips with their captions
    python configs/tiny.py records    # the same as records, along the directions that are kept
    python -m fvdm_jax.train configs/tiny.py --out runs/tiny/dit
    python -m fvdm_jax.train configs/tiny.py --out runs/tiny/dit --export runs/tiny/model
    python configs/tiny.py pack       # the folder that the package carries

Each step reads what those before it left in runs/tiny. The bundled model was made so on two cores that other
work shared, with the last losses

    vae 1806 s 0.0208 · text 332 s 0.0003 misread · latents 1165 s · transformer 9300 s 0.290

before there was `fvdm_jax.train`: its transformer saw plain backgrounds three times as often as others, and
had 3,900 steps of Muon at 1e-3 after 2,700 of AdamW. Photographs come out of its VAE at 22.3 dB, moving
shapes at 24.9 dB. What it generates has the background and the colour that the prompt asks for; shapes are
rough and do not move as they are told.

Eight clips are learned by heart, as a check of the trainer (loss 1.85 at first, 0.13 at the end, in
15 minutes on two busy cores):

    python configs/tiny.py records 8
    alias train="python -m fvdm_jax.train configs/tiny.py --held-out 0"
    train --out runs/eight --batch 8 --steps 1000 --rule muon --rate 5e-3
"""

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm_jax import levels  # noqa: E402
from fvdm_jax.checkpoint import Networks, load_tree, restore_tree, save, save_tree  # noqa: E402
from fvdm_jax.config import Training  # noqa: E402
from fvdm_jax.data import records, source  # noqa: E402
from fvdm_jax.models.dit import DiTConfig  # noqa: E402
from fvdm_jax.models.text import TextConfig, TextEncoder  # noqa: E402
from fvdm_jax.models.tokenizer import VOCABULARY, byte_tokenizer  # noqa: E402
from fvdm_jax.models.vae import VAE, VAEConfig  # noqa: E402
from fvdm_jax.optimisers import Optimiser  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs/tiny"
WIDE, LATENT = 32, 16
"""Channels of the latents while the VAE is trained, and of those that are kept."""

UNIT = (0.0,) * WIDE, (1.0,) * WIDE
VAE_SIZES = VAEConfig(
    16, 32, WIDE, *UNIT, multipliers=(1, 2, 2), temporal=(True, True), blocks=1, patch=2, shortcuts=True
)

TEXT_SIZES = TextConfig(VOCABULARY, 128, 4, 32, 256, 3, length=128, dtype="float32")
DIT_SIZES = DiTConfig(192, 768, 3, 4, LATENT, LATENT, text_width=128, dtype="float32")
FRAMES, SIDE, CLIPS = 25, 80, 12000

VAE_STEPS, TEXT_STEPS, DIT_STEPS = 4500, 1200, 2700
VAE_SIDE, IMAGE_BATCH, CLIP_BATCH = 64, (12, 1, 64), (2, 33, 32)
"""Pixels in which scenes are drawn for the VAE; count, frames and side of a batch of images and of clips."""
KL = 1e-4

SAMPLING = {
    "prompt": "a large yellow circle moves right and bounces on a cloudy navy background", "negative": "",
    "frames": FRAMES, "size": [SIDE, SIDE], "fps": 12,
    "process": "flow", "solver": "unipc", "steps": 30, "spacing": "wan", "shift": 3.0, "guidance": 3.0,
}  # fmt: skip


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


@partial(jax.jit, static_argnames=("frames", "side"))
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
    train(params, optimiser(2e-3, steps), range(steps), vae_batch, vae_loss, "vae")


def train(params, tx, steps, batch, loss, name):
    """A plain loop with a running average of the weights, which is what is stored, every 100 steps."""

    @partial(jax.jit, donate_argnums=(0, 1, 2))
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
    for count, step in enumerate(steps):
        key, decay = jax.random.fold_in(jax.random.key(2), step), min(0.998, count / (count + 10))
        params, average, state, error = update(params, average, state, batch(step), key, decay)
        errors.append(error)
        if step % 100 == 99 or step == steps[-1]:
            mean = float(np.mean(errors))
            if not np.isfinite(mean):
                raise SystemExit(f"{name}: loss is {mean} between steps {step - 99} and {step}")
            print(f"{name} {step + 1}/{steps.stop} loss {mean:.5f} {time.time() - began:.0f} s", flush=True)
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
    tokens, mask = byte_tokenizer([source.caption(scenes, i) for i in range(32)], LONGEST)
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
    train(params, optimiser(2e-3, steps), range(steps), text_batch, text_loss, "text")


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
    size = (clips, 1 + FRAMES // 4, SIDE // VAE_SIZES.spatial, SIDE // VAE_SIZES.spatial, WIDE)
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


def stored_latents():
    """All stored latents [n f h w c]."""
    return np.load(RUNS / "latents.npy", mmap_mode="r")


def principal(store):
    """The directions [WIDE LATENT] in which latents vary most, and mean and spread [LATENT] along them.

    A few directions carry almost everything: the first of the 32 has a thousand times the power of the last,
    which a denoiser would learn as eagerly. The spread is between what it is and its average, so that large
    and small components lie closer together and are not quite alike. The directions are those of the latents
    themselves, not of their deviation from a mean, so that they pass through a convolution's zero padding.
    """
    sample = np.asarray(store[::6], np.float64).reshape(-1, WIDE)
    _, directions = np.linalg.eigh(sample.T @ sample / len(sample))
    directions = directions[:, ::-1][:, :LATENT]
    along = sample @ directions
    spread = np.sqrt(along.std(0) * np.mean(along.std(0)))
    return directions, along.mean(0), spread


def store_records(clips: int = CLIPS):
    """Writes the stored latents, along their principal directions, with their captions' states as records."""
    store, captions = stored_latents(), json.loads((RUNS / "captions.json").read_text())
    directions, mean, spread = principal(store)
    encoder = load_tree(RUNS / "text.safetensors")["encoder"]

    @jax.jit
    def read(tokens, mask):
        return TextEncoder(TEXT_SIZES).apply({"params": encoder}, tokens, mask)

    def states(caption: str) -> np.ndarray:
        tokens, mask = byte_tokenizer([caption], TEXT_SIZES.length)
        return np.asarray(read(tokens, mask))[0, : int(mask.sum())]

    header = records.Header(LATENT, TEXT_SIZES.width, TEXT_SIZES.length, SAMPLING["fps"], "tiny", {}, {})
    # Textures are for the VAE, which has to do with photographs; there is no saying what they are.
    shown = [i for i, caption in enumerate(captions) if caption != "textures drift"][:clips]
    with records.Writer(RUNS / "records", header) as writer:
        for i in shown:
            latents = (store[i].astype(np.float32) @ directions - mean) / spread
            key = f"{i} {captions[i]}"
            if key not in writer.done:
                name, said = f"clip {i:05}", states(captions[i])
                writer.add(records.Record(name, captions[i], latents.astype(np.float32), said), key)
    save_tree(RUNS / "records/null.safetensors", {"states": states("")})


def curriculum(step):
    """PTSS, at first for every other clip and then for every fifth, shifted towards noise; of a third of the
    clips frames at one end or at both are clean."""
    asynchronous = levels.linear(step, 0, 1000, 0.5, 0.2)
    ptss = levels.shifted(partial(levels.ptss, probability=asynchronous), SAMPLING["shift"])
    given = [levels.clean(ptss, where) for where in (levels.prefix, levels.ends)]
    return levels.mixture([ptss, *given], [0.65, 0.2, 0.15])


def config(rule="adamw", rate=2e-3, steps=DIT_STEPS, **others) -> Training:
    tiny = {
        "dit": DIT_SIZES,
        "fresh": True,
        "data": str(RUNS / "records"),
        "curriculum": curriculum,
        "optimizer": Optimiser(rule, rate, warmup=steps // 20, steps=steps, schedule="cosine", clip=1.0),
        "batch": 16,
        "average": 0.998,
        "remat": "none",
        "text": TEXT_SIZES.length,
        "clip": "7x10x10",
    }
    return Training(steps=steps, **tiny | others)


def narrowed(params, directions):
    """The VAE's parameters with latents along `directions` only, folded into the convolutions around them.

    Exact but for two things: the posterior has no spread any more, and what the decoder's bias says outside
    of these directions is taken to hold at the borders too.
    """
    encoder, decoder = (dict(params[side]) for side in ("encoder", "decoder"))
    last, quant = encoder["conv_out"], encoder["quant"]
    onto = quant["kernel"][0, 0, 0, :, :WIDE] @ directions
    silent = [(0, 0)] * 4 + [(0, LATENT)]
    encoder["conv_out"] = {
        "kernel": np.pad(last["kernel"] @ onto, silent),
        "bias": np.pad(last["bias"] @ onto + quant["bias"][:WIDE] @ directions, (0, LATENT)),
    }
    spreadless = np.repeat([0.0, -20.0], LATENT)
    encoder["quant"] = {"kernel": np.eye(2 * LATENT)[None, None, None], "bias": spreadless}
    kernel, bias = decoder["post_quant"]["kernel"][0, 0, 0], decoder["post_quant"]["bias"]
    across, within = np.linalg.qr((directions.T @ kernel).T)
    decoder["post_quant"] = {"kernel": within.T[None, None, None], "bias": bias @ across}
    first, rest = decoder["conv_in"]["kernel"], bias - bias @ across @ across.T
    decoder["conv_in"] = {
        "kernel": np.einsum("ik,thwio->thwko", across, first),
        "bias": decoder["conv_in"]["bias"] + np.einsum("i,thwio->o", rest, first),
    }
    return {"encoder": encoder, "decoder": decoder}


def vae():
    """The VAE that is packed: its config and parameters."""
    directions, mean, spread = principal(stored_latents())
    params = narrowed(load_tree(RUNS / "vae.safetensors"), directions)
    statistics = {"mean": tuple(map(float, mean)), "std": tuple(map(float, spread))}
    return dataclasses.replace(VAE_SIZES, latent=LATENT, **statistics), params


def pack():
    """Puts the trained weights and their configs where the package carries them."""
    config, params = vae()
    text, dit = load_tree(RUNS / "text.safetensors")["encoder"], restore_tree(RUNS / "model/dit")
    networks = Networks(dit=DIT_SIZES, vae=config, text=TEXT_SIZES)
    params = {"vae": params, "text": text, "dit": dit}
    save(ROOT / "fvdm_jax/assets/tiny", networks, params, {"sampling": SAMPLING})


STAGES = {
    "vae": train_vae,
    "text": train_text,
    "latents": store_latents,
    "records": store_records,
    "pack": pack,
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        raise SystemExit(f"error: give a stage: {', '.join(STAGES)}")
    STAGES[sys.argv[1]](*map(int, sys.argv[2:]))
