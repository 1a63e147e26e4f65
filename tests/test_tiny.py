"""The bundled model: small, made of what its configs say, and good for what the README promises."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvdm_jax import checkpoint, video
from fvdm_jax.data import source
from fvdm_jax.guidance import guided
from fvdm_jax.models.tokenizer import byte_tokenizer
from fvdm_jax.process import flow
from fvdm_jax.request import TINY
from fvdm_jax.samplers import SAMPLERS, sample
from fvdm_jax.schedule import schedule, sigmas
from fvdm_jax.tasks import text_to_video

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = json.loads((TINY / "config.json").read_text())["sampling"]
FRAMES, SIDE = SETTINGS["frames"], SETTINGS["size"][0]


@pytest.fixture(scope="module")
def model() -> tuple[checkpoint.Networks, dict]:
    return checkpoint.load(TINY)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of pictures in −1 … 1, in dB."""
    return float(-10 * np.log10(np.mean((np.clip(a, -1, 1) - b) ** 2) / 4))


def test_it_is_small():
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 16e6


def test_pictures_survive_its_vae(model):
    """Textures with a photograph's statistics (22.7 dB), and shapes to their last frame (24.6 dB)."""
    networks, params = model
    reconstruct = jax.jit(lambda clip: networks.decode(params, networks.encode(params, clip)))
    keys = jax.random.split(jax.random.key(9), 8)
    textures = jax.vmap(lambda key: source.textures(key, 1, SIDE, SIDE))(keys)
    assert psnr(reconstruct(textures), textures) > 22.0
    clips = source.moving_shapes(source.scenes(np.random.default_rng(9), 4), FRAMES, SIDE, SIDE)
    again = np.asarray(reconstruct(clips))
    assert psnr(again, clips) > 24.0 and psnr(again[:, -1], clips[:, -1]) > 24.0


