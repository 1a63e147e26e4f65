from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fvdm_jax.optimisers import NAMES, SCHEDULES, Optimiser

EVERY = pytest.mark.parametrize("name", NAMES)
SHAPES = {
    "patch_embedding": {"kernel": (12, 8), "bias": (8,)},
    "blocks": {
        "q": {"kernel": (3, 8, 8), "bias": (3, 8)}, "up": {"kernel": (3, 8, 24)}, "modulation": (3, 6, 8),
    },
    "head": {"out": {"kernel": (8, 12)}},
    "low_rank": {"q": {"a": (3, 8, 2), "b": (3, 2, 8)}},
}  # fmt: skip
DECAYED = ("kernel", "a", "b")


def optimiser(*given, **settings) -> optax.GradientTransformation:
    return Optimiser(*given, **settings).transformation()


def tree(seed: int, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda x: type(x) is tuple,
    )


def stepped(rule: optax.GradientTransformation, params, steps: int):
    state = rule.init(params)
    update = jax.jit(rule.update)
    for step in range(steps):
        changes, state = update(tree(step + 1), state, params)
        params = optax.apply_updates(params, changes)
    return params


def named(params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def test_adamw_is_that_of_torch():
    """In float64, as `torch.optim.AdamW` states it; Pusa decays every parameter."""
    ours = named(stepped(optimiser("adamw", 1e-2, decay=0.1, decay_all=True), tree(0), 5))
    grads = [named(tree(step + 1)) for step in range(5)]
    for name, x in named(tree(0)).items():
        x, m, v = x.astype(np.float64), 0.0, 0.0
        for step, grad in enumerate((np.float64(every[name]) for every in grads), 1):
            x = x * (1 - 1e-2 * 0.1)
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            x = x - 1e-2 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(ours[name], x, atol=2e-6, err_msg=name)


@EVERY
@pytest.mark.parametrize("decay_all", [False, True])
def test_only_matrices_are_decayed(name, decay_all):
    zeros, params = jax.tree.map(jnp.zeros_like, tree(0)), tree(0)
    rule = optimiser(name, 1.0, decay=0.25, decay_all=decay_all)
    changes, _ = jax.jit(rule.update)(zeros, rule.init(params), params)
    for path, change in named(changes).items():
        decayed = decay_all or path.split("/")[-1] in DECAYED
        np.testing.assert_allclose(change, -0.25 * decayed * named(params)[path], atol=1e-7, err_msg=path)


def test_gradients_are_clipped_by_their_global_norm():
    params, grads = (tree(seed)["blocks"]["q"] for seed in (0, 1))
    norm = float(optax.tree.norm(grads))

    @partial(jax.jit, static_argnums=0)
    def moments(clip: float, grads) -> jax.Array:
        rule = optimiser("adamw", 1.0, clip=clip)
        state = rule.update(grads, rule.init(params), params)[1]
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim])

    free, quarter = moments(0.0, grads), moments(0.0, jax.tree.map(lambda grad: grad / 4, grads))
    np.testing.assert_allclose(moments(norm / 4, grads), quarter, rtol=1e-5)
    np.testing.assert_allclose(moments(norm * 2, grads), free, rtol=1e-6)
    assert not np.allclose(free, quarter)


