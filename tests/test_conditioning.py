"""What Wan's own image-to-video networks are shown, and that the sampler hands it on."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import test_clip
from einops import rearrange
from test_dit import Reference

from convert import convert, wan
from fvdm_jax import checkpoint, conditioning, samplers, sampling, sharding
from fvdm_jax.guidance import Generation, Looks, Told, steered
from fvdm_jax.lora import Network
from fvdm_jax.models.dit import DiTConfig, Extra
from fvdm_jax.process import flow
from fvdm_jax.program import Refusal
from fvdm_jax.samplers import euler

MASKS = np.load(Path(__file__).parent / "golden" / "masks.npz")
TOWER = convert(wan.clip(test_clip.CONFIG), test_clip.WEIGHTS)
RED = np.stack([np.ones((2, 2)), -np.ones((2, 2)), -np.ones((2, 2))], -1).astype(np.float32)


@pytest.mark.parametrize(
    "name, frames, at",
    [("i2v_mask_F9_4x6", 9, [0]), ("i2v_mask_F81_2x2", 81, [0]), ("flf_mask_F81_4x6", 81, [0, -1])],
)
def test_masks_are_wans_and_come_before_the_latents(name, frames, at):
    golden = rearrange(MASKS[name], "m f h w -> 1 f h w m")
    given = conditioning.given(dict.fromkeys(at, RED), frames)
    latents = jax.random.normal(jax.random.key(0), (2, *golden.shape[1:4], 16))
    made = conditioning.channels(latents, given)
    assert made.shape[-1] == 20 and made.dtype == jnp.float32
    assert np.array_equal(made[..., :4], np.concatenate([golden] * 2))
    assert np.array_equal(made[..., 4:], latents)


def test_pictures_lie_in_an_empty_clip():
    pictures = {0: RED, -2: np.stack([RED, -RED]), 3: 0.5 * RED}
    made, given = conditioning.canvas(pictures, 9, (2, 2)), conditioning.given(pictures, 9)
    assert made.shape == (1, 9, 2, 2, 3) and made.dtype == np.float32
    assert np.flatnonzero(given).tolist() == [0, 3, 7, 8] and not made[0, ~given].any()
    assert np.array_equal(made[0, given], [RED, 0.5 * RED, RED, -RED])


@pytest.mark.parametrize(
    "build, what",
    [
        (lambda: conditioning.canvas({0: RED}, 9, (2, 4)), r"picture is \(2, 2, 3\); give \(2, 4, 3\)"),
        (lambda: conditioning.canvas({8: np.stack([RED] * 2)}, 9, (2, 2)), "2 frames from 8 on do not fit"),
        (lambda: conditioning.canvas({-10: RED}, 9, (2, 2)), "1 frames from -10 on do not fit"),
        (lambda: conditioning.canvas({0: np.uint8(RED > 0)}, 9, (2, 2)), "is of uint8; give floats"),
        (lambda: conditioning.mask(np.ones(8, bool)), r"give \[t\] of 1 \+ 4n"),
        (lambda: conditioning.channels(jnp.zeros((1, 3, 2, 2, 4)), np.ones(5, bool)), "3 frames, .* of 2"),
        (lambda: conditioning.image_tokens(test_clip.CONFIG, TOWER, []), "there is no picture"),
        (lambda: conditioning.image_tokens(test_clip.CONFIG, TOWER, [RED[None]]), r"give \[H W 3\]"),
    ],
)
def test_what_does_not_fit_is_said(build, what):
    with pytest.raises(ValueError, match=what):
        build()


def test_tokens_of_pictures_are_wans_and_are_joined():
    picture, part = test_clip.IMAGE[0], test_clip.IMAGE[0, :30]
    run = jax.jit(partial(conditioning.image_tokens, test_clip.CONFIG))
    both, alone = run(TOWER, [picture, part]), run(TOWER, [part])
    assert both.shape == (1, 10, 64)
    # As in test_clip: measured 5.0e-6, of tokens that reach 5.3.
    np.testing.assert_allclose(both[:, :5], test_clip.GOLDEN["out/tokens"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(both[:, 5:], alone, rtol=0, atol=1e-5)
    assert np.abs(both[:, :5] - alone).max() > 0.1


def step(looks: Looks, params, prompts, extra, scale, x, rows) -> tuple[Told, jax.Array]:
    """What is told, and the velocity by which one step of Euler over rows [2 f] moves x."""
    config, *_ = params
    generation = Generation(Network(config), flow, euler, looks)
    told = jax.jit(generation.told)({"dit": params[1]}, prompts, extra)
    moved = jax.jit(generation.advance)({"dit": params[1]}, told, scale, (x, ()), rows)[0]
    return told, (moved - x) / (rows[1] - rows[0])[:, None, None, None]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["dit_i2v", "dit_flf2v"])
def test_a_step_of_the_sampler_is_along_wans_velocity(name, guided):
    reference = Reference(name)
    level = reference.arrays["in/t"][0] / 1000
    rows = jnp.stack([jnp.full(3, level), jnp.full(3, level - 0.5)])
    prompts = reference.text, 0 * reference.text
    model = reference.config, reference.params
    _, made = step(Looks(guided), model, prompts, reference.extra, 1.0, reference.latents("in/x"), rows)
    assert small.far(made, reference.latents("out/wan21")) < 1e-5


def twice(reference: Reference) -> tuple[jax.Array, Extra]:
    """Two clips that differ in all that is given: x, and what is given beside the text."""
    x, extra = reference.latents("in/x"), reference.extra
    join = lambda leaf: jnp.concatenate([leaf, -jnp.roll(leaf, 1, 1)])  # noqa: E731
    return join(x), jax.tree.map(join, extra)


def test_every_row_of_guidance_is_given_the_same():
    reference = Reference("dit_i2v")
    (x, extra), text = twice(reference), jnp.concatenate([reference.text] * 2)
    negative, rows = 0.5 * text[:, ::-1], jnp.array([[0.9, 0.5, 0.2], [0.4, 0.0, 0.1]])
    network, params = Network(reference.config), {"dit": reference.params}
    told, made = step(Looks(), (reference.config, reference.params), (text, negative), extra, 3.0, x, rows)
    assert np.array_equal(told.channels, np.repeat(extra.channels, 2, 0))
    first, second = ((keys[:, ::2], keys[:, 1::2]) for keys in (told.prompt.image.k, told.prompt.text.k))
    assert np.array_equal(*first) and not np.array_equal(*second)
    run, levels = jax.jit(network.velocity), jnp.stack([1000 * rows[0]] * 2)
    with_text, without = (run(params, x, levels, each, extra) for each in (text, negative))
    assert small.far(made, without + 3.0 * (with_text - without)) < 1e-5
    assert small.far(made, run(params, x, levels, negative, extra)) > 1e-2
    many = jax.eval_shape(
        Generation(network, flow, euler, Looks(True, 2)).told, params, (text, negative), extra
    )
    assert many.channels.shape[0] == 10 == many.prompt.image.k.shape[1]


def test_over_a_mesh_the_step_is_that_of_one_device():
    reference = Reference("dit_flf2v")
    prompts, rows = (reference.text, 0 * reference.text), jnp.array([[0.9] * 3, [0.5] * 3])
    x, model = reference.latents("in/x"), (reference.config, reference.params)
    _, alone = step(Looks(), model, prompts, reference.extra, 3.0, x, rows)
    over = sharding.mesh(data=2, context=2, tensor=2)
    params = sampling.placed(over, {"dit": reference.params}, reference.config)
    inputs = prompts, reference.extra, (x, ()), rows
    prompts, extra, carry, rows = jax.device_put(inputs, sharding.replicated(over))
    with jax.set_mesh(over):
        made = sampling.programs(Generation(Network(reference.config), flow, euler), over)
        told = made.told(params, prompts, extra)
        moved = made.advance(params, told, 3.0, carry, rows)[0]
    assert told.channels.addressable_shards[0].data.shape[0] == 1 == told.channels.shape[0] // 2
    assert moved.sharding.is_fully_replicated
    assert small.far((moved - carry[0]) / -0.4, alone) < 1e-5


def test_without_extras_the_programs_are_as_they_were():
    config, rows = small.NETWORKS.dit, jnp.array([[1.0, 0.5], [0.5, 0.0]])
    params = {"dit": small.drawn(checkpoint.KINDS["dit"][1](config))}
    network, prompts = Network(config), (jnp.ones((1, 5, 16)), jnp.zeros((1, 5, 16)))
    x, generation = jnp.ones((1, 2, 4, 4, 4)), Generation(network, flow, euler)

    def told(params, prompts):
        return network.told(params, Looks().told(*prompts))

    def advance(params, prompt, scale, carry, rows):
        ask = lambda x, timestep: network.velocity(params, x, timestep, prompt)  # noqa: E731
        return samplers.advance(flow, steered(flow, ask, scale, Looks()), euler, carry, rows)

    prompt = jax.eval_shape(told, params, prompts)
    bundle = jax.eval_shape(generation.told, params, prompts)
    assert bundle == Told(prompt, None)
    after = 3.0, (x, ()), rows
    before = jax.make_jaxpr(told)(params, prompts), jax.make_jaxpr(advance)(params, prompt, *after)
    now = (
        jax.make_jaxpr(generation.told)(params, prompts),
        jax.make_jaxpr(generation.advance)(params, bundle, *after),
    )
    assert list(map(str, before)) == list(map(str, now))


I2V, FLF2V = (Reference(name).config for name in ("dit_i2v", "dit_flf2v"))
CHANNELS, IMAGE = jnp.zeros((1, 3, 6, 8, 20)), jnp.zeros((1, 257, 40))


@pytest.mark.parametrize(
    "config, extra, what",
    [
        (I2V, Extra(), "takes 20 channels beside its own 16, and 0 came"),
        (I2V, Extra(CHANNELS[..., :16], IMAGE), "and 16 came"),
        (I2V, Extra(CHANNELS), "image tokens of width 40, and of 0 came"),
        (FLF2V, Extra(CHANNELS, IMAGE), "takes 514 image tokens, and 257 came"),
        (small.NETWORKS.dit, Extra(CHANNELS), "takes 0 channels"),
        (small.NETWORKS.dit, Extra(None, IMAGE), "of width 0, and of 40 came"),
    ],
)
def test_a_network_is_told_only_what_it_takes(config: DiTConfig, extra: Extra, what: str):
    with pytest.raises(ValueError, match=what):
        Generation(Network(config), flow, euler).told({}, (IMAGE, IMAGE), extra)


def test_clips_tower_is_a_part_that_not_every_model_has(tmp_path, model):
    plain = checkpoint.load(model)
    assert plain[0].clip is None and plain[1].keys() == {"dit", "vae", "text"}
    with pytest.raises(Refusal, match="does not describe clip"):
        checkpoint.load(model, ("clip",))
    networks = dataclasses.replace(plain[0], clip=test_clip.CONFIG)
    checkpoint.save(tmp_path, networks, plain[1] | {"clip": TOWER}, {"sampling": {}}, "float32")
    assert checkpoint.describe(tmp_path) == networks and not (model / "clip.safetensors").exists()
    found, params = checkpoint.load(tmp_path, ("clip",))
    assert found == networks and params.keys() == {"clip"}
    assert checkpoint.load(tmp_path)[1].keys() == {"dit", "vae", "text", "clip"}
    tokens = found.look(params, [test_clip.IMAGE[0]])
    np.testing.assert_allclose(tokens, test_clip.GOLDEN["out/tokens"], rtol=0, atol=1e-5)
