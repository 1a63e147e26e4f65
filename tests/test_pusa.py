"""Pusa V1.0 (arXiv 2507.16116) as a case of the ordinary sampler: strengths, its table, its roundings.

Goldens are of Pusa-VidGen `8a8c4f5`, run in float32 on a CPU: the trajectory and its network in `golden/`,
and the numbers below, which its schedulers gave for the inputs beside them. Multipliers, at latent frames of
21, are those of its README.md, of the paper's figures and of its demonstrations.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from einops import rearrange
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from test_convert_program import convert, put, tree, weights

from convert import convert as converted
from convert import wan
from fvdm_jax import checkpoint, lora
from fvdm_jax.models import dit
from fvdm_jax.process import Process, flow
from fvdm_jax.samplers import advance, begin, euler, sample
from fvdm_jax.schedule import pusa, schedule, sigmas, switch
from fvdm_jax.tasks import text_to_video

GOLDEN = Path(__file__).parent / "golden"
TORCH = load_file(GOLDEN / "schedulers.safetensors")
SHAPE = (1, 21, 2, 3, 4)
BOUNDARY = 0.875
CASES = {
    "text": {},
    "image, clean": {0: 0.0},
    "image": {0: 0.2},
    "image, looser": {0: 0.3},
    "start-end, README": {0: 0.2, 20: 0.4},
    "start-end, README, looser": {0: 0.2, 20: 0.5},
    "start-end, clean start": {0: 0.0, 20: 0.4},
    "start-end, figure 9": {0: 0.3, 20: 0.7},
    "completion, figure 10": {0: 0.0, 20: 0.0},
    "completion, demonstration": {0: 0.3, 20: 0.3},
    "transition, figure 11": dict.fromkeys((0, 1, 2, 18, 19, 20), 0.0),
    "extension from 13 frames, figure 12": dict.fromkeys(range(4), 0.0),
    "extension from 13 frames, README": {0: 0.0, 1: 0.3, 2: 0.4, 3: 0.5},
    "extension from 13 frames, README, looser": {0: 0.2, 1: 0.4, 2: 0.4, 3: 0.4},
    "extension from 41 frames, figure 13": dict.fromkeys(range(11), 0.0),
    # Pusa's own loop takes its level from the largest timestep and goes wrong here.
    "every frame kept loosely": dict.fromkeys(range(21), 0.3),
}
"""Multipliers by latent frame."""


def nearest(time):
    """To bfloat16 and back, in numpy or in JAX."""
    return time.astype(ml_dtypes.bfloat16).astype(np.float32)


def rounding(strength) -> Process:
    """Flow, with the timesteps [b f] that Pusa feeds for the strengths [f]: rounded twice, then truncated.

    A T2V pipeline leaves the truncation out: bfloat16 has no fractions from 128 on, and 30 steps end at 147.
    """

    def timestep(level):
        whole = nearest(1000 * level / jnp.where(strength > 0, strength, 1.0))
        return jnp.floor(nearest(whole * strength))

    return flow._replace(timestep=timestep)


PROCESSES = {"exact": lambda strength: flow, "rounded": rounding}


def strengths(multipliers: dict[int, float], frames: int = 21) -> np.ndarray:
    return np.array([multipliers.get(f, 1.0) for f in range(frames)], np.float32)


def test_every_step_of_the_trajectory(monkeypatch):
    """Frame 0 clean, 1 generated, 2 at multiplier ½. Latents reach 4; 7.2e-7 was measured."""
    golden, stored = np.load(GOLDEN / "pusa.npz"), np.load(GOLDEN / "pusa_step.npz")
    monkeypatch.setattr(dit, "FREQUENCIES", 32)
    params = converted(wan.dit(), {key[2:]: stored[key] for key in stored if key.startswith("w/")})
    network = dit.DiT(dit.DiTConfig(64, 128, 2, 2, text_width=24, dtype="float32"))
    noise, canvas = (jnp.asarray(np.moveaxis(golden[f"sample/{part}"], 1, -1)) for part in ("noise", "z0"))
    task = text_to_video(canvas.shape).keep(canvas[:, :1], 0).keep(canvas[:, 2:], 2, 0.5)
    rows, process = schedule(pusa(4), task.strength), rounding(task.strength)
    np.testing.assert_array_equal(process.timestep(rows[:-1]), golden["sample/tvec"][:, 0])

    def denoise(x, level):
        text = jnp.asarray(stored["in/context"][:1])
        return process.read(x, network.apply({"params": params}, x, process.timestep(level), text), level)

    run = jax.jit(lambda rows: sample(process, denoise, euler, noise, task.canvas, rows))
    for step, latents in enumerate(golden["sample/traj"], start=1):
        # Where levels no longer fall nothing moves.
        made, wanted = run(rows[np.minimum(np.arange(5), step)]), np.moveaxis(latents, 1, -1)
        np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(made[:, 0], wanted[:, 0])


def test_a_step_with_a_level_for_each_frame():
    x, v, golden = (
        rearrange(TORCH[f"pusa_step/{part}"], "b c f h w -> b f h w c") for part in ("x", "v", "out")
    )
    table = pusa(10)
    index = np.abs(1000 * table[:, None] - TORCH["pusa_step/t"]).argmin(0)
    now, then = (jnp.asarray(table[np.minimum(index + later, 10)])[None] for later in (0, 1))
    ours = sample(flow, lambda x, level: flow.read(x, v, level), euler, x, x, jnp.concatenate([now, then]))
    np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-6)
    assert np.array_equal(ours[:, 0], golden[:, 0])


@pytest.mark.parametrize(
    "multipliers, steps",
    [
        ({0: 0.0, 2: 0.5}, np.outer([0.0625, 0.10417, 0.20833, 0.625], [0, 1, 0.5, 1])),
        # The reference goes wrong where all frames are given; these are its table times the multiplier.
        ({0: 0.3, 1: 0.3}, np.outer([0.0625, 0.10417, 0.20833, 0.625], [0.3, 0.3])),
        ({0: 1.0}, np.outer([0.0625, 0.10417, 0.20833, 0.625], [1, 1])),
    ],
    ids=["two given", "all given", "one ignored"],
)
def test_steps_in_the_level_of_each_frame(multipliers, steps):
    strength = strengths(multipliers, len(steps[0]))
    falls = -np.diff(schedule(pusa(4), strength), axis=0)
    # Published with five digits.
    np.testing.assert_allclose(falls, steps, rtol=0, atol=5.1e-6)
    np.testing.assert_allclose(falls.sum(0), strength, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "steps, multiplier, timesteps",
    [
        (4, 0.0, [0, 0, 0, 0]),
        (4, 0.2, [200, 187, 166, 125]),
        (4, 0.5, [500, 468, 416, 312]),
        (4, 1.0, [1000, 936, 832, 624]),
        (10, 1.0, [1000, 980, 952, 920, 884, 832, 768, 680, 556, 358]),
    ],
)
def test_rounded_timesteps(steps, multiplier, timesteps):
    strength = jnp.float32([multiplier])
    rows = schedule(pusa(steps), strength)[:-1]
    np.testing.assert_array_equal(rounding(strength).timestep(rows)[:, 0], timesteps)


@pytest.mark.parametrize(
    "table, boundary, high, low",
    [
        (pusa(4, 5.0), 0.875, 2, 2),
        (pusa(10, 5.0), 0.875, 5, 5),
        (pusa(30, 5.0), 0.875, 13, 17),
        (sigmas(40, 12.0), 0.875, 26, 14),
        (sigmas(40, 5.0), 0.9, 15, 25),
    ],
    ids=["Pusa, Lightning, 4", "Pusa, 10", "Pusa, 30", "Wan2.2 T2V", "Wan2.2 I2V"],
)
def test_where_the_experts_change(table, boundary, high, low):
    """Pusa's sampler and Wan2.2's own with UniPC, at their default shifts and boundaries."""
    assert (switch(table, boundary), len(table) - 1) == (high, high + low)
    every = strengths({0: 0.0, 3: 0.2})
    assert switch(schedule(table, (every > 0).astype(np.float32)), boundary) == high


def said(array, expert: int, x, timestep):
    """A velocity in which frames hear of each other, by numpy or JAX: of the high expert 0 and the low 1."""
    wave = array.sin((1.0 + expert) * x + timestep[:, :, None, None, None] / 300)
    return wave + (0.3 - 0.5 * expert) * x.mean(1, keepdims=True)


def reference(noise, canvas, multipliers: dict[int, float], steps: int, boundary: float, rounded: bool):
    """Pusa's loop, in float64: wan_video_pusa_multi_frames.py, with its indices in place of its look-ups."""
    s = 1 - np.arange(steps + 1) / steps
    sig = 5 * s / (1 + 4 * s)
    m = strengths(multipliers).astype(float)
    scale = m[None, :, None, None, None]
    z = noise.astype(float)
    for f, multiplier in multipliers.items():
        z[:, f] = (1 - multiplier * sig[0]) * canvas[:, f] + multiplier * sig[0] * noise[:, f]
    for i in range(steps):
        tau, expert = 1000 * m * sig[i], int(1000 * sig[i] < 1000 * boundary)
        step = scale * (sig[i + 1] - sig[i])
        if rounded:
            tau = np.trunc(nearest(nearest(np.float32([1000 * sig[i]])) * m.astype(np.float32)))
            step = np.where(tau[None, :, None, None, None] == 0, 0, step)
        z = z + step * said(np, expert, z, tau[None])
    return z