@pytest.fixture(scope="module")
def generate(model):
    """The clips [b t H W 3] of prompts and of what is kept of them, 20 steps."""
    networks, params = model
    side = SIDE // networks.vae.spatial

    @jax.jit
    def program(tokens, mask, canvas, strength):
        text, nothing = jnp.split(networks.read(params, tokens, mask), 2)
        denoise = guided(flow, partial(networks.velocity, params), text, nothing, SETTINGS["guidance"])
        noise = jax.random.normal(jax.random.key(0), canvas.shape)
        rows = schedule(sigmas(20, SETTINGS["shift"]), strength)
        latents = sample(flow, denoise, SAMPLERS["unipc"], noise, canvas, rows)
        return latents, networks.decode(params, latents)

    def run(prompts: list[str], kept: np.ndarray | None = None):
        task = text_to_video((len(prompts), 1 + FRAMES // 4, side, side, networks.vae.latent))
        task = task if kept is None else task.keep(kept, 0)
        tokens = byte_tokenizer([*prompts, *[""] * len(prompts)], networks.text.length)
        return jax.tree.map(np.asarray, program(*map(jnp.asarray, tokens), *task))

    return run


PROMPTS = {
    ("red", "right"): "a large red square moves right on a plain gray background",
    ("blue", "left"): "a large blue circle moves left on a plain cream background",
    ("green", "up"): "a large green triangle moves up on a plain gray background",
    ("yellow", "down"): "a large yellow circle moves down on a plain navy background",
    ("white", "right"): "a large white square moves right on a plain navy background",
    ("black", "left"): "a large black circle moves left on a plain pink background",
    ("purple", "up"): "a large purple square moves up on a plain cream background",
    ("orange", "down"): "a large orange circle moves down on a plain teal background",
}


def look(clip: np.ndarray) -> tuple[str, np.ndarray]:
    """Colour of the shape in a clip [t H W 3], and how far it moved, (x, y) in frames.

    The shape is what is unlike the background, whose colour most pixels have; its colour is the nearest of
    the world's, by most pixels.
    """
    behind = np.median(clip.reshape(-1, 3), 0)
    standing_out = np.abs(clip - behind).max(-1) > 0.5
    colours = np.array(list(source.COLOURS.values())) * 2 - 1
    nearest = np.abs(clip[standing_out][:, None] - colours).sum(-1).argmin(-1)
    name = list(source.COLOURS)[np.bincount(nearest, minlength=len(colours)).argmax()]
    like = standing_out & (np.abs(clip - colours[list(source.COLOURS).index(name)]).sum(-1) < 0.8)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    seen = [t for t in range(len(clip)) if like[t].sum() > 8]
    centres = [((like[t] * x).sum() / like[t].sum(), (like[t] * y).sum() / like[t].sum()) for t in seen]
    return name, np.subtract(centres[-1], centres[0]) if len(centres) > 1 else np.zeros(2)


def test_backgrounds_follow_their_prompts(generate):
    _, clips = generate(list(PROMPTS.values()))
    tones = np.array(list(source.TONES.values())) * 2 - 1
    middles = np.median(clips.reshape(len(clips), -1, 3), 1)
    found = [list(source.TONES)[np.abs(middle - tones).sum(-1).argmin()] for middle in middles]
    asked = [prompt.split()[-2] for prompt in PROMPTS.values()]
    # Measured 8 of 8.
    assert sum(map(str.__eq__, found, asked)) >= 7, found


def test_shapes_have_the_colours_of_their_prompts(generate):
    _, clips = generate(list(PROMPTS.values()))
    found = [look(clip)[0] for clip in clips]
    # Measured 8 of 8.
    assert sum(colour == asked for colour, (asked, _) in zip(found, PROMPTS, strict=True)) >= 6, found


@pytest.mark.xfail(
    strict=True, reason="106,000 samples on two cores: shapes do not yet move as they are told"
)
def test_shapes_move_as_their_prompts_say(generate):
    _, clips = generate(list(PROMPTS.values()))
    right = 0
    for (_, direction), clip in zip(PROMPTS, clips, strict=True):
        moved, heading = look(clip)[1], np.array(source.DIRECTIONS[direction])
        right += moved @ heading > 0.1 and abs(moved @ heading[::-1]) < abs(moved @ heading)
    assert right >= 6, f"{right} of 8 directions"


def test_a_kept_image_begins_the_video_bit_for_bit(generate, model):
    scenes = source.scenes(np.random.default_rng(3), 8)
    clips = np.asarray(source.moving_shapes(scenes, FRAMES, SIDE, SIDE))
    networks, params = model
    first = np.asarray(networks.encode(params, clips[:, :1]))
    latents, made = generate([source.caption(scenes, i) for i in range(8)], first)
    assert np.array_equal(latents[:, :1], first)
    # What follows belongs to it: the background of the last frame is that of the first.
    corners = np.abs(made[:, -1, :4, :4] - made[:, 0, :4, :4]).mean((1, 2, 3))
    assert np.median(corners) < 0.15


def test_it_says_the_same_in_bfloat16(model):
    """Relative L2 of the velocity; Wan's own bfloat16 is 3e-3 to 6e-3 away on the networks of the goldens."""
    networks, params = model
    side = SIDE // networks.vae.spatial
    x = jax.random.normal(jax.random.key(0), (1, 1 + FRAMES // 4, side, side, networks.dit.channels_in))
    text = networks.read(params, *byte_tokenizer(["a red circle moves right"], 128))
    timestep = jnp.linspace(0, 999, x.shape[1])[None]
    says = {}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(networks, dit=dataclasses.replace(networks.dit, dtype=dtype))
        says[dtype] = np.asarray(config.velocity(params, x, timestep, text))
    difference = np.linalg.norm(says["bfloat16"] - says["float32"])
    assert 0 < difference < 2e-2 * np.linalg.norm(says["float32"])


def test_the_program_makes_a_video_without_flags(tmp_path):
    command = [sys.executable, "-m", "fvdm_jax.sample", "--out", str(tmp_path / "a.mp4")]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert video.probe(tmp_path / "a.mp4")[:5] == ("video", "mov", SIDE, SIDE, FRAMES)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["prompt"] == SETTINGS["prompt"] and record["seconds"]["denoise"] > 0


def test_the_readmes_examples_run():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope: dict = {}
    for code in examples:
        exec(code, scope)  # noqa: S102
    assert scope["video"].shape == (1, FRAMES, SIDE, SIDE, 3) and np.all(np.isfinite(scope["video"]))
    levels = scope["curriculum"](500)(jax.random.key(0), 64, FRAMES)
    assert levels.shape == (64, FRAMES) and np.any(levels[:, 0] == 0)
