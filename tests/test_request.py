"""What a user may ask for, and how everything else is refused."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small

from fvdm_jax import video
from fvdm_jax.commands import parse
from fvdm_jax.explain import explain, picture
from fvdm_jax.program import Refusal

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = small.SAMPLING | {"frames": 33, "size": [64, 64], "steps": 20}


def stored(sampling: dict, **vae) -> dict:
    """What the folder of a model says of it, as far as this program reads it before jax is there."""
    parts = {"dit": {"channels_in": 4, "channels_out": 4, "text_width": 16}, "text": {"width": 16}}
    return parts | {"sampling": sampling, "vae": {"latent": 4, "patch": 2, "temporal": [True, True]} | vae}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model's settings, two images and two clips, which is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(stored(SAMPLING)))
    for name in ("dit", "vae", "text"):
        Path(f"model/{name}.safetensors").write_bytes(b"")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 32, 48, 3), dtype=np.uint8)
    from PIL import Image

    for name in ("a.png", "b.jpg", "odd:0.5.png"):
        Image.fromarray(pixels[0]).save(name)
    video.write_mp4(Path("short.mp4"), pixels[:9], SAMPLING["fps"])
    video.write_mp4(Path("long.mp4"), pixels, SAMPLING["fps"])
    Path("notes.txt").write_text("hello")
    Path("rows.json").write_text(json.dumps([[1.0] * 9, [0.0] * 9]))
    return tmp_path


def ask(*argv: str):
    return parse(["--model", "model", *argv])


def test_a_video_without_flags_is_as_the_model_has_it(place):
    request = ask()
    assert request.prompt == "a red circle" and request.size == (64, 64) and request.frames == 33
    assert request.latent_frames == 9 and request.strength == [1.0] * 9
    assert [path.name for path in request.outputs] == ["fvdm.mp4", "fvdm.png", "fvdm.json"]


def test_flags_go_before_the_model(place):
    request = ask(
        "--steps", "4", "--size", "32x48", "--solver", "dpm++", "--seed", str(2**64 - 1), "--prompt="
    )
    assert (request.steps, request.size, request.solver, request.prompt) == (4, (32, 48), "dpm++", "")
    assert request.seed == 2**64 - 1 and json.dumps(request.settings)


def test_a_model_may_have_a_schedule_which_flags_and_presets_go_before(place):
    assert ask().schedule == "together"
    Path("model/config.json").write_text(json.dumps(stored(SAMPLING | {"schedule": "pyramid:lag=2"})))
    assert ask().schedule == "pyramid:lag=2" and ask("--schedule", "random").schedule == "random"
    assert ask("--preset", "wan-t2v").schedule == "together"


def test_the_models_example_is_not_told_of_files_that_are_kept(place):
    assert ask("--keep", "0=a.png").prompt == ""
    assert ask("--keep", "0=a.png", "--prompt", "a cat").prompt == "a cat"


KEPT = {
    "an image": (["0=a.png"], "0········"),
    "the last": (["last=b.jpg"], "········0"),
    "loosened": (["3=a.png:0.3"], "···3·····"),
    "ignored": (["3=a.png:1"], "·········"),
    "start and end": (["last=b.jpg:0.5", "0=a.png"], "0·······5"),
    "a colon in the name": (["0=odd:0.5.png"], "0········"),
    "a clip": (["0=short.mp4"], "000······"),
    "a clip at the end": (["last=short.mp4:0.25"], "······222"),
    "a long clip takes half": (["0=long.mp4"], "0000·····"),
    "two long clips a quarter each": (["0=long.mp4", "last=long.mp4"], "00·····00"),
    "a frame of the video": (["p9=a.png"], "···0·····"),
    "its first frames": (["p0=a.png", "p5=b.jpg:0.2"], "0·2······"),
    "loosened less and less": (["4=a.png:0.6-0.1"], "····6····"),
    "a range": (["0-6=long.mp4"], "0000000··"),
    "a range to the last": (["7-last=short.mp4"], "·······00"),
    "completion": (["0=a.png", "2-3=short.mp4:0.1", "6=b.jpg"], "0·11··0··"),
    "a clip up to an image": (["0=long.mp4", "3=a.png"], "0000·····"),
}


@pytest.mark.parametrize("keeps, strength", KEPT.values(), ids=KEPT)
def test_what_is_kept(place, keeps, strength):
    request = ask(*(part for keep in keeps for part in ("--keep", keep)))
    assert "".join("·" if s == 1 else str(int(10 * s)) for s in request.strength) == strength


def test_a_video_goes_on_from_the_end_of_a_clip_and_leads_to_the_beginning_of_one(place):
    (keep,) = ask("--keep", "0=long.mp4").keeps
    assert (keep.first, keep.count, keep.frames, keep.skip) == (0, 4, 13, 47)
    assert keep.note == "note: of long.mp4 frames 47 to 59 of 60 are used"
    (keep,) = ask("--keep", "last=long.mp4").keeps
    assert (keep.first, keep.count, keep.frames, keep.skip) == (5, 4, 13, 0)
    (keep,) = ask("--keep", "2=long.mp4").keeps
    assert (keep.first, keep.skip) == (2, 0)
    assert ask("--keep", "0=short.mp4").keeps[0].note == ask("--keep", "0=a.png").keeps[0].note == ""
    # At more frames a second than it has, some of it would be shown twice, and nobody asked for that.
    note = ask("--keep", "0=short.mp4", "--fps", "24").keeps[0].note
    assert note.endswith("some frames are shown twice, as it has 8 a second (--fps sets the rate)")
    assert "twice" not in ask("--keep", "0=short.mp4", "--fps", "4").keeps[0].note


def test_what_is_read_is_known_by_size_and_time_while_it_may_go(place):
    """Settings are those of the files as they were, and others of the same names are not the same."""
    Path("lora/adapters").mkdir(parents=True)
    Path("lora/adapters/weights").write_bytes(b"a")
    flags = ["--keep", "0=a.png", "--schedule", "rows.json", "--lora", "lora"]
    request = ask(*flags)
    told = request.settings
    weights = [str(place / f"model/{name}.safetensors") for name in ("dit", "vae", "text")]
    assert list(told["files"]) == ["a.png", "lora/adapters", "rows.json", *weights]
    for path, other in (
        ("rows.json", b"[[1,1,1,1,1,1,1,1,1],[0,0,0,0,0,0,0,0,0]]"),
        ("lora/adapters/weights", b"bc"),
    ):
        before = ask(*flags).settings
        Path(path).write_bytes(other)
        assert ask(*flags).settings["files"] != before["files"]
    before = ask(*flags).settings
    os.utime("model/vae.safetensors", (1, 1))
    assert ask(*flags).settings["files"] != before["files"] and request.settings == told
    Path("a.png").unlink()
    assert request.settings == told


def test_strengths_of_a_preset_count_loras_of_both_experts(place):
    for name in ("light", "high", "low"):
        Path(name, "adapters").mkdir(parents=True)
    told = stored(SAMPLING | {"boundary": 0.875})
    Path("model/config.json").write_text(
        json.dumps(told | {"dit_high": told["dit"], "dit_low": told.pop("dit")})
    )
    for name in ("dit_high", "dit_low"):
        Path(f"model/{name}.safetensors").write_bytes(b"")
    flags = "--preset pusa-wan22-lightning --lora light --lora high=high --lora low=low".split()
    assert [strength for _, strength, _ in ask(*flags).lora] == [1.0, 1.4, 1.4]
    flags = "--preset pusa-wan22-lightning --lora high=high --lora low=low --lora light".split()
    assert [strength for _, strength, _ in ask(*flags).lora] == [1.0, 1.0, 1.4]


BAD = {
    "--steps 0": "--steps: 0 is not a possible number",
    "--steps 2.5": "--steps: '2.5' is not a whole number",
    "--frames 32": "--frames: 32 is not of the form 1 \\+ 4n; give 29 or 33",
    "--frames -3": "--frames: -3",
    "--size 60x64": "--size: 60x64 has a side that is not a multiple of 16; the nearest is 64x64",
    "--size 64": "--size: '64' is not HxW",
    "--size 0x64": "--size: 0x64 is out of range",
    "--shift nan": "--shift: 'nan' is not a finite number",
    "--shift 0": "--shift: 0.0 is out of range; give a number from 0.01",
    "--guidance -1": "--guidance: -1.0 is out of range",
    "--solver heun": "--solver: invalid choice: 'heun'",
    "--seed -1": "--seed: -1 is not a possible number",
    "--seed 18446744073709551616": "--seed: 18446744073709551616 is not",
    "--fps 0": "--fps: 0.0",
    "--fps 0.0004": "--fps: 0.0004 is out of range",
    "--fps 100 --out a.gif": "--out: a GIF has at most 50 frames a second, not 100",
    "--promt x": "--promt: is no flag; the nearest is --prompt",
    "--keep a.png": "--keep a.png: has no =FILE",
    "--keep 9=a.png": "--keep 9=a.png: 9 is outside the video's 9 latent frames; give 0 to 8, last",
    "--keep=-1=a.png": "--keep -1=a.png: '-1' is no latent frame",
    "--keep 0=a.png:1.5": "--keep 0=a.png:1.5: the strength 1.5 is outside 0 to 1",
    "--keep 0=a.png:nan": "--keep 0=a.png:nan: the strength nan is outside 0 to 1",
    "--keep 0=a.png:0.5-2": "--keep 0=a.png:0.5-2: the strength 0.5-2 is outside 0 to 1",
    "--keep p33=a.png": "--keep p33=a.png: p33 is outside the video's 9 latent frames",
    "--keep 4-0=short.mp4": "--keep 4-0=short.mp4: 4-0 runs backwards",
    "--keep 0=": "--keep 0=: names no file",
    "--version": "--version: is no flag; --help lists the flags",
    "--keep 0=none.png": "--keep 0=none.png: the file cannot be read: No such file",
    "--keep 0=notes.txt": "--keep 0=notes.txt: the file is neither an image nor a video; give a PNG",
    "--keep 0=model": "--keep 0=model: the file is a folder",
    "--keep 0-1=a.png": "--keep 0-1=a.png: an image stands for one latent frame",
    "--keep 0-5=short.mp4": "--keep 0-5=short.mp4: 21 frames needed at the video's rate, 9 found; 0-2 is the",
    "--keep 0=a.png --keep 0=b.jpg": "--keep 0=b.jpg: latent frame 0 is already given by --keep 0=a.png",
    "--keep 0=http://x/a.png": "the file is an address on a network",
    "--out a.avi": "--out: a.avi ends in neither .mp4 nor .gif",
    "--out nowhere/a.mp4": "--out: nowhere/a.mp4 cannot be written",
    "--out short.mp4": "--out: short.mp4 exists; give another name, or --overwrite",
    "--out short.mp4 --overwrite --keep 0=short.mp4": "--out: short.mp4 would replace a file that is read",
    "--out rows.mp4 --overwrite --schedule rows.json": "--out: rows.json would replace a file that is read",
    "--model none": "--model: none/config.json cannot be read",
}  # fmt: skip


@pytest.mark.parametrize("argv, message", BAD.items(), ids=BAD)
def test_everything_else_is_refused_by_name(place, argv, message):
    before = sorted(place.rglob("*"))
    with pytest.raises(Refusal, match="^error: .*" + message.replace("error: ", "")) as refused:
        ask(*argv.split(" "))
    assert "\n" not in str(refused.value)
    assert sorted(place.rglob("*")) == before


SETTINGS = {
    "a list": ("[]", "has no settings under 'sampling'"),
    "half": ("{", "is not JSON"),
    "a stranger": (json.dumps(stored(SAMPLING | {"speed": 3})), "'sampling' holds speed"),
    "a word": (json.dumps(stored(SAMPLING | {"steps": "many"})), r"sampling\.steps: many is not a possible"),
    "a process": (json.dumps(stored(SAMPLING | {"process": "x"})), r"sampling\.process: x is unknown"),
    "a schedule": (
        json.dumps(stored(SAMPLING | {"schedule": "x"})),
        r"sampling\.schedule: x cannot be: 'x' is",
    ),
    "too little": (json.dumps(stored({"steps": 3})), r"sampling\.\w+: is missing; add it there"),
}


@pytest.mark.parametrize("content, message", SETTINGS.values(), ids=SETTINGS)
def test_a_models_settings_are_checked_like_flags(place, content, message):
    Path("model/config.json").write_text(content)
    with pytest.raises(Refusal, match=message):
        ask()


def test_sides_are_multiples_of_what_the_model_needs(place):
    Path("model/config.json").write_text(json.dumps(stored(SAMPLING, temporal=[False, True, True])))
    with pytest.raises(
        Refusal, match="--size: 48x64 has a side that is not a multiple of 32; the nearest is"
    ):
        ask("--size", "48x64")
    assert ask("--size", "64x96").size == (64, 96)


def test_a_model_without_its_weights_is_refused(place):
    Path("model/vae.safetensors").unlink()
    with pytest.raises(Refusal, match="--model: model has no vae.safetensors"):
        ask()


@pytest.mark.parametrize(
    "argv", [["--steps", "0"], ["--keep", "0=none.png"], ["--flames", "3"], ["--size", "1x1"]]
)
def test_a_refusal_takes_less_than_a_second_and_no_jax(place, argv):
    """Run as a user would; -X importtime lists every module that was imported.

    CPU time of the process, since the machine may be busy; wall time was 0.15 s on an idle one.
    """
    command = [sys.executable, "-X", "importtime", "-m", "fvdm_jax.sample", "--model", str(place / "model")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == "" and len(lines) == 1 and lines[0].startswith("error: --")
    assert not [line for line in done.stderr.splitlines() if line.rstrip().endswith((" jax", " flax", " av"))]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_picture_of_what_is_kept():
    assert (
        picture([0, 1, 0.4, 1]) == "4 latent frames   █·▒·      █ kept   ▒ kept, loosened 0.4   · generated"
    )
    assert picture([1]) == "1 latent frame   ·      · generated"


def test_the_explanation_is_the_matrix():
    rows = [[1, 0, 0.5], [0.25, 0, 0.125], [0, 0, 0]]
    lines = explain(rows).splitlines()
    assert [line.split()[:4] for line in lines[3:]] == [
        ["start", "1", "0", ".50"],
        ["1", ".25", "0", ".12"],
        ["2", "0", "0", "0"],
    ]
    wide = explain([[1.0] * 40, [0.0] * 40])
    assert "At a glance" in wide and "█" * 40 in wide and max(map(len, wide.splitlines())) < 200
