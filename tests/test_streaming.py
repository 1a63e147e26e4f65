"""Clips piece by piece, over devices, and in tiles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from fvdm_jax import sharding
from fvdm_jax.models import streaming, vae
from fvdm_jax.models.streaming import Stream, Tiles, decode_tiled

# Two halvings of the frame, of which one halves time.
CONFIG = vae.VAEConfig(4, 4, 4, (0.0,) * 4, (1.0,) * 4, (1, 2, 2), (False, True), blocks=1, shortcuts=True)


def assert_near(found, expected) -> None:
    """Equal up to the rounding of float32, in units of the largest value."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.tree.map(jnp.asarray, small.drawn(vae.abstract(CONFIG)))


@pytest.fixture(scope="module")
def latents() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (1, 3, 4, 32, 4))


@pytest.fixture(scope="module")
def whole(params, latents) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, x: streaming.decode(CONFIG, p, x))(params, latents))


def test_frames_come_piece_by_piece(params, latents, whole):
    pieces = list(Stream(CONFIG, "decode", params, latents[:, :1])(latents))
    assert [piece.shape[1] for piece in pieces] == [1, 2, 2]
    assert_near(np.concatenate(pieces, axis=1), whole)


def test_latents_come_piece_by_piece(params, whole):
    clip = np.clip(whole, -1, 1)
    pieces = list(Stream(CONFIG, "encode", params, jnp.asarray(clip[:, :1]))(clip))
    assert [piece.shape[1] for piece in pieces] == [1, 1, 1]
    expected = jax.jit(lambda p, x: vae.VAE(CONFIG).apply({"params": p}, x, method="encode"))(params, clip)
    assert_near(np.concatenate(pieces, axis=1), expected)


def test_pieces_may_be_longer_than_a_latent_frame(params, latents, whole):
    decode = jax.jit(partial(streaming.piece, CONFIG, "decode"))
    first, memory = decode(params, latents[:, :2])
    rest, _ = decode(params, latents[:, 2:], memory)
    assert_near(np.concatenate([first, rest], axis=1), whole)


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_clip(params):
    """By the compiler's account of everything but the clip itself."""

    def temporary(method: str, x) -> int:
        program = jax.jit(lambda p, x: getattr(streaming, method)(CONFIG, p, x)).lower(params, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    for method, frame, each in (("encode", (16, 16, 3), 2), ("decode", (4, 4, 4), 1)):
        short, long = (temporary(method, jnp.zeros((1, 1 + n * each, *frame))) for n in (2, 40))
        clip = 4 * 81 * 16 * 16 * 3
        assert long < short + 2 * clip, (method, short, long)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_eight_devices_say_the_same(params, latents, whole, method):
    over = sharding.mesh(context=8)
    clip = jnp.asarray(np.clip(whole, -1, 1)) if method == "encode" else latents
    run = jax.jit(lambda p, x: getattr(streaming, method)(CONFIG, p, x))
    spread = run(
        jax.device_put(params, sharding.replicated(over)), jax.device_put(clip, sharding.spatial(over))
    )
    assert spread.addressable_shards[0].data.shape[3] == spread.shape[3] // 8
    assert_near(np.asarray(spread), run(params, clip))


@pytest.mark.thorough
def test_a_decoder_over_devices_is_compiled_once(params, latents, whole):
    over = sharding.mesh(context=4)
    decoder = Stream(
        CONFIG,
        "decode",
        jax.device_put(params, sharding.replicated(over)),
        jax.device_put(latents[:, :1], sharding.spatial(over)),
    )
    pieces = list(decoder(latents))
    assert_near(np.concatenate(pieces, axis=1), whole)


def test_one_tile_is_the_frame(params, latents, whole):
    decoder = Stream(CONFIG, "decode", params, latents[:, :1])
    pieces = list(decode_tiled(decoder, np.asarray(latents), Tiles(1, 1), CONFIG))
    assert_near(np.concatenate(pieces, axis=1), whole)


@pytest.mark.thorough
def test_tiles_differ_from_the_frame_only_about_their_seam(params, latents):
    """Without the attention in the middle, by which every tile lacks something everywhere."""
    blind = dict(
        params["decoder"]["middle"],
        attention=jax.tree.map(jnp.zeros_like, params["decoder"]["middle"]["attention"]),
    )
    params = dict(params, decoder=dict(params["decoder"], middle=blind))
    whole = jax.jit(lambda p, x: streaming.decode(CONFIG, p, x))(params, latents)
    tiles = Tiles(1, 1).finer(*latents.shape[2:4])
    assert tiles == (1, 2) and tiles.sides(4, 32) == (4, 20)
    decoder = Stream(CONFIG, "decode", params, latents[:, :1, :, :20])
    pieces = list(decode_tiled(decoder, np.asarray(latents), tiles, CONFIG))
    assert [piece.shape for piece in pieces] == [(1, n, 16, 128, 3) for n in (1, 2, 2)]
    difference = np.abs(np.concatenate(pieces, axis=1) - whole).mean((0, 1, 2, 4))
    assert max(difference[:32].max(), difference[-32:].max()) < 1e-5
    assert 1e-4 < difference.max() < 0.1 * np.abs(whole).mean()


def test_a_mesh_needs_its_devices():
    with pytest.raises(ValueError, match="has 16 devices, and there are 8"):
        sharding.mesh(context=16)
    assert sharding.across(104).shape["context"] == 8 and sharding.across(20).shape["context"] == 2
