import time
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from fvdm_jax import schedule, tasks
from fvdm_jax.coverage import DRAWS, TASKS, WITHIN, coverage, distances, paths, report
from fvdm_jax.levels import clean, per_frame, prefix, ptss, ramp, scalar

FRAMES = 9


def row(strength: np.ndarray, noise: float):
    """A draw of levels along the path at a uniform point of it, every frame off by up to `noise`."""
    random = np.random.default_rng(0)
    levels = random.uniform(0, 1, (DRAWS, 1)) * strength + random.uniform(-noise, noise, (DRAWS, FRAMES))
    return lambda key, batch, frames: jnp.asarray(levels, jnp.float32)


def strength(*kept: int) -> np.ndarray:
    return np.where(np.isin(np.arange(FRAMES), kept), 0.0, 1.0)


STRENGTHS = {
    "text_to_video": strength(), "image_to_video": strength(0), "start_end": strength(0, 8),
    "extension": strength(0, 1, 2), "completion": strength(0, 4, 8), "transition": strength(0, 1, 2, 6, 7, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_draw_along_a_tasks_path_is_always_near_it(name):
    near = coverage(row(STRENGTHS[name], 0.05), FRAMES)
    assert near[name].share == 1 and near[name].median < 0.055
    others = {other: got.share for other, got in near.items() if other in STRENGTHS and other != name}
    # Near the end of the path, levels below 0.15 or so, all tasks are alike.
    assert max(others.values()) < 0.25


def test_the_paths_are_those_of_the_tasks():
    every = paths(FRAMES)
    assert tuple(every) == TASKS
    for name, rows in every.items():
        expected = STRENGTHS.get(name, np.ones(FRAMES))
        assert np.array_equal(rows[0], expected) and np.all(rows[-1] == 0)
        assert np.abs(np.diff(rows, axis=0)).max() < 0.0201
    one = jnp.zeros((1, 1, 1, 1, 1))
    task = tasks.start_end((1, FRAMES, 1, 1, 1), one, one)
    assert np.array_equal(every["start_end"], schedule.schedule(schedule.pusa(100, 1.0), task.strength))


def test_distance_is_the_largest_difference_to_the_nearest_row():
    levels, path = (np.random.default_rng(i).random((n, 5), np.float32) for i, n in enumerate((40, 30)))
    expected = np.abs(levels[:, None] - path[None]).max(-1).min(-1)
    assert np.array_equal(distances(levels, path), expected)


def test_known_shares():
    equal, free, start = (coverage(draw, FRAMES) for draw in (scalar, per_frame, clean(scalar, prefix)))
    assert equal["text_to_video"].share == 1 and equal["text_to_video"].median < 0.006
    # A clip at one level below 0.1 is near the end of every path; ± 4 deviations of 4096 clips.
    assert abs(equal["start_end"].share - WITHIN) < 0.02
    # Nine independent levels within 0.2 of each other have a probability of 2e-5.
    assert free["text_to_video"].share < 0.001
    # Of 8 equally probable prefixes one is the task's own. To be near, the level must be below 0.1 where the
    # prefix is too short, and below 0.2 where it is too long. ± 4 deviations and a step of the path.
    assert abs(start["image_to_video"].share - (1 + 7 * 0.2) / 8) < 0.035
    assert abs(start["extension"].share - (1 + 2 * 0.1 + 5 * 0.2) / 8) < 0.035


def test_ramps_are_near_the_rolling_paths():
    one_after_the_other, even = (coverage(partial(ramp, width=width), FRAMES) for width in (1.0, FRAMES))
    assert one_after_the_other["autoregressive"].share == 1 and even["rolling"].share == 1
    assert one_after_the_other["rolling"].median > 0.3 and even["autoregressive"].median > 0.3


def test_it_is_the_same_for_a_seed_and_quick():
    began = time.monotonic()
    again = [coverage(ptss, FRAMES, seed) for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    # Two seconds each, also on a machine that other work shares.
    assert time.monotonic() - began < 12


@pytest.mark.parametrize("frames", [1, 2, FRAMES])
def test_the_report_is_a_plain_table_of_the_numbers(frames):
    lines = report(scalar, frames).splitlines()
    assert max(map(len, lines)) <= 80 and f"{DRAWS} draws of {frames} frames" == lines[0]
    near = coverage(scalar, frames)
    for name, line in zip(near, lines[2:], strict=False):
        task, share, median = line.split()
        assert task == name and float(share[:-1]) == pytest.approx(100 * near[name].share, abs=0.051)
        assert float(median) == pytest.approx(near[name].median, abs=0.00051)


def test_tasks_that_generate_nothing_are_left_out():
    assert set(paths(1)) == {"text_to_video", "autoregressive", "rolling"}
    assert "start_end" not in paths(2) and "image_to_video" in paths(2)
