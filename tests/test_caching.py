"""Steps at which the network is spared: when, and what that does to the video."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import far
from test_long import LONG

from fvdm_jax import checkpoint, zoo
from fvdm_jax.caching import SETTLING, changes, plan
from fvdm_jax.commands import parse
from fvdm_jax.flags import TINY
from fvdm_jax.guidance import Generation, Looks, Told, Weights
from fvdm_jax.lora import Network
from fvdm_jax.models.dit import DiT
from fvdm_jax.models.tokenizer import byte_tokenizer
from fvdm_jax.process import flow
from fvdm_jax.program import Refusal
from fvdm_jax.progress import Stages
from fvdm_jax.samplers import SAMPLERS, unipc
from fvdm_jax.schedule import sigmas
from fvdm_jax.studio import Studio

FRAMES, STEPS = 6, 30
SCHEDULES = [*zoo.ZOO, "pyramid:lag=7", "ad:lag=3,block=2"]


def laid(name: str, strength=(1.0,) * FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a schedule, and changes that are those of the levels themselves."""
    rows = zoo.levels(name, sigmas(STEPS, 3.0), strength)
    return rows, np.abs(np.diff(rows, axis=0)) / np.maximum(rows[:-1], 1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_at_threshold_0_every_step_is_a_call_and_the_more_the_fewer(name):
    counts = [plan(*laid(name), threshold).sum() for threshold in (0, 0.02, 0.05, 0.1, 0.3, 1, 100)]
    assert counts[0] == len(laid(name)[0]) - 1 and counts == sorted(counts, reverse=True)


def test_all_frames_together_are_spared_some_steps():
    counts = [plan(*laid("together"), threshold).sum() for threshold in (0, 0.1, 0.3, 100)]
    assert counts == sorted(counts, reverse=True) and counts[0] == STEPS > counts[1] > counts[2]
    assert counts[3] == SETTLING * STEPS + 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_whatever_the_threshold_a_frame_begins_and_ends_by_a_call(name):
    for settling in (0.0, SETTLING):
        rows, change = laid(name, (0.0, 1.0, 1.0, 0.4, 1.0, 1.0))
        calls, moving = plan(rows, change, 1e9, settling), np.diff(rows, axis=0) < 0
        assert calls[0]
        for frame in np.flatnonzero(moving.any(0)):
            steps = np.flatnonzero(moving[:, frame])
            early = steps[: max(1, int(np.ceil(settling * len(steps) - 1e-9)))]
            assert calls[early].all() and calls[steps[-1]], frame


def test_frames_have_each_their_own_change_and_those_that_stand_have_no_say():
    rows = np.array([[1, 1, 0], [0.9, 0.5, 0], [0.8, 0.5, 0], [0.7, 0.5, 0], [0.6, 0.4, 0], [0, 0, 0]])
    change = np.array([[0.1, 0.6, 9], [0.1, 0, 9], [0.1, 0, 9], [0.1, 0.2, 9], [0.6, 0.4, 9]])
    wanted = {0.15: "·│·│", 0.25: "··││", 0.55: "··││", 0.65: "···│"}
    for threshold, calls in wanted.items():
        shown = "".join("│" if call else "·" for call in plan(rows, change, threshold, 0))
        assert shown == "│" + calls, threshold


@pytest.mark.thorough
def test_changes_are_those_of_the_networks_own_projection():
    config = small.NETWORKS.dit
    params = small.drawn(checkpoint.KINDS["dit"][1](config))
    rows = jnp.asarray(zoo.levels("pyramid", sigmas(4, 3.0), [1.0, 1.0, 0.3]))
    x, text = jnp.zeros((len(rows), 3, 2, 2, 4)), jnp.zeros((len(rows), 1, 16))
    _, seen = DiT(config).apply(
        {"params": params}, x, flow.timestep(rows), text, capture_intermediates=True, mutable="intermediates"
    )
    (projected,) = seen["intermediates"]["time_projection"]["__call__"]
    expected = jnp.abs(jnp.diff(projected, axis=0)).sum(-1) / jnp.abs(projected[:-1]).sum(-1)
    found = jax.jit(lambda rows: changes(Network(config), flow, {"dit": params}, rows))(rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


class Constant(NamedTuple):
    """A network that says the same of whatever it sees."""

    config: object = None

    def velocity(self, params, x, timestep, text, extra):
        return jnp.broadcast_to(params, x.shape)


SAID = jax.random.normal(jax.random.key(1), (3, 2, 2, 1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_does_not_change_may_be_used_again(name):
    generation = Generation(Constant(), flow, SAMPLERS[name], Looks())
    rows = jnp.asarray(zoo.levels("pyramid:lag=2", sigmas(5, 3.0), [1.0, 0.4, 1.0]))
    noise, told = jax.random.normal(jax.random.key(0), (1, 3, 2, 2, 1)), Told(None)
    plain = carry = generation.begin(noise, 0 * noise, rows)
    carry = *carry, jnp.full_like(noise, jnp.nan)
    for s in range(len(rows) - 1):
        # Where it is spared, what it would have said is no number.
        said = SAID if s % 3 == 0 else SAID * jnp.nan
        plain = generation.advance(SAID, told, 2.0, plain, rows[s : s + 2])
        carry = generation.cached(said, told, 2.0, carry, rows[s : s + 2], jnp.array(s % 3 == 0))
    assert np.array_equal(carry[0], plain[0]) and np.isfinite(plain[0]).all()


def test_without_it_the_program_of_a_step_has_no_choice():
    generation, x = Generation(Constant(), flow, unipc, Looks()), jnp.zeros((1, 3, 2, 2, 1))
    rows = jnp.array([[1.0] * 3, [0.5] * 3])
    inputs, carry = (SAID, Told(None), 2.0), generation.begin(x, x, rows)
    assert "cond[" not in str(jax.make_jaxpr(generation.advance)(*inputs, carry, rows))
    assert "cond[" in str(jax.make_jaxpr(generation.cached)(*inputs, (*carry, x), rows, jnp.array(True)))


@pytest.mark.thorough
def test_in_windows_and_for_two_experts(here, experts, capfd):  # noqa: F811
    """Where every step is a call, all is as without; else each expert begins by a call in every window."""
    flags = ["--model", str(experts), *LONG, "--steps", "8", "--schedule", "ad:lag=2"]
    request = parse([*flags, "--cache", "0.000001"])
    studio = Studio([request], Stages())
    plain, same, fast = (
        np.concatenate(list(studio.windows(dataclasses.replace(request, cache=cache), None)), 1)
        for cache in (0.0, request.cache, 50.0)
    )
    assert np.array_equal(plain, same) and not np.array_equal(plain, fast)
    assert np.array_equal(plain[:, :1], fast[:, :1]) and np.isfinite(fast).all()
    plans = {known: calls for known, calls in studio._plans.items() if known[2] == 50.0}
    assert {known[0] for known in plans} == {"dit_high", "dit_low"} and len(plans) == 4
    assert all(calls[0] for calls in plans.values()) and not all(calls.all() for calls in plans.values())
    said = capfd.readouterr().err
    for (name, *_), calls in plans.items():
        name = name.removeprefix("dit_")
        assert f"cache: {name} is called at {calls.sum()} of {len(calls)} steps" in said


def test_what_it_cannot_be_is_refused(here, model):  # noqa: F811
    for flags, said in (
        ("--cache -1", "--cache: -1.0 is out of range"),
        ("--cache 1 --length 3 --schedule rolling", "by a queue spares no steps"),
        ("--context-noise 1.5", "--context-noise: 1.5 is out of range; give a number from 0 to 1"),
        ("--context-noise 0.1,-2", "as the power"),
    ):
        with pytest.raises(Refusal, match=said):
            parse(["--model", str(model), *flags.split()])
    request = parse(["--model", str(model), "--cache", "0.1", "--context-noise", "0.5,2"])
    assert (request.cache, request.context_noise) == (0.1, (0.5, 2.0))


PROMPTS = (
    "a large yellow circle moves right and bounces on a cloudy navy background",
    "a small red square moves up",
    "a blue triangle moves left on a white background",
    "a large green circle moves down",
)


@pytest.fixture(scope="module")
def tiny():
    """Latents that the bundled model makes, and by how many calls; None for the program without a choice."""
    networks, params = checkpoint.load(TINY)
    tokens = byte_tokenizer([*PROMPTS, *[""] * len(PROMPTS)], networks.text.length)
    text, nothing = jnp.split(networks.read(params, *tokens), 2)
    generation = Generation(Network(networks.dit), flow, unipc, Looks(True))
    params, weights = {"dit": params["dit"]}, jax.tree.map(jnp.float32, Weights(3.0))
    told = jax.jit(generation.told)(params, (text, nothing))
    step, cached = jax.jit(generation.advance), jax.jit(generation.cached)
    noise = jax.random.normal(jax.random.key(0), (len(PROMPTS), 5, 8, 8, 16))

    def made(steps: int, threshold: float | None, settling: float = SETTLING) -> tuple[np.ndarray, int]:
        rows = zoo.levels("together", sigmas(steps, 3.0), [1.0] * 5)
        carry = generation.begin(noise, 0 * noise, jnp.asarray(rows))
        if threshold is None:
            for s in range(steps):
                carry = step(params, told, weights, carry, rows[s : s + 2])
            return np.asarray(carry[0]), steps
        change = jax.jit(generation.changes)(params, rows)
        calls, carry = plan(rows, np.asarray(change), threshold, settling), (*carry, jnp.zeros_like(noise))
        for s in range(steps):
            carry = cached(params, told, weights, carry, rows[s : s + 2], calls[s])
        return np.asarray(carry[0]), int(calls.sum())

    return made


@pytest.mark.thorough
def test_on_the_bundled_model_it_is_nearer_than_as_many_steps_and_nearer_the_less_it_spares(tiny):
    """Nearer to where steps lead that are many, 100; off from the 20 that it spares by 0.08 with 12 calls.

    That is asked of prompts of which 20 steps lead to the same video as 100: of one, two are near, and which
    of them it is says nothing of what was spared.
    """
    full, solution = tiny(20, None)[0], tiny(100, None)[0]
    assert np.array_equal(tiny(20, 0.0)[0], full)
    same = [i for i in range(len(PROMPTS)) if far(full[i], solution[i]) < 0.5]
    assert len(same) >= 3
    found = []
    for threshold, most in ((0.1, 16), (0.2, 12), (0.4, 10)):
        clips, calls = tiny(20, threshold)
        plain = far(tiny(calls, None)[0][same], solution[same])
        found.append((calls, far(clips, full), far(clips[same], solution[same]), plain))
        assert calls <= most and found[-1][2] < plain, (threshold, found)
    assert found[1][1] < 0.08
    calls, off, *_ = map(list, zip(*found, strict=True))
    assert calls == sorted(calls, reverse=True) and off == sorted(off), found