@partial(jax.jit, static_argnames=("high", "rule"))
def ours(noise, canvas, strength, rows, high: int, rule: str):
    """The first `high` steps by one denoiser, the others by another."""
    process = PROCESSES[rule](strength)

    def by(expert: int):
        return lambda x, level: process.read(x, said(jnp, expert, x, process.timestep(level)), level)

    carry = begin(process, euler, noise, canvas, rows)
    carry = advance(process, by(0), euler, carry, rows[: high + 1])
    return advance(process, by(1), euler, carry, rows[high:])[0]


def clips() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("rule", PROCESSES)
@pytest.mark.parametrize("boundary", [0.0, BOUNDARY], ids=["Wan2.1", "Wan2.2"])
@pytest.mark.parametrize("steps", [4, 10, 30])
@pytest.mark.parametrize("case", CASES)
def test_every_published_case_is_the_references_loop(case, steps, boundary, rule):
    (noise, clip), multipliers = clips(), CASES[case]
    task = text_to_video(SHAPE)
    for f, multiplier in multipliers.items():
        task = task.keep(jnp.asarray(clip[:, f : f + 1]), f, multiplier)
    rows = schedule(pusa(steps), task.strength)
    high = switch(schedule(pusa(steps), (task.strength > 0).astype(jnp.float32)), boundary)
    assert high == {0.0: steps, BOUNDARY: {4: 2, 10: 5, 30: 13}[steps]}[boundary]
    made = ours(noise, *task, rows, high, rule)
    wanted = reference(noise, clip, multipliers, steps, boundary, rule == "rounded")
    np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-5)
    kept = [f for f, multiplier in multipliers.items() if multiplier == 0]
    np.testing.assert_array_equal(np.asarray(made)[:, kept].view(np.int32), clip[:, kept].view(np.int32))


