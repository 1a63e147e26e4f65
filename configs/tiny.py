"""The bundled tiny model: every weight in fvdm_jax/assets/tiny is made by this file and tiny_vae.py.

    python configs/tiny_vae.py vae    # pixels ↔ latents, of textures and moving shapes
    python configs/tiny.py text       # captions → states from which every word of them can be read
    python configs/tiny.py latents    # a store of encoded clips
    python configs/tiny_vae.py decoder  # latents → pixels alone, better: what learned from latents still fits
    python configs/tiny.py records    # the same with captions' states, as records; `pictures`: first frames
    python configs/tiny.py deepen     # the bundled transformer with twice the layers, for --start
    python -m fvdm_jax.train configs/tiny.py --out runs/tiny/dit
    python -m fvdm_jax.train configs/tiny.py --out runs/tiny/dit --export runs/tiny/model
    python configs/tiny.py pack       # the folder that the package carries

Each step reads what those before it left in runs/tiny, and goes on from what it finds there, so that a
sitting may follow another; `--start FOLDER` does so for the transformer. What is bundled was made on two
cores that other work shared; `configs/LOG.md` has the hours, losses and results of the sittings.

Eight clips are learned by heart, as a check of the trainer:

    python configs/tiny.py records 8
    alias train="python -m fvdm_jax.train configs/tiny.py --held-out 0"
    train --out runs/eight --batch 8 --steps 1000 --rate 5e-3
"""

import dataclasses
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
from fvdm_jax.checkpoint import Networks, load, load_tree, restore_tree, save, save_tree  # noqa: E402
from fvdm_jax.config import Training  # noqa: E402
from fvdm_jax.data import records, source  # noqa: E402
from fvdm_jax.models.dit import DiTConfig  # noqa: E402
from fvdm_jax.models.text import TextConfig, TextEncoder  # noqa: E402
from fvdm_jax.models.tokenizer import VOCABULARY, byte_tokenizer  # noqa: E402
from fvdm_jax.models.vae import VAE, VAEConfig  # noqa: E402
from fvdm_jax.optimisers import Optimiser  # noqa: E402
from fvdm_jax.shapes import Levels  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs/tiny"
LATENT = 16
UNIT = (0.0,) * LATENT, (1.0,) * LATENT
VAE_SIZES = VAEConfig(
    16, 32, LATENT, *UNIT, multipliers=(1, 2, 2), temporal=(True, True), blocks=1, patch=2, shortcuts=True
)

TEXT_SIZES = TextConfig(VOCABULARY, 128, 4, 32, 256, 3, length=128, dtype="float32")
DIT_SIZES = DiTConfig(192, 768, 3, 8, LATENT, LATENT, text_width=128, dtype="float32")
FRAMES, SIDE, CLIPS = 33, 64, 24000
DATA, ENCODED = 4, 20
"""The seed of the clips that are learned from; how many are encoded at once."""

TEXT_STEPS, DIT_STEPS = 1200, 2700

SAMPLING = {
    "prompt": "a large yellow circle moves right and bounces on a cloudy navy background", "negative": "",
    "frames": FRAMES, "size": [SIDE, SIDE], "fps": 12,
    "process": "flow", "solver": "unipc", "steps": 10, "spacing": "wan", "shift": 3.0, "guidance": 2.5,
    # The first frame that is generated first, and the others by it: twice the calls.
    "schedule": f"autoregressive:block={FRAMES // 4},first=1",
}  # fmt: skip


def optimiser(rate: float, steps: int):
    """AdamW, warmed up and let down along a cosine, gradients clipped."""
    plan = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps, rate / 50)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(plan, b2=0.99, weight_decay=1e-3))


def started(name: str) -> dict | None:
    """What an earlier sitting stored under this name, to go on from."""
    path = RUNS / f"{name}.safetensors"
    return load_tree(path) if path.exists() else None


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


WORDS = (source.SHAPES, source.COLOURS, source.SIZES, source.DIRECTIONS, source.SPEEDS)
"""What is said of a shape; then come background and tone."""
CLASSES = [len(table) for table in (*WORDS, source.BACKGROUNDS, source.TONES)]