def test_rates():
    def rates(**settings):
        setting = Optimiser(rate=2.0, **settings)
        return [float(setting.rate_at(step)) for step in range(0, 13, 2)]

    assert rates() == [2.0] * 7
    np.testing.assert_allclose(rates(warmup=3), [0.5, 1.5, 2, 2, 2, 2, 2])
    np.testing.assert_allclose(rates(schedule="linear", steps=10), [2, 1.6, 1.2, 0.8, 0.4, 0, 0], atol=1e-6)
    cosine = 1 + np.cos(np.pi * np.array([0, 2, 4, 6, 8, 10, 10]) / 10)
    np.testing.assert_allclose(rates(schedule="cosine", steps=10), cosine, atol=1e-6)
    # Nine steps follow the warm-up, the last three of them fall.
    falls = rates(schedule="trapezoid", steps=11, warmup=2)
    np.testing.assert_allclose(falls, [2 / 3, 2, 2, 2, 2, 2 / 3, 0], atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_rises_to_the_rate_and_never_again(schedule):
    setting = Optimiser(rate=3e-4, schedule=schedule, warmup=5, steps=50)
    rate = jax.jit(setting.rate_at)
    rates = np.array([rate(step) for step in range(60)])
    assert rates.dtype == np.float32 and rates[0] > 0 and rates.argmax() == 5
    assert rates[5] == np.float32(3e-4) and np.all(np.diff(rates[:6]) > 0) and np.all(np.diff(rates[5:]) <= 0)
    assert schedule == "constant" or (rates[49] > 0 and np.all(np.abs(rates[50:]) < 1e-10))


@EVERY
def test_updates_follow_the_schedule(name):
    setting = Optimiser(name, 0.1, schedule="linear", steps=4, decay=1.0)
    rule, params = setting.transformation(), tree(0)
    zeros, state, update = jax.tree.map(jnp.zeros_like, params), rule.init(params), jax.jit(rule.update)
    for step in range(5):
        changes, state = update(zeros, state, params)
        kernel = changes["blocks"]["q"]["kernel"]
        np.testing.assert_allclose(
            kernel, -setting.rate_at(step) * params["blocks"]["q"]["kernel"], rtol=1e-6
        )


@pytest.mark.parametrize("path", ["blocks/q/kernel", "blocks/up/kernel", "low_rank/q/a"])
def test_muon_makes_each_layer_of_a_stack_orthogonal_by_itself(path):
    rule, stack = optimiser("muon", 1.0, decay=0.0), named(tree(1))[path]

    def update(grads) -> np.ndarray:
        grads = {"inner": {path.split("/")[-1]: grads}}
        return named(jax.jit(rule.update)(grads, rule.init(grads), grads)[0]).popitem()[1]

    stacked = update(stack)
    np.testing.assert_allclose(stacked, [update(layer) for layer in stack], atol=1e-5)
    singular = np.linalg.svd(stacked, compute_uv=False) / (0.2 * np.sqrt(max(stack.shape[1:])))
    # Newton and Schulz's five steps end between 0.7 and 1.2, small ones lower.
    assert singular.max() < 1.25 and np.median(singular) > 0.65
    if path != "low_rank/q/a":
        # As large as AdamW's usual step; a matrix of low rank, 0.2·√(r/out).
        assert 0.1 < np.sqrt(np.mean(stacked**2)) < 0.3


def test_muon_leaves_everything_else_to_adamw():
    muon, adamw = (named(stepped(optimiser(name, 1e-2), tree(0), 3)) for name in ("muon", "adamw"))
    same = {name for name in muon if np.array_equal(muon[name], adamw[name])}
    inner = {"blocks/q/kernel", "blocks/up/kernel", "low_rank/q/a", "low_rank/q/b"}
    assert set(muon) - same == inner


@EVERY
def test_the_state_lies_beside_the_parameters_in_float32(name):
    params = tree(0, jnp.bfloat16)
    rule = optimiser(name, 1e-3, clip=1.0, warmup=3)
    state = jax.eval_shape(rule.init, params)
    changes, after = jax.eval_shape(rule.update, tree(1, jnp.bfloat16), state, params)
    paths, moments = named(params), 0
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert leaf.dtype in (np.float32, np.int32)
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if owner := next((name for name in paths if where.endswith(f"/{name}")), None):
            assert leaf.shape == paths[owner].shape
            moments += 1
        else:
            assert leaf.size <= 3
    # Muon has one moment, AdamW two.
    assert moments == 2 * len(paths) - (4 if name == "muon" else 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(changes)} == {np.dtype("float32")}


@EVERY
def test_a_sharded_state_gives_the_same_updates(name):
    """Over fsdp and tensor, laid out by optax's map over the parameters' places in the state."""
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    whole, split = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(None, "fsdp", "tensor"))
    )
    params, grads = ({"q": tree(seed)["blocks"]["q"]} for seed in (0, 1))
    places = {"q": {"kernel": split, "bias": whole}}
    rule = optimiser(name, 1e-2, clip=1.0)
    state = optax.tree.map_params(
        rule,
        # Muon's state has a MaskedNode for what AdamW takes, and the other way round.
        lambda leaf, place: leaf if isinstance(leaf, optax.MaskedNode) else place,
        jax.eval_shape(rule.init, params),
        places,
        transform_non_params=lambda leaf: whole,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    update = jax.jit(rule.update, out_shardings=(places, state))
    there = jax.jit(rule.init, out_shardings=state)(jax.device_put(params, places))
    changes, after = update(jax.device_put(grads, places), there, jax.device_put(params, places))
    alone, _ = jax.jit(rule.update)(grads, rule.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), changes, alone)
    moments = [leaf for leaf in jax.tree.leaves(after) if leaf.ndim == 3]
    assert moments and all(leaf.sharding == split for leaf in moments)


@pytest.mark.parametrize("wrong, right", [
    ({"name": "sgd"}, "one of adamw, muon"), ({"schedule": "step"}, "one of constant"),
    ({"rate": 0.0}, "positive"), ({"rate": float("nan")}, "positive"),
    ({"warmup": -1}, "negative"), ({"steps": -1}, "negative"),
    ({"schedule": "cosine"}, "more steps than the 0"),
    ({"schedule": "linear", "steps": 5, "warmup": 5}, "more steps than the 5"),
    ({"decay": -1.0}, "from 0"), ({"clip": -1.0}, "from 0"), ({"clip": float("inf")}, "from 0"),
    ({"betas": (0.9, 1.0)}, "below 1"), ({"betas": (0.9,)}, "two numbers"),
])  # fmt: skip
def test_impossible_settings_are_refused(wrong, right):
    with pytest.raises(ValueError, match=right):
        Optimiser(**wrong)
