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
    dit=SIZES,
    fresh=True,
    curriculum=levels.constant(levels.ptss),
    optimizer=Optimiser(rate=1e-3),
    remat="none",
)
ONE = jax.devices()[:1]
SLOW = pytest.mark.slow


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
        jnp.asarray(rearrange(golden[f"train/{key}"], "b c f h w -> b f h w c"))
        for key in ("x0", "noise", "noisy")
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
    noised = training.noised(
        objective, training.Batch(latents, text, nothing), jnp.int32(0), jax.random.key(0)
    )
    dropped = np.all(noised.text == nothing, (1, 2))
    assert np.all(dropped | np.all(noised.text == text, (1, 2)))
    # Four standard deviations of 400 tosses at 0.25.
    assert abs(dropped.mean() - 0.25) < 0.087


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [pytest.param(2, marks=SLOW), 5])
def test_adapters_train_as_by_hand(rank):
    """Twenty steps against thirty lines: adapters added to the weights, AdamW as in its paper."""
    settings = dataclasses.replace(PLAIN, rank=rank, dropout=0.0)
    made = trainer.build(settings, SIZES, ONE)
    frozen, state = stood(made), made.start()
    rate, decay, (b1, b2) = 1e-3, 0.01, (0.9, 0.999)
    by_hand = jax.tree.map(np.asarray, state.params)
    first = second = jax.tree.map(np.zeros_like, by_hand)
    network = dit.DiT(SIZES)

    def adamw(even1, even2, p, m, v):
        return p - rate * (m / even1 / (jnp.sqrt(v / even2) + 1e-8) + decay * p)

    @jax.jit
    def slope(pairs, latents, text, step):
        key = jax.random.fold_in(state.key, step)
        level_key, noise_key, _ = jax.random.split(key, 3)
        level = levels.ptss(level_key, *latents.shape[:2])
        noise = jnp.stack(
            [
                jax.random.normal(jax.random.fold_in(noise_key, clip), latents.shape[1:])
                for clip in range(len(latents))
            ]
        )

        def loss(pairs):
            merged = jax.tree.map(lambda leaf: leaf, frozen)
            for name in ("self_attn", "cross_attn", "ffn"):
                for layer, pair in pairs["blocks"][name].items():
                    merged["blocks"][name][layer]["kernel"] += jnp.matmul(
                        pair["a"], pair["b"], precision="highest"
                    )
            l = level[..., None, None, None]
            said = network.apply({"params": merged}, (1 - l) * latents + l * noise, 1000 * level, text)
            return jnp.mean(jnp.square(said - (noise - latents)))

        return jax.grad(loss)(pairs)

    for step in range(20):
        latents, text, nothing = clips(8, step)
        grads = slope(by_hand, latents, text, step)
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first, grads)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, second, grads)
        even1, even2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
        by_hand = jax.tree.map(partial(adamw, even1, even2), by_hand, first, second)
        state, told = made.step(state, frozen, made.batch(latents, text, nothing))
    moved = far(
        by_hand, lora.init(jax.random.split(jax.random.key(0))[0], lora.abstract(dit.abstract(SIZES), rank))
    )
    # AdamW divides by the root of a gradient's square: the rounding of small ones becomes steps.
    assert far(by_hand, state.params) < 1e-5 < 1e-2 < moved


@pytest.mark.thorough
@pytest.mark.parametrize("remat", [*(pytest.param(r, marks=SLOW) for r in ("full", "attention")), "offload"])
def test_what_is_computed_again_changes_nothing(plain, remat):
    """Gradients of each way are compared in tests/test_dit.py; here one of them meets the optimiser."""
    state, losses = trained(dataclasses.replace(PLAIN, remat=remat), 10)
    # Rounding differs where a compiler fuses otherwise; AdamW turns it into steps of up to the rate, 1e-3.
    assert far(state.params, plain[0].params) < 2e-5
    np.testing.assert_allclose(losses, plain[1], rtol=1e-5)