def text_batch(step: int):
    """Tokens, mask and what 32 captions say, [32 7] indices into their tables."""
    scene = source.scenes(3, range(32 * step, 32 * step + 32))
    tokens, mask = byte_tokenizer([source.caption(scene, i) for i in range(32)], TEXT_SIZES.length)
    of_shape = [field[:, 0] for field in scene[: len(WORDS)]]
    return tokens, mask, np.stack([*of_shape, scene.background, scene.tone], -1)


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
    params = started("text")
    if params is None:
        tokens, mask, _ = text_batch(0)
        start = jax.jit(TextEncoder(TEXT_SIZES).init)(jax.random.key(0), tokens, mask)
        reader = jnp.zeros((TEXT_SIZES.width, sum(CLASSES)))
        params = {"encoder": nn.meta.unbox(start)["params"], "reader": reader}
    train(params, optimiser(2e-3, steps), range(steps), text_batch, text_loss, "text")


def store_latents(clips: int = CLIPS):
    """Encodes clips of moving shapes; goes on where an earlier sitting stopped."""
    params, path = load_tree(RUNS / "vae.safetensors"), RUNS / "latents.npy"

    @jax.jit
    def encode(scene):
        video = source.moving_shapes(scene, FRAMES, SIDE, SIDE)
        return VAE(VAE_SIZES).apply({"params": params}, video, method="encode").astype(jnp.float16)

    began, done = time.time(), np.load(path) if path.exists() else np.zeros((0,), np.float16)
    chunks = [done] if len(done) else []
    for i in range(len(done), clips, ENCODED):
        chunks.append(np.asarray(encode(source.scenes(DATA, range(i, i + ENCODED)))))
        if i // ENCODED % 50 == 49:
            print(f"latents {i + ENCODED}/{clips} {time.time() - began:.0f} s", flush=True)
    np.save(path, np.concatenate(chunks)[:clips])


