"""What a rolling queue begins behind, and that it goes on from where it stood."""

from functools import partial

import jax
import numpy as np
import pytest
from test_laws import sociable
from test_rollout import QUEUES, SOLVERS, Queue, drawn

from fvdm_jax import latents, zoo
from fvdm_jax.process import flow
from fvdm_jax.samplers import sample
from fvdm_jax.schedule import pusa
from fvdm_jax.tasks import text_to_video


@SOLVERS
@pytest.mark.parametrize("given", [1, 2, 4])
def test_a_queue_begins_behind_what_is_given(sampler, given):
    """Which stays as it is, and is seen: by frames that then take their turns as of a video kept so."""
    canvas = np.concatenate([drawn(100 + i) for i in range(given)], axis=1)
    queue = Queue(sampler, sociable, 6, 2, 8).behind(canvas)
    made = queue.take(2)
    first = max(given - 2, 0)
    noise = np.concatenate([drawn(first + i) for i in range(6)], axis=1)
    kept = given - first
    task = text_to_video(noise.shape).keep(canvas[:, first:], at=0)
    rows = np.zeros((8 + 2 + 1, 6), np.float32)
    rows[:, kept:] = pusa(8, 3.0)[zoo.rolling(6 - kept, 8, window=4)][: len(rows)]
    clip = jax.jit(partial(sample, flow, partial(sociable, flow), sampler))(noise, task.canvas, rows)
    np.testing.assert_array_equal(clip[:, :kept], canvas[:, first:])
    # Not bit-equal: one scan and many are compiled differently.
    scale = max(np.abs(made).max(), 1)
    np.testing.assert_allclose(made[:, :1], clip[:, kept : kept + 1], rtol=0, atol=1e-6 * scale)
    other = Queue(sampler, sociable, 6, 2, 8).behind(canvas + 1).take(1)
    assert np.abs(other - made[:, :1]).max() > 1e-3 and queue.traces == [(2, 6)]


@SOLVERS
@QUEUES
def test_a_queue_goes_on_from_where_it_stood(sampler, frames, context, steps):
    canvas = drawn(100)
    whole = Queue(sampler, sociable, frames, context, steps).behind(canvas).take(11)
    queue = Queue(sampler, sociable, frames, context, steps).behind(canvas)
    for count in (1, 3, 5):
        queue.take(count)
        stood = jax.tree.map(np.asarray, queue.stood)
        later = Queue(sampler, sociable, frames, context, steps).behind(canvas, stood)
        done = int(stood.next) - 1
        np.testing.assert_array_equal(later.take(2), whole[:, done : done + 2])


def test_how_a_queue_stands_goes_with_its_frames(tmp_path):
    path, shape = tmp_path / "a.latents.safetensors", (1, 4, 2, 2, 3)
    piece, carry = np.ones((1, 2, 2, 2, 3), np.float32), [np.arange(6.0).reshape(2, 3), np.int32([[7]])]
    with latents.Reel(path, shape, {"seed": 1}) as reel:
        assert reel.stored() is None
        reel.add(piece)
        reel.store(2, carry)
    (state,) = tmp_path.glob("*.state")
    with latents.Reel(path, shape, {"seed": 1}) as reel:
        frames, found = reel.stored()
        assert frames == 2 and all(map(np.array_equal, found, carry)) and found[1].dtype == np.int32
        reel.keep(1)
        assert reel.stored() is None
    whole = state.read_bytes()
    with latents.Reel(path, shape, {"seed": 1}) as reel:
        reel.add(piece)
        for broken in (b"", whole[:-1], b"\xff" * 64):
            state.write_bytes(broken)
            assert reel.stored() is None
    # It is of no use to another video.
    for begun in ({"seed": 2}, {"seed": 1}):
        state.write_bytes(whole)
        with latents.Reel(path, shape, begun, replace=True):
            assert not state.exists()
    with latents.Reel(path, shape, {"seed": 1}) as reel:
        reel.add(np.concatenate([piece, piece], axis=1))
        reel.store(4, carry)
        reel.finish()
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
