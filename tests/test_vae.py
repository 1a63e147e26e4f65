import dataclasses
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from convert import convert, wan
from fvdm_jax.models import streaming
from fvdm_jax.models.vae import SIZES, VAE, VAEConfig, abstract, average_down, copy_up

FOLDER = Path(__file__).parent / "golden"
# A config of each published VAE, narrow, with the outputs of Wan's own code.
GOLDENS = {
    "wan_2_1": (
        dataclasses.replace(SIZES["wan_2_1"], width=6, decoder_width=6),
        np.load(FOLDER / "vae21.npz"),
    ),
    "wan_2_2": (
        dataclasses.replace(SIZES["wan_2_2"], width=6, decoder_width=8),
        np.load(FOLDER / "vae22.npz"),
    ),
}
WAYS = {
    "whole": lambda config, params, x, method: VAE(config).apply({"params": params}, x, method=method),
    "streamed": lambda config, params, x, method: getattr(streaming, method)(config, params, x),
}


class Golden:
    """A VAE with the weights of a golden; its inputs and outputs in our layout."""

    def __init__(self, name: str):
        self.config, self._arrays = GOLDENS[name]
        weights = {key[2:]: self._arrays[key] for key in self._arrays if key.startswith("w/")}
        self.params = jax.tree.map(jnp.asarray, convert(wan.vae(self.config), weights))

        def run(params, x, way, method):
            return WAYS[way](self.config, params, x, method)

        # Streamed programs hold two bodies; LLVM's optimiser would take a third of this file's time on them.
        quick = {"xla_backend_optimization_level": 0}
        self._run = {
            way: jax.jit(partial(run, way=way), static_argnames="method", compiler_options=options)
            for way, options in (("whole", None), ("streamed", quick))
        }

    def __getitem__(self, key: str) -> jax.Array:
        return jnp.asarray(rearrange(self._arrays[key], "b c t h w -> b t h w c"))

    def encode(self, x, way="whole"):
        return self._run[way](self.params, x, method="encode")

    def decode(self, x, way="whole"):
        return self._run[way](self.params, x, method="decode")


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.mark.parametrize("name", GOLDENS)
def test_the_published_normalisation(name):
    arrays = GOLDENS[name][1]
    assert np.array_equal(np.float32(SIZES[name].mean), arrays["const/mean"])
    assert np.array_equal(np.float32(SIZES[name].std), arrays["const/std"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frames", [1, 5, pytest.param(9, marks=pytest.mark.thorough)])
def test_latents_and_reconstructions_are_wans(golden, frames, way):
    latents = golden.encode(golden[f"in/video_T{frames}"], way)
    np.testing.assert_allclose(latents, golden[f"out/mu_norm_T{frames}"], rtol=0, atol=1e-5)
    pixels = golden.decode(golden[f"out/mu_norm_T{frames}"], way)
    np.testing.assert_allclose(pixels, golden[f"out/dec_T{frames}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["whole", pytest.param("streamed", marks=pytest.mark.thorough)])
def test_no_frame_sees_a_later_one(golden, way):
    clip = golden["in/video_T9"]
    latents = golden.encode(clip, way)
    assert np.array_equal(latents[:, :2], golden.encode(clip.at[:, 5:].set(0.3), way)[:, :2])
    pixels = golden.decode(latents, way)
    assert np.array_equal(pixels[:, :5], golden.decode(latents.at[:, 2:].set(1.0), way)[:, :5])


def test_the_first_frame_is_an_image(golden):
    """A clip's first latent frame is that of its first picture alone, so an image can be kept as frame 0."""
    clip = golden["in/video_T9"]
    np.testing.assert_allclose(golden.encode(clip)[:, :1], golden.encode(clip[:, :1]), rtol=0, atol=1e-5)


@pytest.mark.thorough
def test_bfloat16_is_near(golden):
    """Relative L2 of latents and pixels; Wan's own networks in bfloat16 are about 1e-2 from float32."""
    for method, key in (("encode", "in/video_T9"), ("decode", "out/mu_norm_T9")):
        exact = getattr(golden, method)(golden[key])
        config = dataclasses.replace(golden.config, dtype="bfloat16")
        rounded = jax.jit(lambda x, c=config, m=method: WAYS["streamed"](c, golden.params, x, m))(golden[key])
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 3e-2


@pytest.mark.parametrize(("name", "count"), [("wan_2_1", 126_892_531), ("wan_2_2", 704_688_668)])
def test_the_published_sizes_have_their_numbers_of_parameters(name, count):
    tree = nn.meta.unbox(abstract(SIZES[name]))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count


@pytest.mark.parametrize("frames", [1, 5])
def test_a_vae_with_shortcuts_begins_on_any_clip(frames):
    config = VAEConfig(4, 4, 4, (0.0,) * 4, (1.0,) * 4, (1, 2, 2), (True, True), 1, 2, True)
    shapes = jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, frames, 16, 16, 3)))
    other = jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, 9, 16, 16, 3)))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.shape == b.shape, nn.meta.unbox(shapes), nn.meta.unbox(other))
    )


def test_the_shortcuts_of_the_2_2_vae_are_wans():
    golden = GOLDENS["wan_2_2"][1]
    down, up = (rearrange(golden[f"op/{part}_in"], "b c t h w -> b t h w c") for part in ("avgdown", "dupup"))
    ours = {
        "avgdown_6to12_t2_s2": average_down(down, 12, 2, 2),
        "avgdown_6to6_t1_s2": average_down(down, 6, 1, 2),
        "dupup_8to8_t2_s2_first": copy_up(up, 8, 2, 2),
        "dupup_8to4_t1_s2": copy_up(up, 4, 1, 2),
    }
    # A piece that is not the clip's first has no frame too many.
    ours["dupup_8to8_t2_s2"] = copy_up(up, 8, 2, 2, begun=True)
    for name, out in ours.items():
        expected = rearrange(golden[f"op/{name}"], "b c t h w -> b t h w c")
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6, err_msg=name)
