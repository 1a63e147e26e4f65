"""The named schedules: as published, valid for any clip, and drawn as the matrix that is sampled."""

import json

import numpy as np
import pytest

from fvdm_jax import zoo
from fvdm_jax.schedule import pusa

SIGMAS = pusa(6, 3.0)


def left(name: str, frames: int, steps: int) -> list[list[int]]:
    """Steps that each frame still has to do, as Diffusion Forcing and MAGI-1 write their matrices."""
    return (steps - zoo.progress(name, frames, steps)).tolist()


# Diffusion Forcing (arXiv 2407.01392), `_generate_scheduling_matrix` of its code: full sequence, pyramid and
# autoregressive, for 3 frames and 4 steps (3 for the last).
FULL = [[4, 4, 4], [3, 3, 3], [2, 2, 2], [1, 1, 1], [0, 0, 0]]
PYRAMID = [[4, 4, 4], [3, 4, 4], [2, 3, 4], [1, 2, 3], [0, 1, 2], [0, 0, 1], [0, 0, 0]]
FAST_PYRAMID = [[4, 4, 4], [3, 3, 4], [2, 2, 3], [1, 1, 2], [0, 0, 1], [0, 0, 0]]
AUTOREGRESSIVE = [
    [3, 3, 3], [2, 3, 3], [1, 3, 3], [0, 3, 3], [0, 2, 3],
    [0, 1, 3], [0, 0, 3], [0, 0, 2], [0, 0, 1], [0, 0, 0],
]  # fmt: skip


def test_diffusion_forcings_matrices():
    assert left("together", 3, 4) == FULL
    assert left("pyramid", 3, 4) == PYRAMID
    assert left("pyramid:lag=0.5", 3, 4) == FAST_PYRAMID
    assert left("autoregressive", 3, 3) == AUTOREGRESSIVE == left("pyramid:lag=3", 3, 3)


def test_the_first_block_may_be_of_another_size():
    assert left("autoregressive:block=2,first=1", 3, 1) == [[1, 1, 1], [0, 1, 1], [0, 0, 0]]
    assert left("autoregressive:block=2,first=3", 6, 1)[1:] == [[0] * 3 + [1] * 3, [0] * 5 + [1], [0] * 6]
    assert left("autoregressive:block=8,first=9", 3, 4) == FULL
    assert left("autoregressive:block=2", 5, 3) == left("ad:lag=3,block=2", 5, 3)


def published_ad(frames: int, steps: int, lag: int, block: int) -> np.ndarray:
    """AD(s) as AR-Diffusion and SkyReels-V2 write it: a row at a time, from the row before it.

    The first block, and a block behind one that was clean, takes a step; any other is `lag` steps behind the
    block before it. (arXiv 2503.07418, algorithm of AD; arXiv 2504.13074, its asynchronous inference.)
    """
    blocks = frames // block
    rows = [np.zeros(blocks, int)]
    while np.any(rows[-1] < steps):
        row = np.zeros(blocks, int)
        for i in range(blocks):
            row[i] = rows[-1][i] + 1 if i == 0 or rows[-1][i - 1] >= steps else row[i - 1] - lag
        rows.append(np.clip(row, 0, steps))
    return np.repeat(np.stack(rows), block, axis=1)


