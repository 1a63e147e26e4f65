"""A training step against the reference implementation, and what must hold of it however it is computed."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from convert import convert, wan
from fvdm_jax import levels, lora, process, trainer, training, weights
from fvdm_jax.config import Training
from fvdm_jax.models import dit
from fvdm_jax.optimisers import Optimiser
from fvdm_jax.program import Refusal

GOLDEN = Path(__file__).parent / "golden"
SIZES = dit.DiTConfig(32, 64, 2, 2, 4, 4, text_width=16, dtype="float32")
PLAIN = Training(
    dit=SIZES, fresh=True, curriculum=levels.constant(levels.ptss), optimizer=Optimiser(rate=1e-3), remat="none"
)
ONE = jax.devices()[:1]


def clips(count: int = 8, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = (count, 3, 8, 4, 4), (count, 5, 16), (5, 16)
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def stood(made: trainer.Trainer) -> dict:
    """Parameters that stand still, drawn so that the head is not zero and adapters have a slope."""
    rng = np.random.default_rng(1)
    draw = lambda leaf: jax.device_put(  # noqa: E731
        (rng.standard_normal(leaf.shape) * 0.1).astype(leaf.dtype), leaf.sharding
    )
    return jax.tree.map(draw, made.frozen)


def trained(settings: Training, steps: int, devices=ONE) -> tuple[training.TrainState, list[float]]:
    """The state after some steps from nothing, on the same clips each time, and the losses."""
    made = trainer.build(settings, SIZES, devices)
    frozen, state, losses = stood(made), made.start(), []
    for step in range(steps):
        state, told = made.step(state, frozen, made.batch(*clips(settings.batch, step)))
        losses.append(float(told["loss"]))
    return state, losses


def far(a, b) -> float:
    """The largest difference of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


@pytest.fixture(scope="module")
def plain() -> tuple[training.TrainState, list[float]]:
    return trained(PLAIN, 10)


def test_pusas_training_step(monkeypatch):
    """Schedule, weights and snapping have tests of their own; here they meet the network."""
    golden = np.load(GOLDEN / "pusa_step.npz")
    monkeypatch.setattr(dit, "FREQUENCIES", 32)
    params = convert(wan.dit(), {key[2:]: golden[key] for key in golden if key.startswith("w/")})
    network = dit.DiT(dit.DiTConfig(64, 128, 2, 2, text_width=24, dtype="float32"))
    clean, noise, noisy = (
        jnp.asarray(rearrange(golden[f"train/{key}"], "b c f h w -> b f h w c")) for key in ("x0", "noise", "noisy")
    )
    rounded = process.flow._replace(
        timestep=lambda level: (1000 * level).astype(jnp.bfloat16).astype(jnp.float32)
    )
    level = jnp.asarray(levels.PUSA_LEVELS)[golden["train/index"]]
    np.testing.assert_array_equal(rounded.timestep(level), golden["train/timestep_bf16"])
    np.testing.assert_allclose(process.mix(process.flow, clean, noise, level), noisy, rtol=0, atol=1e-6)

    def apply(params, x, timestep, text):
        return network.apply({"params": params}, x, timestep, text)

    def loss(weight):
        noised = training.Noised(clean, noise, level, jnp.asarray(golden["in/context"][:1]))
        objective = training.Objective(rounded, None, weight)
        return float(training.loss(params, noised, apply, objective)[0])

    assert abs(loss(weights.together(weights.bump)) - golden["train/loss"]) < 1e-5
    assert abs(loss(weights.uniform) - golden["train/mse"]) < 1e-5
    assert abs(loss(weights.bump) - golden["train/loss"]) > 1e-3


def test_a_loss_counts_each_clip_once_and_clean_frames_not_at_all():
    latents, text, nothing = map(jnp.asarray, clips(2))
    level = jnp.array([[0.0, 0.0, 0.5], [0.3, 0.6, 0.9]])
    noised = training.Noised(latents, jnp.ones_like(latents), level, text)
    objective = training.Objective(process.flow, None, weights.uniform)
    total, measures = training.loss({}, noised, lambda params, x, timestep, text: 0 * x, objective)
    error = np.mean(np.square(1 - np.asarray(latents)), (2, 3, 4))
    np.testing.assert_allclose(total, error[0, 2] + error[1].mean(), rtol=1e-5)
    np.testing.assert_array_equal(measures.frames, [0, 1, 2, 1])
    np.testing.assert_allclose(measures.error[1], error[1, 0], rtol=1e-5)


def test_captions_are_dropped_by_clip():
    latents, text, nothing = map(jnp.asarray, clips(400))
    objective = training.Objective(process.flow, levels.constant(levels.scalar), weights.uniform, 0.25)
    noised = training.noised(objective, training.Batch(latents, text, nothing), jnp.int32(0), jax.random.key(0))
    dropped = np.all(noised.text == nothing, (1, 2))
    assert np.all(dropped | np.all(noised.text == text, (1, 2)))
    # Four standard deviations of 400 tosses at 0.25.
    assert abs(dropped.mean() - 0.25) < 0.087


@pytest.mark.parametrize("rank", [2, 5])
def test_adapters_train_as_by_hand(rank):
    """Twenty steps against thirty lines: adapters added to the weights, AdamW as in its paper."""
    settings = dataclasses.replace(PLAIN, rank=rank, dropout=0.0)
    made = trainer.build(settings, SIZES, ONE)
    frozen, state = stood(made), made.start()
    ours, rate, decay, (b1, b2) = state.params, 1e-3, 0.01, (0.9, 0.999)
    by_hand = jax.tree.map(np.asarray, state.params)
    first = second = jax.tree.map(np.zeros_like, by_hand)
    network = dit.DiT(SIZES)

    @jax.jit
    def slope(pairs, latents, text, step):
        key = jax.random.fold_in(state.key, step)
        level_key, noise_key, _ = jax.random.split(key, 3)
        level = levels.ptss(level_key, *latents.shape[:2])
        noise = jnp.stack([
            jax.random.normal(jax.random.fold_in(noise_key, clip), latents.shape[1:]) for clip in range(len(latents))
        ])

        def loss(pairs):
            merged = jax.tree.map(lambda leaf: leaf, frozen)
            for name in ("self_attn", "cross_attn", "ffn"):
                for layer, pair in pairs["blocks"][name].items():
                    merged["blocks"][name][layer]["kernel"] += jnp.matmul(pair["a"], pair["b"], precision="highest")
            l = level[..., None, None, None]
            said = network.apply({"params": merged}, (1 - l) * latents + l * noise, 1000 * level, text)
            return jnp.mean(jnp.square(said - (noise - latents)))

        return jax.grad(loss)(pairs)

    key, losses = state.key, []
    for step in range(20):
        latents, text, nothing = clips(8, step)
        grads = slope(by_hand, latents, text, step)
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first, grads)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, second, grads)
        by_hand = jax.tree.map(
            lambda p, m, v: p - rate * (m / (1 - b1 ** (step + 1)) / (jnp.sqrt(v / (1 - b2 ** (step + 1))) + 1e-8) + decay * p),
            by_hand, first, second,
        )  # fmt: skip
        state, told = made.step(state, frozen, made.batch(latents, text, nothing))
        losses.append(float(told["loss"]))
    moved = far(by_hand, lora.init(jax.random.split(jax.random.key(0))[0], lora.abstract(dit.abstract(SIZES), rank)))
    print(moved, far(by_hand, state.params))
    # AdamW divides by the root of the square of a gradient, which turns the rounding of small ones into steps.
    assert far(by_hand, state.params) < 1e-5 < 1e-2 < moved