@pytest.mark.thorough
def test_parts_of_a_batch_add_up_to_the_whole(plain):
    state, losses = trained(dataclasses.replace(PLAIN, parts=4), 10)
    assert far(state.params, plain[0].params) < 2e-5
    np.testing.assert_allclose(losses, plain[1], rtol=1e-5)


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp=2,context=2,tensor=2",
        # tests/test_train.py and test_train_real.py train over data.
        *(pytest.param(mesh, marks=SLOW) for mesh in ("fsdp=8", "data=8", "data=2,fsdp=2,tensor=2")),
    ],
)
def test_a_mesh_changes_nothing_but_where_things_lie(plain, mesh):
    state, losses = trained(dataclasses.replace(PLAIN, mesh=mesh), 10, jax.devices())
    assert far(state.params, plain[0].params) < 2e-5
    np.testing.assert_allclose(losses, plain[1], rtol=1e-5)
    kernel = state.params["blocks"]["ffn"]["up"]["kernel"]
    made = trainer.build(dataclasses.replace(PLAIN, mesh=mesh), SIZES)
    assert kernel.sharding == made.state.params["blocks"]["ffn"]["up"]["kernel"].sharding
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == kernel.shape]
    assert len(moments) == 2 and all(leaf.sharding.mesh == kernel.sharding.mesh for leaf in moments)
    if "fsdp=8" in mesh:
        assert kernel.addressable_shards[0].data.size == kernel.size // 8
        assert moments[0].addressable_shards[0].data.size == kernel.size // 8


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_is_compiled_once(name):
    """A state that came back laid out otherwise would have the second step compiled anew."""
    settings = dataclasses.replace(PLAIN, mesh="fsdp=2,context=2,tensor=2", optimizer=Optimiser(name, 1e-3))
    made = trainer.build(settings, SIZES)
    state, counts, compiled = made.start(), [], []
    listen = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(4):
            state, told = made.step(state, {}, made.batch(*clips()))
            jax.block_until_ready(told)
            counts.append(len(compiled))
    finally:
        jax.monitoring.clear_event_listeners()
    assert counts[0] > 0 and set(counts) == {counts[0]}


@pytest.mark.thorough
def test_adapters_over_a_mesh_train_as_on_one_device():
    settings = dataclasses.replace(PLAIN, rank=4, average=0.9)
    one, losses = trained(settings, 10)
    many, others = trained(dataclasses.replace(settings, mesh="fsdp=2,context=2,tensor=2"), 10, jax.devices())
    assert far(one.params, many.params) < 2e-5 and far(one.average, many.average) < 2e-5
    np.testing.assert_allclose(losses, others, rtol=1e-5)


@pytest.mark.thorough
def test_small_updates_of_large_weights_are_not_lost():
    """In bfloat16 weights of 0.02 do not feel a rate of 1e-5; float32 masters do."""
    settings = dataclasses.replace(PLAIN, dtype="bfloat16", optimizer=Optimiser(rate=1e-5))
    made = trainer.build(settings, SIZES, ONE)
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), made.state.params
    )
    before = jax.tree.map(np.asarray, params)
    state = made.start(params)
    # jax 0.10 itself mixes types where it lowers the gradient of a bfloat16 product.
    with jax.numpy_dtype_promotion("standard"):
        for step in range(500):
            state, _ = made.step(state, {}, made.batch(*clips(8, step % 20)))
    # Moves that bfloat16 would have rounded away.
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True))
    still = sum(int(np.sum(a == np.asarray(b))) for a, b in pairs) / sum(a.size for a, _ in pairs)
    lost = sum(int(np.sum(jnp.asarray(a, jnp.bfloat16) == jnp.asarray(b, jnp.bfloat16))) for a, b in pairs)
    lost /= sum(a.size for a, _ in pairs)
    print(f"{still:.2%} of float32 masters are unchanged; {lost:.0%} would be in bfloat16")
    assert still < 0.01


