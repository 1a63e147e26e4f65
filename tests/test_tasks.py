import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvdm_jax.tasks import completion, extension, image_to_video, start_end, text_to_video, transition

SHAPE = (2, 6, 2, 3, 4)


def clip(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, frames, 2, 3, 4)).astype(np.float32)


def test_text_to_video_is_given_nothing():
    task = text_to_video(SHAPE)
    assert task.canvas.shape == SHAPE and not np.any(task.canvas)
    assert task.strength.tolist() == [1] * 6
    assert task.canvas.dtype == task.strength.dtype == jnp.float32


NAMED = {
    "image_to_video": (lambda: image_to_video(SHAPE, clip(1)), {0: clip(1)}, 0.0),
    "loose image": (lambda: image_to_video(SHAPE, clip(1), 0.25), {0: clip(1)}, 0.25),
    "start_end": (lambda: start_end(SHAPE, clip(1), clip(1, 1)), {0: clip(1), 5: clip(1, 1)}, 0.0),
    "extension": (lambda: extension(SHAPE, clip(3)), {0: clip(3)}, 0.0),
    "transition": (lambda: transition(SHAPE, clip(2), clip(3, 1), 0.5), {0: clip(2), 3: clip(3, 1)}, 0.5),
    "completion": (lambda: completion(SHAPE, {1: clip(2), -2: clip(1, 1)}), {1: clip(2), 4: clip(1, 1)}, 0.0),
}


@pytest.mark.parametrize("build, given, strength", NAMED.values(), ids=NAMED)
def test_named_tasks(build, given, strength):
    canvas, strengths = np.zeros(SHAPE, np.float32), np.ones(6, np.float32)
    for at, frames in given.items():
        canvas[:, at : at + frames.shape[1]] = frames
        strengths[at : at + frames.shape[1]] = strength
    task = build()
    assert np.array_equal(task.canvas, canvas) and np.array_equal(task.strength, strengths)


def test_every_position_from_either_end():
    empty, image = text_to_video(SHAPE), clip(1)
    for at in range(-6, 6):
        task = empty.keep(image, at)
        assert np.flatnonzero(task.strength == 0).tolist() == [at % 6]


def test_frames_given_twice_take_the_later_and_a_strength_for_each_frame():
    task = text_to_video(SHAPE).keep(clip(6), 0).keep(clip(2, 1), 2, strength=jnp.array([0.25, 0.5]))
    assert task.strength.tolist() == [0, 0, 0.25, 0.5, 0, 0]
    assert np.array_equal(task.canvas[:, 2:4], clip(2, 1))


def test_keep_works_inside_jit_and_leaves_its_task_alone():
    task = text_to_video(SHAPE)
    traced = jax.jit(lambda task, clip, strength: task.keep(clip, -2, strength))(task, clip(2), 0.3)
    eager = task.keep(clip(2), -2, 0.3)
    assert jax.tree.all(jax.tree.map(np.array_equal, traced, eager))
    assert not np.any(task.canvas)


def test_a_clip_with_strength_1_is_as_none():
    task = text_to_video(SHAPE).keep(clip(3), 0).keep(clip(2, 1), 0, strength=jnp.array([1.0, 0.5]))
    assert not np.any(task.canvas[:, 0]) and np.array_equal(task.canvas[:, 1], clip(2, 1)[:, 1])
    assert task.strength.tolist() == [1, 0.5, 0, 1, 1, 1]


def test_clips_of_lower_precision_are_kept_as_float32():
    assert text_to_video(SHAPE).keep(jnp.asarray(clip(1), jnp.bfloat16), 0).canvas.dtype == jnp.float32


@pytest.mark.parametrize("frames, at", [(1, 6), (1, -7), (2, 5), (2, -1), (7, 0), (7, -7)])
def test_clips_that_do_not_fit_are_refused(frames, at):
    with pytest.raises(ValueError, match=f"{frames} frames from {at} on do not fit a canvas of 6"):
        text_to_video(SHAPE).keep(clip(frames), at)


@pytest.mark.parametrize("shape", [(2, 1, 2, 3, 5), (2, 1, 4, 3, 4), (1, 1, 2, 3, 4), (2, 1, 3, 4)])
def test_clips_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match="only frames may differ"):
        text_to_video(SHAPE).keep(np.zeros(shape, np.float32), 0)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf"), [0.5, 2.0]])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="strength is"):
        text_to_video(SHAPE).keep(clip(2), 0, strength)


def test_a_position_is_a_whole_number():
    with pytest.raises(TypeError):
        text_to_video(SHAPE).keep(clip(1), 1.5)
