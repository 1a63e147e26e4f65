import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from convert import convert, wan
from fvdm_jax.models.vae import SIZES, VAE, VAEConfig, abstract, average_down, copy_up

GOLDEN = np.load(Path(__file__).parent / "golden" / "vae21.npz")
WAN = SIZES["wan_2_1"]
CONFIG = dataclasses.replace(WAN, width=6, decoder_width=6)


@pytest.fixture(scope="module")
def params() -> dict:
    return convert(wan.vae(CONFIG), {key[2:]: GOLDEN[key] for key in GOLDEN if key.startswith("w/")})


@pytest.fixture(scope="module")
def run(params):
    return {
        method: jax.jit(lambda x, method=method: VAE(CONFIG).apply({"params": params}, x, method=method))
        for method in ("encode", "decode")
    }


def ours(key: str) -> jax.Array:
    return jnp.asarray(rearrange(GOLDEN[key], "b c t h w -> b t h w c"))


def test_the_published_normalisation():
    assert np.array_equal(np.float32(WAN.mean), GOLDEN["const/mean"])
    assert np.array_equal(np.float32(WAN.std), GOLDEN["const/std"])


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_latents_and_reconstructions_are_wans(run, frames):
    latents = run["encode"](ours(f"in/video_T{frames}"))
    np.testing.assert_allclose(latents, ours(f"out/mu_norm_T{frames}"), rtol=0, atol=1e-5)
    pixels = run["decode"](ours(f"out/mu_norm_T{frames}"))
    np.testing.assert_allclose(pixels, ours(f"out/dec_T{frames}"), rtol=0, atol=1e-5)


def test_no_frame_sees_a_later_one(run):
    clip = ours("in/video_T9")
    changed = clip.at[:, 5:].set(0.3)
    assert np.array_equal(run["encode"](clip)[:, :2], run["encode"](changed)[:, :2])
    latents = run["encode"](clip)
    assert np.array_equal(run["decode"](latents)[:, :5], run["decode"](latents.at[:, 2:].set(1.0))[:, :5])


def test_the_first_frame_is_an_image(run):
    """A clip's first latent frame is that of its first picture alone, so an image can be kept as frame 0."""
    clip = ours("in/video_T9")
    np.testing.assert_allclose(run["encode"](clip)[:, :1], run["encode"](clip[:, :1]), rtol=0, atol=1e-5)


def test_the_published_size_has_its_number_of_parameters():
    tree = nn.meta.unbox(abstract(WAN))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 126_892_531


@pytest.mark.parametrize("frames", [1, 5])
def test_a_vae_with_shortcuts_begins_on_any_clip(frames):
    config = VAEConfig(4, 4, 4, (0.0,) * 4, (1.0,) * 4, (1, 2, 2), (True, True), 1, 2, True)
    shapes = jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, frames, 16, 16, 3)))
    other = jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, 9, 16, 16, 3)))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.shape == b.shape, nn.meta.unbox(shapes), nn.meta.unbox(other))
    )


def test_the_shortcuts_of_the_2_2_vae_are_wans():
    golden = np.load(Path(__file__).parent / "golden" / "vae22_umt5.npz")
    assert np.array_equal(np.float32(SIZES["wan_2_2"].mean), golden["const/mean"])
    assert np.array_equal(np.float32(SIZES["wan_2_2"].std), golden["const/std"])
    down, up = (rearrange(golden[f"op/{part}_in"], "b c t h w -> b t h w c") for part in ("avgdown", "dupup"))
    ours = {
        "avgdown_6to12_t2_s2": average_down(down, 12, 2, 2),
        "avgdown_6to6_t1_s2": average_down(down, 6, 1, 2),
        "dupup_8to8_t2_s2_first": copy_up(up, 8, 2, 2),
        "dupup_8to4_t1_s2": copy_up(up, 4, 1, 2),
    }
    for name, out in ours.items():
        expected = rearrange(golden[f"op/{name}"], "b c t h w -> b t h w c")
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6, err_msg=name)
