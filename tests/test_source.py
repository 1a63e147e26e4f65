"""The procedural world: what a caption says is what its clip shows."""

import jax
import numpy as np
import pytest

from fvdm_jax.data import source
from fvdm_jax.data.textures import textures

FRAMES, SIDE = 33, 64


@pytest.fixture(scope="module")
def world():
    scenes = source.scenes(0, range(48))
    return scenes, draw(scenes, FRAMES, SIDE)


def draw(scenes: source.Scene, frames: int, side: int) -> np.ndarray:
    """The scenes' clips [b t H W 3]."""
    return np.asarray(jax.jit(source.moving_shapes, static_argnums=(1, 2, 3))(scenes, frames, side, side))


def painted(video: np.ndarray, colour: str) -> np.ndarray:
    """Where a clip [t H W 3] has a colour."""
    distance = np.abs((video + 1) / 2 - np.array(source.COLOURS[colour])).max(-1)
    return distance < 0.05


def centre(where: np.ndarray) -> np.ndarray:
    """Mean position (x, y) of each frame, 0 … 1."""
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    area = where.sum((1, 2))
    return np.stack([(where * x).sum((1, 2)) / area, (where * y).sum((1, 2)) / area], -1)


def spoken(words: dict, caption: list[str]) -> str:
    """Which of the words, of which one may be left unsaid, a caption says."""
    return next((word for word in words if word in caption), "")


def test_clips_are_pictures(world):
    _, clips = world
    assert clips.shape == (48, FRAMES, SIDE, SIDE, 3) and clips.min() >= -1 and clips.max() <= 1


def test_the_shape_has_its_colour_moves_its_way_at_its_speed(world):
    scenes, clips = world
    seen = 0
    for i, clip in enumerate(clips):
        words = source.caption(scenes, i).split()
        where = painted(clip, spoken(source.COLOURS, words))
        if "bounces" in words or "triangle" in words:
            continue
        moved = centre(where)[-1] - centre(where)[0]
        speed = source.SPEEDS[spoken(source.SPEEDS, words)]
        towards = np.array(source.DIRECTIONS[spoken(source.DIRECTIONS, words)])
        np.testing.assert_allclose(moved, speed * towards, atol=0.01)
        seen += 1
    assert seen >= 8


def test_a_bounce_is_said_and_seen(world):
    scenes, clips = world
    missed = []
    for i, clip in enumerate(clips):
        middle = centre(painted(clip, list(source.COLOURS)[scenes.colour[i, 0]]))
        missed.append(np.abs(middle[-1] - middle[0] - source.velocity(scenes)[i, 0]).max())
    said = ["bounces" in source.caption(scenes, i) for i in range(48)]
    assert 5 < sum(said) < 40
    # Of where it would have come on a straight line; what just touches the edge is hardly turned.
    assert np.mean((np.array(missed) > 0.01) == said) > 0.95


def test_shapes_stay_within_the_frame(world):
    scenes, clips = world
    radius = np.array(list(source.SIZES.values()))[scenes.size[:, 0]]
    for i, clip in enumerate(clips):
        middle = centre(painted(clip, list(source.COLOURS)[scenes.colour[i, 0]]))
        assert np.all((middle > radius[i] - 0.06) & (middle < 1.06 - radius[i]))


def test_a_clip_depends_on_seed_and_index_alone():
    several = source.scenes(5, range(8))
    alone = source.scenes(5, [6])
    assert all(np.array_equal(a[6:7], b) for a, b in zip(several, alone, strict=True))
    clips = draw(several, 5, 32)
    np.testing.assert_allclose(clips[6:7], draw(alone, 5, 32), atol=1e-5)
    assert np.abs(clips[:1] - draw(source.scenes(6, [0]), 5, 32)).max() > 0.1


def test_a_longer_clip_goes_on():
    scenes = source.scenes(5, range(4))
    np.testing.assert_allclose(draw(scenes, 65, 32)[:, :33], draw(scenes, 33, 32), atol=1e-5)


def test_of_two_shapes_one_passes_before_the_other():
    scenes = source.scenes(1, range(100), pairs=1.0)
    clips = draw(scenes, 9, SIDE)
    assert scenes.pair.all()
    hidden = 0
    for i, clip in enumerate(clips):
        front, behind = (list(source.COLOURS)[c] for c in scenes.colour[i])
        caption = source.caption(scenes, i)
        assert caption.index(front) < caption.index("before") < caption.index(behind)
        areas = [painted(clip, colour).sum((1, 2)) for colour in (front, behind)]
        assert areas[0].min() > 0.8 * areas[0].max() - 10
        hidden += areas[1].min() < 0.7 * areas[1].max() - 10
    assert hidden > 10


def test_a_caption_may_leave_out_the_background():
    scenes = source.scenes(0, range(1))
    full, short = (source.caption(scenes, 0, full) for full in (True, False))
    assert full.startswith(short) and "background" in full and "background" not in short


def test_every_word_occurs_and_what_is_to_be_told_apart_is_apart():
    scenes = source.scenes(0, range(2000))
    said = {word for i in range(2000) for word in source.caption(scenes, i).split()}
    tables = (source.SHAPES, source.COLOURS, source.SIZES, source.DIRECTIONS, source.SPEEDS, source.TONES)
    assert {word for table in tables for word in table if word} <= said
    colours, tones = source.table(source.COLOURS), source.table(source.TONES)
    apart = np.linalg.norm(colours[scenes.colour[:, 0]] - tones[scenes.tone], axis=-1)
    assert apart.min() > source.CONTRAST


def test_textures_have_the_spectrum_of_photographs():
    """Power falls about as 1/frequency² over an octave and a half; white noise would stay level."""
    keys = jax.random.split(jax.random.key(0), 12)
    clips = np.asarray(jax.jit(jax.vmap(lambda key: textures(key, 1, 64, 64)))(keys)).mean(-1)[:, 0]
    power = np.mean(np.abs(np.fft.fft2(clips - clips.mean((1, 2), keepdims=True))) ** 2, 0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    low, high = (power[(frequency > f) & (frequency < 1.3 * f)].mean() for f in (0.05, 0.15))
    slope = np.log(low / high) / np.log(3)
    assert 1.5 < slope < 3.5