def test_multiplier_1_ignores_what_is_given():
    (noise, clip), plain = clips(), text_to_video(SHAPE)
    tasks, rows = (plain, plain.keep(jnp.asarray(clip[:, :2]), 0, 1.0)), schedule(pusa(4), plain.strength)
    np.testing.assert_array_equal(*(ours(noise, *task, rows, 2, "exact") for task in tasks))


@pytest.mark.parametrize("multiplier, standing", [(0.0005, 0), (0.0015, 3)])
def test_a_frame_stands_still_where_its_timestep_is_truncated_to_nought(multiplier, standing):
    """In the reference alone, and so only a schedule: here every frame with a strength moves to the end."""
    (noise, clip), steps = clips(), 4
    task = text_to_video(SHAPE).keep(jnp.asarray(clip[:, :1]), 0, multiplier)
    rows = schedule(pusa(steps), task.strength)
    rows = rows.at[standing + 1 :, 0].set(rows[standing, 0])
    made = ours(noise, *task, rows, 2, "rounded")
    wanted = reference(noise, clip, {0: multiplier}, steps, BOUNDARY, True)
    np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-5)
    moved = schedule(pusa(steps), task.strength)
    assert np.abs(ours(noise, *task, moved, 2, "rounded") - wanted).max() > 1e-4


