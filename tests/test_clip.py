"""CLIP's image tower against Wan2.1's, and the pixels that it is shown against torch's."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from convert import convert, wan
from fvdm_jax.models.clip import CLIPConfig, ImageEncoder, abstract, cubic_weights, preprocess

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "clip.npz"))
CONFIG = CLIPConfig(image=28, width=64, heads=4, ffn=256, layers=4, dtype="float32")
WEIGHTS = {f"visual.{key[2:]}": GOLDEN[key] for key in GOLDEN if key.startswith("w/")}
IMAGE, PIXELS = (
    jnp.asarray(rearrange(GOLDEN[key], "b c h w -> b h w c")) for key in ("in/image_pm1", "mid/pixel_values")
)


def encode(pixels: jax.Array, dtype: str = "float32") -> jax.Array:
    model = ImageEncoder(dataclasses.replace(CONFIG, dtype=dtype))
    return jax.jit(model.apply)({"params": convert(wan.clip(CONFIG), WEIGHTS)}, pixels)


def test_pixels_are_wans():
    # Measured: 1.3e-6. Positions that are not rounded as torch's miss by 1.6e-5, jax.image.resize by 0.36.
    np.testing.assert_allclose(preprocess(IMAGE, CONFIG.image), PIXELS, rtol=0, atol=5e-6)


def test_an_image_of_the_right_size_is_not_resized():
    assert np.array_equal(cubic_weights(9, 9), np.eye(9))


@pytest.mark.parametrize("before", [1, 2, 480, 1920])
def test_a_plain_image_stays_plain_to_its_border(before):
    np.testing.assert_allclose(cubic_weights(before, 224).sum(1), 1, rtol=0, atol=1e-6)


def test_tokens_are_wans():
    # Measured on two processors: 4.3e-6 and 5.1e-6 from Wan's pixels, 5.0e-6 and 5.2e-6 from ours, 8.6e-7 of
    # their length; the tokens reach 5.3, and in float64 they lie 3.0e-6 from ours and 3.5e-6 from Wan's.
    for pixels in (PIXELS, preprocess(IMAGE, CONFIG.image)):
        tokens, wans = encode(pixels), GOLDEN["out/tokens"]
        np.testing.assert_allclose(tokens, wans, rtol=0, atol=1e-5)
        off = np.linalg.norm(tokens - wans) / np.linalg.norm(wans)
        assert off < 1.2e-6, off


def test_bfloat16_is_near_float32():
    exact, rounded = encode(PIXELS), encode(PIXELS, "bfloat16")
    assert rounded.dtype == jnp.float32
    # Rounding of bfloat16, 4e-3 a product, through three layers. Measured: 6.1e-3 of the length.
    assert 1e-3 < jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact) < 8e-3


def test_the_published_size_has_its_number_of_parameters():
    """The published file's tensors, less its text tower, last block, last norm and head."""
    tree = nn.meta.unbox(abstract(CLIPConfig()))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 611_086_080
    assert tree["positions"].shape == (257, 1280) and tree["layers"]["qkv"]["kernel"].shape[0] == 31


def test_the_rest_of_the_file_is_left_out_and_nothing_else():
    rest = {
        key: np.zeros(1, np.float32) for key in ("log_scale", "textual.head.0.weight", "textual.norm.bias")
    }
    tree = convert(wan.clip(CONFIG), WEIGHTS | rest)
    ours = nn.meta.unbox(abstract(CONFIG))
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, ours)
    with pytest.raises(KeyError, match=r"tensors without a rule: \['visual.odd'\]"):
        convert(wan.clip(CONFIG), WEIGHTS | {"visual.odd": np.zeros(1, np.float32)})


def test_every_parameter_names_its_axes():
    for leaf in jax.tree.leaves(
        abstract(CONFIG), is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    ):
        assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == leaf.value.ndim
