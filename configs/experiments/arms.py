"""The arms of an experiment: what each is trained on, by the project's own trainer, and what came of it.

What was trained and measured is kept in a folder under a name made of its settings, so that experiments
share.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import circle
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fvdm_jax import levels, lora, trainer
from fvdm_jax.checkpoint import load_tree, save_tree
from fvdm_jax.config import Training
from fvdm_jax.optimisers import Optimiser
from fvdm_jax.process import PROCESSES, Prediction
from fvdm_jax.program import legible, outputs
from fvdm_jax.shapes import Latents, Levels
from fvdm_jax.training import Batch

BATCH = 64
TUNED, SHORT = 0.2, 0.01
"""How long a network is tuned, and how shortly, as shares of the steps of its base."""

RATES = {"scratch": 5e-3, "tuned": 2.5e-3, "adapters": 5e-3}
"""AdamW's. That from scratch was chosen among 2e-3, 5e-3 and 1e-2 by the diagonal excess of equal levels
after 600 steps with a seed that no experiment has (0.151, 0.116, 0.116); the others are not tuned."""
WARMUP, CLIP = 100, 1.0

MIXTURE = levels.mixture(
    [
        levels.scalar,
        levels.per_frame,
        levels.clean(levels.scalar, levels.prefix),
        levels.clean(levels.scalar, levels.ends),
        levels.ramp,
    ],
    [0.5, 0.2, 0.1, 0.1, 0.1],
)
DRAWS = {
    "equal": levels.scalar,
    **{f"ptss {p}": partial(levels.ptss, probability=p) for p in (0.2, 0.5, 0.8)},
    "random": levels.per_frame,
    "first": circle.FAMILIES["first"],
    "mixture": MIXTURE,
}
"""What levels are drawn in training: PTSS at 0 is "equal", at 1 "random"; "first" has a clean first frame."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A network and how it came to be: from nothing, or from what another arm has learned.

    With a `rank` adapters are trained on the base; they are used at `strength`, which is 1 in training.
    """

    draw: str
    steps: int
    process: str = "flow"
    base: "Arm | None" = None
    rank: int = 0
    seed: int = 0
    strength: float = 1.0

    def seeded(self, seed: int) -> "Arm":
        """The arm with another seed, from a base of that seed."""
        base = self.base and self.base.seeded(seed)
        return dataclasses.replace(self, seed=seed, base=base)

    def tuned(self, draw: str, share: float = TUNED, rank: int = 0) -> "Arm":
        """The arm that goes on from this one for a share of its steps."""
        return Arm(draw, max(1, round(share * self.steps)), self.process, self, rank)

    @property
    def name(self) -> str:
        """A name for a file, which differs where any setting does."""
        settings = repr((self, BATCH, RATES, WARMUP, CLIP, circle.SIZES))
        what = f"{self.process} {self.draw} {self.steps}"
        what += f" rank {self.rank}" * bool(self.rank) + " tuned" * bool(self.base) + f" seed {self.seed}"
        return f"{what.replace(' ', '-')}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


@functools.cache
def _trainer(arm: Arm) -> trainer.Trainer:
    kind = "adapters" if arm.rank else "tuned" if arm.base else "scratch"
    warmup = min(WARMUP, arm.steps // 4)
    settings = Training(
        dit=circle.SIZES,
        fresh=True,
        process=arm.process,
        curriculum=levels.constant(DRAWS[arm.draw]),
        dropout=0.0,
        rank=arm.rank,
        optimizer=Optimiser(
            rate=RATES[kind], warmup=warmup, steps=arm.steps, schedule="trapezoid", clip=CLIP
        ),
        steps=arm.steps,
        batch=BATCH,
        average=0.998,
        remat="none",
    )
    return trainer.build(settings, circle.SIZES, jax.devices()[:1])


def built(arm: Arm) -> trainer.Trainer:
    """The arm's trainer; those that differ in their seed share one compiled step."""
    made = _trainer(dataclasses.replace(arm.seeded(0), strength=1.0))
    # Tuning must not meet again the very noise that its base has seen.
    return made._replace(settings=dataclasses.replace(made.settings, seed=arm.seed + 1000 * bool(arm.base)))


def batches(arm: Arm, made: trainer.Trainer) -> Iterator[Batch]:
    """Clips drawn from the 64 with equal probability; the text is one token that says nothing."""
    rng = np.random.default_rng([arm.seed, int(bool(arm.base))])
    text, width = np.zeros((BATCH, 1, circle.SIZES.text_width), np.float32), circle.SIZES.text_width
    first = made.batch(circle.VIDEOS[:BATCH], text, np.zeros((1, width), np.float32))
    for _ in range(arm.steps):
        yield first._replace(latents=jnp.asarray(circle.VIDEOS[rng.integers(len(circle.VIDEOS), size=BATCH)]))