@pytest.mark.thorough
@pytest.mark.fault("T6")
def test_what_is_not_finite_is_not_learned():
    made = trainer.build(dataclasses.replace(PLAIN, average=0.9), SIZES, ONE)
    state, _ = made.step(made.start(), {}, made.batch(*clips()))
    before = jax.tree.map(np.asarray, state._replace(key=0))
    latents, text, nothing = clips()
    latents[3, 1, 2, 2, 0] = np.nan
    state, told = made.step(state, {}, made.batch(latents, text, nothing))
    # The state has stopped: what is not due changes nothing, until the step that it waits for is made.
    assert not told["finite"] and int(state.step) == 1
    state, told = made.step(state, {}, made.batch(*clips(), 2))
    assert not told["finite"] and far(state._replace(key=0), before) == 0
    state, told = made.step(state, {}, made.batch(*clips(), 1))
    assert told["finite"] and int(state.step) == 2 and far(state._replace(key=0), before) > 0


@pytest.mark.thorough
def test_what_is_not_finite_may_be_left_out():
    """Nor what is so large that its square is not finite."""
    made = trainer.build(dataclasses.replace(PLAIN, skip=4), SIZES, ONE)
    state = made.start()
    before = jax.tree.map(np.asarray, state._replace(key=0))
    for step, value in enumerate((np.nan, np.inf, -np.inf, 1e30)):
        latents, text, nothing = clips()
        latents[3, 1, 2, 2, 0] = value
        state, told = made.step(state, {}, made.batch(latents, text, nothing, step))
        assert not told["finite"] and int(state.step) == step + 1, value
        assert far(state._replace(key=0, step=0), before._replace(step=0)) == 0, value


@pytest.mark.thorough
def test_an_average_follows():
    settings = dataclasses.replace(PLAIN, average=0.5)
    made = trainer.build(settings, SIZES, ONE)
    state = made.start()
    average = jax.tree.map(np.asarray, state.params)

    def mixed(keep, old, new):
        return keep * old + (1 - keep) * np.asarray(new)

    for step in range(3):
        state, _ = made.step(state, {}, made.batch(*clips(8, step)))
        keep = min(0.5, (1 + step) / (10 + step))
        average = jax.tree.map(partial(mixed, keep), average, state.params)
    assert far(average, state.average) < 1e-6


def test_held_out_clips_go_through_the_network_as_a_step_takes_them(monkeypatch):
    """Few at a time where memory is short, which changes nothing of what is found."""
    seen, found = [], []
    plain = training.loss
    monkeypatch.setattr(training, "loss", lambda p, n, *a: seen.append(len(n.level)) or plain(p, n, *a))
    for parts in (1, 4):
        made = trainer.build(dataclasses.replace(PLAIN, batch=8, parts=parts), SIZES, ONE)
        params = jax.tree.map(jnp.asarray, stood(made._replace(frozen=made.state.params)))
        found.append(made.errors(params, {}, training.Batch(*map(jnp.asarray, clips(6)))))
    assert set(seen) == {6, 2}
    for name, error in found[0].items():
        np.testing.assert_allclose(found[1][name], error, rtol=1e-6)


def test_the_adapters_of_pusa_are_as_many_as_published():
    """2,453,667,840 parameters at rank 512 of the ten matrices of 40 blocks."""
    settings = Training(dit=dit.SIZES["wan_14b"], rank=512, model="")
    made = trainer.build(settings, dit.SIZES["wan_14b"], ONE)
    assert sum(leaf.size for leaf in jax.tree.leaves(made.state.params)) == 2_453_667_840
    kinds = {leaf.dtype for leaf in jax.tree.leaves(made.state.params)}
    assert kinds == {jnp.dtype("float32")}
    assert made.frozen["blocks"]["ffn"]["up"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "where"),
    [({"mesh": "fsdp=3"}, "--mesh"), ({"mesh": "width=2"}, "--mesh"), ({"batch": 12}, "--batch"),
     ({"rank": 2, "where": "blocks/nothing"}, "--where")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, where):
    with pytest.raises(Refusal) as refused:
        trainer.build(dataclasses.replace(PLAIN, **changes), SIZES)
    assert refused.value.where == where
