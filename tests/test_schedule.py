from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fvdm_jax.process import flow
from fvdm_jax.schedule import SPACINGS, ddpm, pusa, schedule, sigmas, switch
from fvdm_jax.zoo import ZOO, delayed, levels

GOLDEN = Path(__file__).parent / "golden"
TABLES = load_file(GOLDEN / "schedulers.safetensors")
OURS = {"off_unipc": sigmas, "off_dpmpp": pusa, "pusa": pusa, "ds_euler": pusa}


@pytest.mark.parametrize("shift", [1, 3, 5, 8, 12, 16])
@pytest.mark.parametrize("steps", [4, 20, 40, 50])
@pytest.mark.parametrize("name", OURS)
def test_tables_of_the_reference_implementations(name, steps, shift):
    golden = TABLES[f"table/{name}/N{steps}_s{shift}/sigmas"]
    ours = OURS[name](steps, shift)
    # One unit in the last place: two of the references shift in float32.
    np.testing.assert_allclose(ours[: len(golden)], golden, rtol=0, atol=1.2e-7)
    assert ours.dtype == np.float32 and ours.shape == (steps + 1,) and ours[-1] == 0


@pytest.mark.parametrize("steps", [4, 20, 40, 50])
def test_wans_truncated_timesteps_are_one_line(steps):
    truncating = flow._replace(timestep=lambda level: jnp.floor(1000 * level))
    for shift in (1, 3, 5, 8, 12, 16):
        golden = TABLES[f"table/off_unipc/N{steps}_s{shift}/timesteps"]
        assert np.array_equal(truncating.timestep(jnp.asarray(sigmas(steps, shift)[:-1])), golden)


def test_fvdms_respacing():
    assert np.array_equal(np.round(1000 * ddpm(50)[-2::-1] - 1)[:5], [0, 20, 41, 61, 82])
    assert np.array_equal(np.round(1000 * ddpm(50)[:2] - 1), [999, 979])
    for steps in (2, 3, 7, 100, 250, 999, 1000):
        index = np.round(np.arange(steps) * 999 / (steps - 1))
        assert np.array_equal(np.round(1000 * ddpm(steps)[-2::-1] - 1), index)
    assert ddpm(1).tolist() == [1, 0]


@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
def test_any_table_falls_from_1_to_exactly_0(spacing):
    for shift in np.random.default_rng(0).uniform(0.1, 20, 50):
        for steps in (1, 2, 7, 50):
            table = spacing(steps, shift)
            assert np.all(np.diff(table) < 0) and table[-1] == 0 and 0.98 < table[0] <= 1
            # A larger shift is never less noisy.
            assert np.all(spacing(steps, shift * 1.1) >= table)
            if spacing is not sigmas:
                assert table[0] == 1


@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
@pytest.mark.parametrize("steps, shift", [(0, 5.0), (-3, 5.0), (4, 0.0), (4, -1.0), (4, np.nan), (4, np.inf)])
def test_impossible_tables_are_refused(spacing, steps, shift):
    with pytest.raises(ValueError, match="steps is|shift is"):
        spacing(steps, shift)


def test_a_schedule_is_strength_times_delayed_sigmas():
    table, strength, delay = pusa(4), np.array([1.0, 0.0, 0.3], np.float32), [0, 2, 5]
    rows = np.asarray(schedule(table, strength, delay))
    assert rows.shape == (4 + 1 + 5, 3) and rows.dtype == np.float32
    for s, f in np.ndindex(rows.shape):
        assert rows[s, f] == strength[f] * table[np.clip(s - delay[f], 0, 4)]


def test_levels_lie_in_0_to_1_never_rise_and_end_at_0():
    random = np.random.default_rng(1)
    # Few shapes, since each is compiled.
    for frames, steps in [(1, 1), (1, 7), (4, 1)] + 30 * [(6, 20)]:
        strength = random.choice([0.0, 1.0, random.uniform()], frames).astype(np.float32)
        delay = np.append(random.integers(0, 9, frames - 1), 8)
        rows = np.asarray(schedule(pusa(steps, random.uniform(0.2, 16)), strength, delay))
        assert rows.min() >= 0 and rows.max() <= 1 and np.all(np.diff(rows, axis=0) <= 0)
        assert np.array_equal(rows[0], strength) and np.all(rows[-1] == 0)


def test_one_delay_for_all_waits():
    waiting = schedule(pusa(4), jnp.ones(3), 2)
    assert np.array_equal(waiting[2:], schedule(pusa(4), jnp.ones(3))) and np.all(waiting[:3] == 1)


def test_strength_may_be_traced():
    traced = jax.jit(lambda strength: schedule(pusa(4), strength, [0, 1, 2]))
    strength = jnp.array([0.0, 0.5, 1.0])
    assert np.array_equal(traced(strength), schedule(pusa(4), strength, [0, 1, 2]))


@pytest.mark.parametrize("delay", [-1, [0, 1], [0, 1, -1], 0.5, [[0, 1, 2]]])
def test_impossible_delays_are_refused(delay):
    with pytest.raises(ValueError, match="3 whole numbers from 0"):
        schedule(pusa(4), jnp.ones(3), delay)


@pytest.mark.parametrize("boundary", [0.0, 0.5, 0.875, 0.9, 1.0])
@pytest.mark.parametrize("name", ZOO)
def test_the_experts_change_once_and_kept_frames_have_no_say(name, boundary):
    table = pusa(14)
    high = switch(levels(name, table, np.ones(5)), boundary)
    strength = np.array([0, 1, 0.2, 1, 0, 0.9, 1, 0])
    rows = levels(name, table, (strength > 0).astype(np.float32))
    assert switch(rows, boundary) == high and len(rows) == len(levels(name, table, strength))
    begun = rows[:-1].max(1)
    # 0.9 is a level of this table, and one that float32 has not.
    assert np.all(begun[:high] > boundary - 1e-6) and np.all(begun[high:] < boundary - 1e-6)


@pytest.mark.parametrize("shift", [1, 5, 12])
@pytest.mark.parametrize("spacing", [sigmas, pusa])
def test_experts_change_where_wans_and_pusas_timesteps_say(spacing, shift):
    for steps, boundary in [(n, b) for n in range(1, 61) for b in (0.5, 0.875, 0.9)]:
        table = spacing(steps, shift)
        timesteps = table[:-1] * np.float32(1000)
        high = switch(table, np.float64(boundary))
        assert high == np.sum(timesteps >= 1000 * boundary) == np.sum(np.trunc(timesteps) >= 1000 * boundary)
        # The last frame to begin keeps the high expert at work.
        assert switch(table[delayed([0, 3, 5], steps)], boundary) == (high and high + 5)


@pytest.mark.parametrize("boundary", [875, -0.1, np.nan])
def test_impossible_boundaries_are_refused(boundary):
    with pytest.raises(ValueError, match="boundary is .*give a level from 0 to 1"):
        switch(pusa(4), boundary)