def statistics(store: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread [LATENT] that latents are normalised by.

    The spread is between what it is and its average, so that strong and weak components lie closer together
    and are not quite alike: a weak one is fine detail, which a denoiser would else learn as eagerly.
    """
    sample = np.asarray(store[::6], np.float64).reshape(-1, LATENT)
    return sample.mean(0), np.sqrt(sample.std(0) * np.mean(sample.std(0)))


def store_records(clips: int = CLIPS):
    """Writes the stored latents, normalised, with their captions' states, as records."""
    _store("records", clips, None)


def store_pictures(clips: int = CLIPS):
    """The same of the first frame of each clip alone."""
    _store("pictures", clips, 1)


def _store(folder: str, clips: int, frames: int | None):
    store = np.load(RUNS / "latents.npy", mmap_mode="r")
    mean, spread = statistics(store)
    encoder = load_tree(RUNS / "text.safetensors")["encoder"]
    scene = source.scenes(DATA, range(len(store)))

    @jax.jit
    def read(tokens, mask):
        return TextEncoder(TEXT_SIZES).apply({"params": encoder}, tokens, mask)

    def states(caption: str) -> np.ndarray:
        tokens, mask = byte_tokenizer([caption], TEXT_SIZES.length)
        return np.asarray(read(tokens, mask))[0, : int(mask.sum())]

    header = records.Header(LATENT, TEXT_SIZES.width, TEXT_SIZES.length, SAMPLING["fps"], "tiny", {}, {})
    with records.Writer(RUNS / folder, header) as writer:
        for i, clip in enumerate(store[:clips, :frames]):
            said = source.caption(scene, i, full=i % 4 > 0)
            if (key := f"{i} {said}") not in writer.done:
                latents = (clip.astype(np.float32) - mean) / spread
                record = records.Record(f"clip {i:05}", said, latents.astype(np.float32), states(said))
                writer.add(record, key)
    save_tree(RUNS / folder / "null.safetensors", {"states": states("")})


def deepen():
    """The bundled model with as many layers again, each after one that is there and at first without effect,
    in RUNS, to begin from: what it had learned is not lost. DIT_SIZES has to be doubled with it, as it was
    when eight layers were made of four.
    """
    networks, params = load(ROOT / "fvdm_jax/assets/tiny")

    def twice(path: tuple, layers: np.ndarray) -> np.ndarray:
        # What a layer adds to the stream is the product of these.
        silent = {"o", "down"} & {entry.key for entry in path}
        both = np.stack([layers, np.zeros_like(layers) if silent else layers], axis=1)
        return both.reshape(-1, *layers.shape[1:])

    params["dit"]["blocks"] = jax.tree_util.tree_map_with_path(twice, params["dit"]["blocks"])
    deeper = dataclasses.replace(networks.dit, layers=2 * networks.dit.layers)
    save(RUNS / "deeper", dataclasses.replace(networks, dit=deeper), params, {"sampling": SAMPLING})


def begun(key: jax.Array, batch: int, frames: int) -> Levels:
    """The first frame at some level and all others in noise: so a video begins frame by frame."""
    return jnp.where(jnp.arange(frames) == 0, levels.scalar(key, batch, frames), 1.0)


def curriculum(step):
    """PTSS, at first for every other clip and then for every fifth, shifted towards noise; some clips have
    clean frames at one end or at both. Three in ten have a clean first frame, and the others alike in much
    noise; as many are `begun`.

    Only in those is the word for the direction needed: elsewhere more frames show what it says. Much noise
    is where motion is decided: at level 0.5 and below all ways come out straight, at 0.85 a third.
    """
    asynchronous = levels.linear(step, 0, 1000, 0.5, 0.2)
    ptss = levels.shifted(partial(levels.ptss, probability=asynchronous), 5.0)
    given = [levels.clean(ptss, where) for where in (levels.prefix, levels.ends)]
    told = levels.clean(levels.shifted(levels.scalar, 8.0), levels.at(0))
    first = levels.shifted(begun, SAMPLING["shift"])
    return levels.mixture([ptss, *given, told, first], [0.24, 0.08, 0.08, 0.3, 0.3])


def of_pictures(step):
    """One level for a picture, shifted towards noise."""
    return levels.shifted(levels.scalar, SAMPLING["shift"])


def config(rule="muon", rate=2e-3, steps=DIT_STEPS, start="", pictures=False, **others) -> Training:
    """`start` is the folder of a model whose transformer an earlier sitting left; else it begins anew.

    `pictures`: learn first frames alone, many at once.
    """
    sizes = {"data": str(RUNS / "records"), "curriculum": curriculum, "batch": 16, "clip": "9x8x8"}
    if pictures:
        sizes = {"data": str(RUNS / "pictures"), "curriculum": of_pictures, "batch": 128, "clip": "1x8x8"}
    tiny = {
        **({"model": start} if start else {"dit": DIT_SIZES, "fresh": True}),
        **sizes,
        "optimizer": Optimiser(rule, rate, warmup=steps // 20, steps=steps, schedule="cosine", clip=1.0),
        "average": 0.998,
        "remat": "none",
        "text": TEXT_SIZES.length,
    }
    return Training(steps=steps, **tiny | others)


def vae():
    """The VAE that is packed: its config and parameters."""
    mean, spread = (tuple(map(float, row)) for row in statistics(np.load(RUNS / "latents.npy")))
    config = dataclasses.replace(VAE_SIZES, mean=mean, std=spread)
    return config, load_tree(RUNS / "vae.safetensors")


def pack():
    """Puts the trained weights and their configs where the package carries them."""
    config, params = vae()
    text, dit = load_tree(RUNS / "text.safetensors")["encoder"], restore_tree(RUNS / "model/dit")
    networks = Networks(dit=DIT_SIZES, vae=config, text=TEXT_SIZES)
    params = {"vae": params, "text": text, "dit": dit}
    save(ROOT / "fvdm_jax/assets/tiny", networks, params, {"sampling": SAMPLING})


STAGES = {
    "text": train_text,
    "latents": store_latents,
    "records": store_records,
    "pictures": store_pictures,
    "deepen": deepen,
    "pack": pack,
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        raise SystemExit(f"error: give a stage: {', '.join(STAGES)}")
    STAGES[sys.argv[1]](*map(int, sys.argv[2:]))