@functools.cache
def measuring(process: str) -> circle.Measuring:
    """How networks are measured; every arm's parameters go through the same compiled functions."""
    network = lora.Network(circle.SIZES)

    def denoise(params: dict, x: Latents, level: Levels) -> Prediction:
        text = jnp.zeros((len(x), 1, circle.SIZES.text_width))
        output = network.velocity({"dit": params}, x, PROCESSES[process].timestep(level), text)
        return PROCESSES[process].read(x, output, level)

    return circle.measuring(process, denoise)


def whole(arm: Arm, params: dict, base: dict | None) -> dict:
    """The network's parameters, with the adapters merged if it is they that were trained."""
    if not arm.rank:
        return params
    return lora.merge(base, lora.scaled(params, built(arm).settings.scale), arm.strength)


def _point(arm: Arm, step: int, loss: float, params: dict) -> dict:
    """What is told on the way: the loss of late, the excesses, and I2V."""
    measure = measuring(arm.process)
    found = circle.excesses(arm.process, measure, params)
    made = circle.carried_out(arm.process, "I2V", measure, params)
    return {"step": step, "loss": loss} | found | {"I2V right": made["I2V right"]}


def _learned(arm: Arm, base: dict | None) -> tuple[dict, list[dict]]:
    """What is trained, averaged, after all steps; and the points on the way."""
    made, curve, losses = built(arm), [], []
    frozen = {}
    if base is not None:
        wanted = made.frozen if arm.rank else made.state.params
        base = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), base, wanted)
        frozen = base if arm.rank else {}
    # It takes over the memory of what it is given.
    state = made.start(None if base is None or arm.rank else jax.tree.map(jnp.copy, base))
    every = max(100, arm.steps // 5) if arm.base else 500
    for step, batch in enumerate(batches(arm, made), 1):
        state, told = made.step(state, frozen, batch)
        losses.append(told["loss"])
        if step % every == 0 or step == arm.steps:
            loss, losses = float(np.mean(losses)), []
            if not np.isfinite(loss):
                raise FloatingPointError(f"{arm.name}: loss is {loss} after step {step}")
            curve.append(_point(arm, step, loss, whole(arm, made.trained(state), base)))
    return made.trained(state), curve


def trained(arm: Arm, out: Path) -> tuple[dict, dict]:
    """(the network's parameters, what is known of their training), read from `out` where they are there."""
    key = dataclasses.replace(arm, strength=1.0)
    arrays, told = (out / f"{key.name}.{kind}" for kind in ("safetensors", "json"))
    base = trained(arm.base, out)[0] if arm.base else None
    if not (arrays.is_file() and told.is_file()):
        began = time.time(), time.process_time()
        params, curve = _learned(key, base)
        spent = {"wall seconds": time.time() - began[0], "CPU seconds": time.process_time() - began[1]}
        out.mkdir(parents=True, exist_ok=True)
        save_tree(arrays, jax.tree.map(np.asarray, params))
        _write(told, {"arm": dataclasses.asdict(key), "curve": curve} | spent)
    params = jax.tree.map(jnp.asarray, load_tree(arrays))
    return whole(arm, params, base), json.loads(told.read_text())


def _write(path: Path, what: dict) -> None:
    with outputs(path) as (draft,):
        draft.write_text(legible(what) + "\n", encoding="utf-8")


def result(arm: Arm, out: Path) -> dict:
    """Every measure of an arm and how it was trained, which happens where `out` does not have it already."""
    path = out / f"{arm.name}-measured.json"
    params, told = trained(arm, out)
    if not path.is_file():
        began = time.process_time()
        found = circle.measures(arm.process, measuring(arm.process), params)
        if arm.base:
            found |= drift(trained(arm.base, out)[0], params)
        _write(path, found | {"CPU seconds of measuring": time.process_time() - began})
    return told | json.loads(path.read_text()) | {"file": f"{arm.name}.safetensors"}


GROUPS = {
    "self_attn": "blocks/self_attn/",
    "cross_attn": "blocks/cross_attn/",
    "ffn": "blocks/ffn/",
    "modulation": "blocks/modulation",
    "time": "time_",
    "embeddings": ("patch_embedding/", "text_embedding/"),
    "head": "head/",
}
"""Parts of the network by how the paths of their parameters begin."""


def drift(before: dict, after: dict) -> dict[str, float]:
    """By "drift GROUP" how much a part of the network changed, relative to what it was (Frobenius norms)."""
    old, new = (flatten_dict(tree, sep="/") for tree in (before, after))
    found = {}
    for group, start in GROUPS.items():
        paths = [path for path in old if path.startswith(start)]
        change = sum(float(jnp.sum(jnp.square(new[path] - old[path]))) for path in paths)
        size = sum(float(jnp.sum(jnp.square(old[path]))) for path in paths)
        found[f"drift {group}"] = (change / size) ** 0.5
    return found
