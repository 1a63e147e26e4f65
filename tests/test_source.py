"""The procedural world: what a caption says is what its clip shows."""

import jax
import numpy as np
import pytest

from fvdm_jax.data import source

FRAMES, SIDE = 17, 64


@pytest.fixture(scope="module")
def world():
    scenes = source.scenes(np.random.default_rng(0), 48)
    return scenes, np.asarray(source.moving_shapes(scenes, FRAMES, SIDE, SIDE))


def painted(video: np.ndarray, colour: str) -> np.ndarray:
    """Where a clip [t H W 3] has a colour."""
    distance = np.abs((video + 1) / 2 - np.array(source.COLOURS[colour])).max(-1)
    return distance < 0.05


def centre(where: np.ndarray) -> np.ndarray:
    """Mean position (x, y) of each frame, 0 … 1."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    area = where.sum((1, 2))
    return np.stack([(where * x).sum((1, 2)) / area, (where * y).sum((1, 2)) / area], -1)


def test_clips_are_pictures(world):
    _, clips = world
    assert clips.shape == (48, FRAMES, SIDE, SIDE, 3) and clips.min() >= -1 and clips.max() <= 1


def test_the_shape_has_its_colour_moves_its_way_at_its_speed(world):
    scenes, clips = world
    seen = 0
    for i, clip in enumerate(clips):
        words = source.caption(scenes, i).split()
        (colour,) = set(words) & set(source.COLOURS)
        (direction,) = set(words) & set(source.DIRECTIONS)
        where = painted(clip, colour)
        if "bounces" in words or where.sum((1, 2)).min() < 20 or "checkered" in words or "cloudy" in words:
            continue
        moved = centre(where)[-1] - centre(where)[0]
        speed = source.SPEEDS["fast" if "fast" in words else "slowly" if "slowly" in words else ""]
        np.testing.assert_allclose(moved, speed * np.array(source.DIRECTIONS[direction]), atol=0.05)
        seen += 1
    assert seen >= 8


def test_a_bounce_is_said_and_seen(world):
    scenes, clips = world
    said = [i for i in range(48) if "bounces" in source.caption(scenes, i)]
    assert 5 < len(said) < 40
    turned = 0
    for i in said:
        colour = list(source.COLOURS)[scenes.colour[i]]
        where = painted(clips[i], colour)
        if where.sum((1, 2)).min() > 20:
            steps = np.diff(centre(where), axis=0)
            turned += bool(((steps[1:] * steps[:-1]).sum(-1) < 0).any())
    assert turned >= 3


def test_a_clip_depends_on_its_seed_alone():
    one, two = (source.scenes(np.random.default_rng(5), 3) for _ in range(2))
    assert np.array_equal(source.moving_shapes(one, 3, 32, 32), source.moving_shapes(two, 3, 32, 32))
    assert [source.caption(one, i) for i in range(3)] == [source.caption(two, i) for i in range(3)]
    other = source.scenes(np.random.default_rng(6), 3)
    assert not np.array_equal(source.moving_shapes(one, 3, 32, 32), source.moving_shapes(other, 3, 32, 32))


def test_a_caption_may_leave_out_the_background():
    scenes = source.scenes(np.random.default_rng(0), 1)
    full, short = (source.caption(scenes, 0, full) for full in (True, False))
    assert full.startswith(short) and "background" in full and "background" not in short


def test_every_word_occurs():
    scenes = source.scenes(np.random.default_rng(0), 2000)
    said = {word for i in range(2000) for word in source.caption(scenes, i).split()}
    tables = (source.SHAPES, source.COLOURS, source.SIZES, source.DIRECTIONS, source.SPEEDS, source.TONES)
    assert {word for table in tables for word in table if word} <= said


def test_textures_have_the_spectrum_of_photographs():
    """Power falls about as 1/frequency² over an octave and a half; white noise would stay level."""
    keys = jax.random.split(jax.random.key(0), 12)
    clips = np.asarray(jax.vmap(lambda key: source.textures(key, 1, 64, 64))(keys)).mean(-1)[:, 0]
    power = np.mean(np.abs(np.fft.fft2(clips - clips.mean((1, 2), keepdims=True))) ** 2, 0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    low, high = (power[(frequency > f) & (frequency < 1.3 * f)].mean() for f in (0.05, 0.15))
    slope = np.log(low / high) / np.log(3)
    assert 1.5 < slope < 3.5
