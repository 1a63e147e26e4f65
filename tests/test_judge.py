"""The judge sees what is true of true clips, blurred and noisy or not, and what is wrong with wrong ones."""

import jax
import numpy as np
import pytest

from fvdm_jax import judge
from fvdm_jax.data import source

COUNT, BATCH, FRAMES, SIDE = 200, 40, 33, 64
WRONG = range(24)
"""The clips that are spoiled on purpose."""


draw = jax.jit(source.moving_shapes, static_argnums=(1, 2, 3))


def drawn(scenes: source.Scene, frames: int = FRAMES, batch: int = BATCH) -> np.ndarray:
    """The clips of a whole number of batches; in batches, so that it is compiled once."""
    batches = [range(k, k + batch) for k in range(0, len(scenes.tone), batch)]
    return np.concatenate([draw(some(scenes, b), frames, SIDE, SIDE) for b in batches])


def some(scenes: source.Scene, which) -> source.Scene:
    return source.Scene(*(np.asarray(field)[which] for field in scenes))


def blurred(clip: np.ndarray, seed: int, noise: float = 0.04) -> np.ndarray:
    """A clip [t H W 3] as a lossy autoencoder might give it back; noise of 0.04 of white (28 dB)."""
    for axis in (1, 2, 1, 2):
        clip = np.swapaxes(clip, 0, axis)
        padded = np.concatenate([clip[:1], clip, clip[-1:]])
        clip = np.swapaxes((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4, 0, axis)
    noise = 2 * noise * np.random.default_rng(seed).standard_normal(clip.shape, np.float32)
    return np.clip(clip + noise, -1, 1)


def verdicts(clips, scenes: source.Scene, which=None) -> list[judge.Verdict]:
    which = range(len(clips)) if which is None else which
    return [judge.compare(judge.read(c), scenes, i) for c, i in zip(clips, which, strict=True)]


def share(found: list, *names: str) -> float:
    """Of how many verdicts all these are true."""
    return float(np.mean([all(getattr(v, n) for n in names) for v in found]))


@pytest.fixture(scope="module")
def world():
    scenes = source.scenes(7, range(COUNT))
    return scenes, drawn(scenes)


@pytest.fixture(scope="module")
def readings(world):
    return [judge.read(clip) for clip in world[1]]


@pytest.fixture(scope="module")
def long():
    scenes = source.scenes(8, range(12))
    return scenes, drawn(scenes, 65, batch=12)


@pytest.fixture(scope="module")
def pairs():
    scenes = source.scenes(11, range(40), pairs=1.0)
    return scenes, drawn(scenes)


def test_true_clips_are_what_their_scenes_say(world, readings):
    scenes, _ = world
    found = [judge.compare(r, scenes, i) for i, r in enumerate(readings)]
    shares = {name: share(found, name) for name in judge.Verdict._fields}
    assert min(shares.values()) >= 0.99, shares
    assert set(scenes.background) == {0, 1, 2, 3}


def test_at_a_wall_the_way_into_it_and_out_of_it_look_the_same(world, readings):
    """What is seen two pixels beside its place at a wall may seem to go into it first, for a frame."""
    scenes, _ = world
    begins = scenes.start[:, 0] - np.clip(scenes.start[:, 0], 0.28, 0.72)
    leaves = [
        i
        for i in range(COUNT)
        if readings[i].size == "large"
        and (begins[i] != 0).sum() == 1
        and (begins[i] * source.velocity(scenes)[i, 0]).sum() < 0
    ]
    assert len(leaves) > 5
    for i in leaves:
        path = readings[i].path
        into = path._replace(velocity=np.where(begins[i] != 0, -path.velocity, path.velocity))
        other = readings[i]._replace(path=into, direction="another")
        assert judge.compare(other, scenes, i).direction and judge.compare(readings[i], scenes, i).direction
        away = into._replace(start=np.full(2, 0.5))
        assert not judge.compare(readings[i]._replace(path=away), scenes, i).direction


def test_blur_and_noise_do_not_matter(world):
    scenes, clips = world
    which = range(0, COUNT, 3)
    found = verdicts([blurred(clips[i], i) for i in which], scenes, which)
    shares = {name: share(found, name) for name in judge.Verdict._fields}
    assert min(shares.values()) >= 0.97, shares


def test_places_and_speeds_are_measured_well(world, readings):
    scenes, _ = world
    for i in range(COUNT):
        # 0.6 of a pixel.
        place = np.linalg.norm(readings[i].centres[0] - scenes.start[i, 0])
        assert place < 0.01, (i, place)
        speed = np.linalg.norm(source.velocity(scenes)[i, 0])
        assert abs(readings[i].speed - speed) < 0.02 * speed, (i, readings[i].speed, speed)


def test_another_scene_agrees_by_chance_only(world, readings):
    scenes, _ = world
    found = [judge.compare(readings[i], scenes, (i + 1) % COUNT) for i in range(COUNT)]
    assert 0.13 < share(found, "shape") < 0.37
    assert 0.02 < share(found, "colour") < 0.24
    assert 0.04 < share(found, "direction") < 0.21
    assert share(found, "shape", "colour", "direction") < 0.03
    # These do not depend on what was asked.
    assert share(found, "possible", "smooth") >= 0.99


def test_a_frozen_clip_does_not_move(world):
    scenes, clips = world
    found = verdicts([np.repeat(clips[i, :1], FRAMES, 0) for i in WRONG], scenes)
    assert not any(v.direction or v.speed or v.all for v in found)
    assert share(found, "shape", "colour", "kept") >= 0.97


def test_frames_out_of_order_are_not_possible(world):
    scenes, clips = world
    rng = np.random.default_rng(0)

    def swapped(clip):
        k = rng.integers(FRAMES - 8)
        order = np.arange(FRAMES)
        order[[k, k + 8]] = order[[k + 8, k]]
        return clip[order]

    found = verdicts([swapped(clips[i]) for i in WRONG], scenes)
    assert share(found, "possible", "smooth") <= 0.05
    found = verdicts([rng.permutation(clips[i]) for i in WRONG], scenes)
    assert share(found, "possible") == 0


def test_backwards_is_another_direction(world):
    scenes, clips = world
    straight = [i for i in range(COUNT) if "bounces" not in source.caption(scenes, i)][: len(WRONG)]
    found = verdicts([clips[i, ::-1] for i in straight], scenes, straight)
    assert share(found, "direction") == 0
    assert share(found, "shape", "speed", "possible") >= 0.97


def test_another_colour_is_seen(world):
    scenes, clips = world
    # White and black stay what they are when the channels change places.
    coloured = [i for i in range(COUNT) if scenes.colour[i, 0] < 6][: len(WRONG)]
    found = verdicts([clips[i][..., [2, 0, 1]] for i in coloured], scenes, coloured)
    assert share(found, "colour") <= 0.1 and share(found, "kept") <= 0.1
    # Where the new colour is like none of the world's, there is no shape.
    assert share(found, "shape") >= 0.6


def test_noise_is_nothing():
    scenes = source.scenes(0, range(4))
    noise = np.random.default_rng(1).uniform(-1, 1, (4, FRAMES, SIDE, SIDE, 3)).astype(np.float32)
    for clip, v in zip(noise, verdicts(noise, scenes), strict=True):
        reading = judge.read(clip)
        words = reading.shape, reading.colour, reading.size, reading.direction
        assert words == (judge.NOTHING,) * 4 and reading.speed == 0
        assert not any((v.shape, v.colour, v.size, v.direction, v.speed, v.possible, v.kept))


def test_a_shape_that_vanishes_or_leaps_is_not_possible(world):
    scenes, clips = world
    plain = np.flatnonzero(scenes.background == 0)[:BATCH]
    gone = clips[plain].copy()
    gone[:, 17:] = 2 * source.table(source.TONES)[scenes.tone[plain], None, None, None] - 1
    for clip, i in zip(gone[:15], plain[:15], strict=True):
        reading = judge.read(clip)
        assert reading.present[:17].all() and not reading.present[17:].any()
        verdict = judge.compare(reading, scenes, i)
        assert verdict.shape and not verdict.possible and not verdict.kept
    elsewhere = some(scenes, plain)
    leap = drawn(elsewhere._replace(start=1 - elsewhere.start))
    far = [k for k, i in enumerate(plain) if abs(leap[k, 17] - clips[i, 17]).mean() > 0.08][:20]
    assert len(far) >= 10
    leap[:, :17] = clips[plain, :17]
    found = verdicts(leap[far], elsewhere, far)
    assert share(found, "possible") == 0 and share(found, "smooth") <= 0.1


def test_another_shape_in_the_end_is_not_kept(world):
    scenes, _ = world
    one = some(scenes, range(BATCH))
    other = one._replace(shape=(one.shape + 1) % len(source.SHAPES))
    clips = drawn(one)
    clips[:, 24:] = drawn(other)[:, 24:]
    found = verdicts(clips[:20], one, range(20))
    assert share(found, "kept") == 0
    assert share(found, "shape", "colour") >= 0.95


def test_a_clip_reaches_its_own_end(world, readings):
    scenes, clips = world
    assert all(judge.reaches(readings[i], clips[i, -1]) for i in WRONG)
    assert np.mean([judge.reaches(readings[i], clips[i + 1, -1]) for i in WRONG]) <= 0.05
    moved = [i for i in WRONG if np.ptp(readings[i].centres[[0, -1]], 0).max() > 0.1]
    assert len(moved) > 12 and not any(judge.reaches(readings[i], clips[i, 0]) for i in moved)


def test_motion_that_goes_on_is_told_from_motion_that_does_not(long):
    scenes, clips = long
    order = np.arange(65)
    slower, back = (clips[:, 33 + (order[:32]) // 2], clips[:, 32 - order[:32]])
    good, slow, turned = [], [], []
    for i, clip in enumerate(clips):
        good.append(judge.continues(judge.read(clip), scenes, i, 33))
        slow.append(judge.continues(judge.read(np.concatenate([clip[:33], slower[i]])), scenes, i, 33))
        turned.append(judge.continues(judge.read(np.concatenate([clip[:33], back[i]])), scenes, i, 33))
    assert np.mean([on for on, _ in good]) >= 0.95 and np.median([e for _, e in good]) < 0.01
    assert not any(on for on, _ in slow) and abs(np.median([e for _, e in slow]) - 0.5) < 0.05
    assert np.mean([on for on, _ in turned]) <= 0.1


def test_a_clip_may_begin_later(long):
    scenes, clips = long
    found = [judge.compare(judge.read(c[32:], start=32), scenes, i) for i, c in enumerate(clips)]
    assert share(found, "direction") >= 0.9 and share(found, "shape", "speed", "possible") >= 0.95


def seam(clip: np.ndarray, at: int) -> judge.Seam:
    return judge.seams(clip, judge.read(clip), [at])[0]


def test_a_seam_shows(world):
    _, clips = world
    whole = [seam(clips[i], 16) for i in WRONG[:12]]
    assert max(s.colour for s in whole) < 4 and max(s.motion for s in whole) < 2
    tinted = clips[:12].copy()
    tinted[:, 16:] += np.array([0.06, 0, -0.06], np.float32)
    assert min(seam(c, 16).colour for c in tinted) > 4
    skipped = [seam(np.delete(clips[i], range(12, 18), 0), 12).motion for i in WRONG[:12]]
    assert np.median(skipped) > 4


def test_both_shapes_of_a_pair_are_read(pairs):
    scenes, clips = pairs
    found = []
    for i, clip in enumerate(clips):
        both = judge.read_pair(clip, scenes, i)
        found.append([judge.compare(r, scenes, i, which) for which, r in enumerate(both)])
    front, behind = zip(*found, strict=True)
    for name in judge.Verdict._fields:
        # Some shapes are partly hidden in every frame.
        assert share(front, name) >= 0.97 and share(behind, name) >= 0.8, name
    assert share(behind, "shape", "colour") >= 0.95


def test_a_pair_is_not_seen_where_one_is_missing(pairs):
    scenes, _ = pairs
    for i, clip in enumerate(drawn(scenes._replace(pair=np.zeros(BATCH, bool)))[:12]):
        front, behind = judge.read_pair(clip, scenes, i)
        assert front.shape == list(source.SHAPES)[scenes.shape[i, 0]]
        assert behind.shape == behind.colour == judge.NOTHING, source.caption(scenes, i)
