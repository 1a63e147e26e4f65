"""Long video: what each window is given, what becomes of it, and how much there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvdm_jax.rollout import extend
from fvdm_jax.tasks import text_to_video

SHAPE = 2, 5, 2, 2, 3


class Windows:
    """Generates noise where nothing is given, and remembers what it was asked for."""

    def __init__(self):
        self.tasks, self.made = [], []

    def __call__(self, task, i):
        noise = jax.random.normal(jax.random.key(i), task.canvas.shape)
        share = task.strength[None, :, None, None, None]
        # Not a sum: what is given must come out bit for bit.
        made = jnp.where(share == 0, task.canvas, share * noise + (1 - share) * task.canvas)
        self.tasks.append((i, task))
        self.made.append(made)
        return made


@pytest.mark.parametrize(("windows", "overlap"), [(1, 2), (2, 1), (4, 2), (3, 4)])
def test_every_window_goes_on_from_the_one_before(windows, overlap):
    generate, start = Windows(), text_to_video(SHAPE).keep(jnp.ones((2, 1, 2, 2, 3)), at=0)
    made = extend(generate, start, windows, overlap)
    assert made.shape == (2, 5 + (windows - 1) * (5 - overlap), 2, 2, 3)
    assert [i for i, _ in generate.tasks] == list(range(windows)) and generate.tasks[0][1] is start
    for i in range(windows):
        at = i * (5 - overlap)
        np.testing.assert_array_equal(made[:, at : at + 5], generate.made[i])
    for i, task in generate.tasks[1:]:
        np.testing.assert_array_equal(task.strength, [0] * overlap + [1] * (5 - overlap))
        np.testing.assert_array_equal(task.canvas[:, :overlap], generate.made[i - 1][:, -overlap:])
        assert not task.canvas[:, overlap:].any()


def test_frames_that_are_kept_loosely_are_those_of_the_later_window():
    generate = Windows()
    made = extend(generate, text_to_video(SHAPE), 2, 2, strength=0.4)
    np.testing.assert_array_equal(generate.tasks[1][1].strength, np.float32([0.4, 0.4, 1, 1, 1]))
    np.testing.assert_array_equal(made[:, 3:], generate.made[1])
    np.testing.assert_array_equal(made[:, :3], generate.made[0][:, :3])


@pytest.mark.parametrize(("windows", "overlap"), [(0, 2), (2, 0), (2, 5)])
def test_windows_that_cannot_be_are_refused(windows, overlap):
    with pytest.raises(ValueError, match="overlap from 1 to 4"):
        extend(Windows(), text_to_video(SHAPE), windows, overlap)