@pytest.mark.parametrize(
    ("frames", "steps", "lag", "block"),
    [(5, 6, 0, 1), (5, 6, 1, 1), (4, 6, 3, 1), (4, 6, 6, 1), (6, 10, 4, 2), (9, 5, 2, 3), (21, 30, 5, 1)],
)
def test_ad_is_ar_diffusions_and_skyreels(frames, steps, lag, block):
    made = zoo.progress(f"ad:lag={lag},block={block}", frames, steps)
    assert np.array_equal(made, published_ad(frames, steps, lag, block))
    assert len(made) - 1 == steps + (frames // block - 1) * lag


def test_chunks_are_magis():
    """MAGI-1 (arXiv 2505.13211): chunk c has clip(64 − m + 16·c, 0, 64) steps left after m; a chunk is done
    every 16 calls."""
    made = left("chunks", 24, 64)
    assert made == [[min(max(64 - m + 16 * (f // 6), 0), 64) for f in range(24)] for m in range(64 + 48 + 1)]


def test_a_lattice_goes_block_by_block_through_each_step():
    """HiAR (arXiv 2603.08703): in each row one block moves, seeing those before it one step further."""
    made = zoo.progress("lattice:block=2", 6, 3)
    moved = np.diff(made, axis=0)
    assert moved.sum(1).tolist() == [2] * 9
    assert [int(row.argmax()) // 2 for row in moved] == [0, 1, 2] * 3


def test_a_rolling_queue_emits_at_equal_intervals():
    made = zoo.progress("rolling:window=4", 12, 20)
    done = (made == 20).argmax(0)
    assert np.diff(done).tolist() == [5] * 11
    assert ((made > 0) & (made < 20)).sum(1).max() == 4


def test_a_budget_takes_fewer_steps_towards_the_end():
    made = zoo.progress("budget:last=3", 5, 12)
    assert (np.diff(made, axis=0) > 0).sum(0).tolist() == [12, 10, 8, 5, 3]
    assert zoo.check(zoo.levels("budget:last=3", pusa(12, 5.0), np.ones(5))).calls == 12


def test_a_trapezoid_is_clean_at_both_ends_first():
    made = zoo.progress("trapezoid:lag=2", 5, 4)
    assert np.array_equal(made, made[:, ::-1])
    assert (made == 4).argmax(0).tolist() == [4, 6, 8, 6, 4]


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_schedule_is_valid_whatever_is_kept(name, steps):
    for strength in ([1], [1] * 9, [0, *[1] * 8], [0, 1, 1, 0.3, 1, 0, 1], [0.5, 0.5], [0, 0, 0]):
        rows = zoo.levels(name, pusa(steps, 5.0), strength)
        assert rows.dtype == np.float32 and np.array_equal(rows[0], np.float32(strength))
        assert not any(strength) or zoo.check(rows).calls >= steps
        assert not np.any(rows[:, np.array(strength) == 0])


def test_kept_frames_do_not_count_in_the_order():
    rows = zoo.levels("ad:lag=2", SIGMAS, [1, 0, 1])
    assert np.array_equal(rows[:, [0, 2]], zoo.levels("ad:lag=2", SIGMAS, [1, 1]))


def test_the_check_names_what_is_wrong():
    good = zoo.levels("pyramid", SIGMAS, [1, 1, 1])
    assert zoo.check(good) == (8, 3)
    for rows, wrong in (
        (good[::-1], "rises at step 1 for frame 2"),
        (good[:-1], "leaves frame 2 at"),
        (np.repeat(good, 2, 0), "moves no frame at step 1"),
        (1.5 * good, "outside"),
        (np.full_like(good, np.nan), "outside"),
    ):
        with pytest.raises(ValueError, match=wrong):
            zoo.check(rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rollin", "no schedule; give together, pyramid"),
        ("ad:s=3", "no option 's'; it has lag, block"),
        ("together:lag=1", "it has none"),
        ("ad:lag=1.5", "give a whole number from 0"),
        ("ad:block=0", "give a whole number from 1"),
        ("autoregressive:first=0", "give a whole number from 1"),
        ("autoregressive:first=1.5", "give a whole number from 1"),
        ("pyramid:lag=nan", "give a number from 0"),
        ("chunks:chunk", "give a whole number"),
        ("ad:", "no option ''"),
    ],
)
def test_what_is_no_schedule_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        zoo.progress(text, 5, 5)


def test_a_matrix_may_come_from_a_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([[1, 1, 1], [1, 0.5, 1], [0, 0.5, 1], [0, 0, 0]]))
    assert zoo.levels(str(path), SIGMAS, [0, 1, 0.5]).tolist() == [[0, 1, 0.5], [0, 0.5, 0.5], [0, 0, 0]]
    for text, said in (
        ("[[1, 1], [0, 0]]", "give rows of 3"),
        ("[[1, 1, 1], [0, 0]]", "no list of rows"),
        ('{"a": 1}', "no list of rows"),
        ("[[1, 1, 1], [2, 0, 0], [0, 0, 0]]", "outside|rises"),
        ("", "no list of rows"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            zoo.levels(str(path), SIGMAS, [1, 1, 1])
    with pytest.raises(ValueError, match="cannot be read"):
        zoo.levels(str(tmp_path / "none.json"), SIGMAS, [1, 1, 1])


def test_a_strength_that_changes_over_the_steps():
    """From 0.6 to 0.2 evenly over a frame's own steps; one that rises holds its level until it may fall."""
    sigmas = np.array([1.0, 0.8, 0.6, 0.4, 0.0], np.float32)
    rows = zoo.levels("together", sigmas, [0.6, 1.0, 0.0, 0.1], [0.2, 1.0, 0.0, 0.9])
    assert np.allclose(rows[:, 0], np.array([0.6, 0.5, 0.4, 0.3, 0.2]) * sigmas)
    assert np.array_equal(rows[:, 1], sigmas) and not rows[:, 2].any()
    assert np.allclose(rows[:, 3], [0.1, 0.1, 0.1, 0.1, 0])
    late = zoo.levels("pyramid:lag=2", sigmas, [1.0, 0.6], [1.0, 0.2])
    assert np.allclose(late[:, 1], np.array([0.6, 0.6, *(np.array([0.6, 0.5, 0.4, 0.3, 0.2]) * sigmas)]))
    # Rows at which every frame waits are left out, whatever strengths do.
    idle = zoo.levels("pyramid:lag=9", sigmas, [0.9, 0.6], [0.9, 0.2])
    assert len(idle) == len(zoo.levels("pyramid:lag=9", sigmas, [1.0, 1.0])) == 2 * 4 + 1
    assert zoo.check(idle).calls == 8
    same = zoo.levels("together", sigmas, [0.3, 1.0], [0.3, 1.0])
    assert np.array_equal(same, zoo.levels("together", sigmas, [0.3, 1.0]))