MODULES = [f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"] + ["ffn.0", "ffn.2"]
LIGHT, PUSA = (4, 0.5, 1.0), (8, None, 1.4)
"""(rank, alpha in the file, multiplier), of scales 1/8 and 1.4; published are (64, 8, 1), (512, –, 1.4)."""


def pairs(base: dict, rank: int, alpha: float | None, seed: int) -> dict[str, np.ndarray]:
    """A file of adapters of all that Pusa adapts: in Lightning's spelling with an alpha, else in Pusa's."""
    draw, arrays = np.random.default_rng(seed), {}
    for module in (f"blocks.{i}.{each}" for i in range(2) for each in MODULES):
        out, into = base[f"{module}.weight"].shape
        a, b = (draw.normal(size=size).astype(np.float32) / 24 for size in ((rank, into), (out, rank)))
        if alpha is None:
            arrays |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
        else:
            key = f"diffusion_model.{module}"
            arrays |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
            arrays[f"{key}.alpha"] = np.array(alpha, np.float32)
    return arrays


def merged(base: dict, light: dict, tuned: dict, to=lambda array: array) -> dict[str, np.ndarray]:
    """Weights with Lightning's pairs and then Pusa's, as its loaders add them; `to` where they round.

    diffsynth/models/lora.py:200-277 and model_manager.py:398-493.
    """
    sums = {key: to(array) for key, array in base.items()}
    for key in (key for key in light if key.endswith(".alpha")):
        module = key.removeprefix("diffusion_model.").removesuffix(".alpha")
        down, up = (light[key.replace("alpha", f"lora_{part}.weight")] for part in ("down", "up"))
        sums[f"{module}.weight"] = to(
            sums[f"{module}.weight"] + to(light[key] / np.float32(len(down)) * (up @ down))
        )
    for key in (key for key in tuned if ".lora_A." in key):
        weight = key.replace(".lora_A.default", "")
        change = to(to(tuned[key.replace("lora_A", "lora_B")]) @ to(tuned[key]))
        sums[weight] = to(sums[weight] + to(np.float32(PUSA[2]) * change))
    return sums


def flat(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Published weights as our tree, by path."""
    return flatten_dict(converted(wan.dit(), arrays, p=2, q=2), sep="/")


class Loras:
    """A base whose weights are numbers of bfloat16, as the published are, and two adapters for it."""

    def __init__(self, folder: Path):
        self.folder, self.base = folder, {key: nearest(array) for key, array in weights("dit_t2v").items()}
        self.light, self.tuned = pairs(self.base, *LIGHT[:2], 1), pairs(self.base, *PUSA[:2], 2)
        put(folder / "base", self.base)
        for name, arrays in {"light": self.light, "pusa": self.tuned}.items():
            convert(put(folder, arrays, None, f"{name}.safetensors"), folder / name)

    def params(self, dtype: str = "float32") -> dict:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), converted(wan.dit(), self.base, p=2, q=2))

    def converted(self, dtype: str = "float32") -> dict[str, np.ndarray]:
        """`python -m convert BASE OUT --lora LIGHT --lora PUSA:1.4`: rounded once."""
        out, order = self.folder / dtype, (f"light.safetensors:{LIGHT[2]}", f"pusa.safetensors:{PUSA[2]}")
        given = [part for name in order for part in ("--lora", self.folder / name)]
        convert(self.folder / "base", out, *given, "--dtype", dtype)
        return tree(out / "dit")

    def merged(self, dtype: str = "float32") -> dict[str, np.ndarray]:
        """One merged after the other, rounded after each."""
        params, plain = self.params(dtype), self.params()
        for name, strength in {"light": LIGHT[2], "pusa": PUSA[2]}.items():
            params = lora.merge(params, checkpoint.load_adapters(self.folder / name, plain), strength)
        return flatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> Loras:
    return Loras(tmp_path_factory.mktemp("loras"))


@pytest.mark.parametrize("way", [Loras.converted, Loras.merged], ids=lambda way: way.__name__)
def test_lightnings_lora_and_then_pusas(loras, way):
    """Lightning's at alpha/rank, Pusa's at its multiplier alone. 6e-8 was measured of weights up to 1.5."""
    found, wanted = way(loras), flat(merged(loras.base, loras.light, loras.tuned))
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_allclose(found[path], array, rtol=0, atol=1e-6, err_msg=path)
    for other in (merged(loras.base, {}, loras.tuned), loras.base):
        assert np.abs(flat(other)["blocks/ffn/up/kernel"] - wanted["blocks/ffn/up/kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    "way, low, high", [(Loras.converted, 0.2, 0.35), (Loras.merged, 0.05, 0.15)], ids=["once", "after each"]
)
def test_bfloat16_is_rounded_less_often_than_by_the_reference(loras, way, low, high):
    """The reference rounds A, B, their product, 1.4 times it and each sum: of the weights 28 % (rounded
    once) and 10 % (after each LoRA) were seen to differ from it, and ours to be nearer to exact."""
    files = loras.base, loras.light, loras.tuned
    every = flat(merged(*files)), flat(merged(*files, nearest)), way(loras, "bfloat16")
    paths = [p for p in every[0] if p.endswith("/kernel") and p.startswith("blocks/")]
    exact, theirs, ours = (np.concatenate([np.float32(a[p]).ravel() for p in paths]) for a in every)
    assert low < np.mean(ours != theirs) < high
    assert np.linalg.norm(ours - exact) < np.linalg.norm(theirs - exact) < 5e-3 * np.linalg.norm(exact)
