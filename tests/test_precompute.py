"""From clips and captions to records, as a user runs it, with a model smaller than the bundled one."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from made import clip, damage, moving, pictures
from PIL import Image
from safetensors.numpy import load_file

from fvdm_jax import checkpoint, video
from fvdm_jax.data import precompute
from fvdm_jax.data.encoder import identity
from fvdm_jax.data.feed import NOTHING
from fvdm_jax.data.job import parse, parser
from fvdm_jax.data.records import Reader, load, verify
from fvdm_jax.models.tokenizer import byte_tokenizer
from fvdm_jax.program import run

ROOT = Path(__file__).resolve().parents[1]
# Latents of a batch on several devices and of a clip alone are rounded differently, then to bfloat16.
ROUNDING = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 1e-4}


@pytest.fixture
def encode(model, tmp_path, monkeypatch, capfd):
    """Runs the program, clip by clip, in an empty folder with a folder of clips; gives code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(model / "cache"))
    Path("clips").mkdir()

    def start(*argv: str):
        code = run(precompute.main, ["--model", str(model), "--batch", "1", *argv])
        return code, *capfd.readouterr()

    return start


def records(folder: str = "enc") -> dict:
    """The records of a folder by the last part of their names."""
    manifest = verify(folder)
    reader = Reader(manifest)
    return {entry.name.rpartition("/")[2]: reader.read(entry) for entry in manifest.entries}


@functools.cache
def networks(model: Path) -> tuple:
    """The VAE's and the text encoder's functions, compiled once for each shape, and their parameters."""
    described, params = checkpoint.load(model, ("vae", "text"))
    return jax.jit(described.encode), jax.jit(described.read), params


def encoded(model: Path, pixels: np.ndarray) -> np.ndarray:
    """The latents [f h w c] of a clip [t H W 3] alone."""
    encode, _, params = networks(model)
    return np.asarray(encode(params, video.to_unit(pixels)[None])[0])


def compare(stored: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Checks that an array was stored as the type says, and is what is expected up to its rounding."""
    assert stored.dtype == jnp.dtype(dtype) and stored.shape == expected.shape
    bound = ROUNDING[dtype] * np.abs(expected).max()
    assert np.abs(stored.astype(np.float32) - expected).max() <= bound


def states(model: Path, caption: str) -> np.ndarray:
    """The states [l e] of a caption, padded."""
    _, read, params = networks(model)
    return np.asarray(read(params, *byte_tokenizer([caption], small.NETWORKS.text.length))[0])


def test_records_are_what_the_networks_say_of_what_video_reads(encode, model):
    clip("a.mp4", 30, 12)
    clip("ü größe.mp4", 9, height=64, width=48, caption="größer")
    video.write_gif(Path("clips/g.gif"), moving(11, 32, 48), 10)
    drawn = pictures("clips/s", range(9))
    Image.fromarray(drawn[0]).save("one.png")
    cut = ["--size", "32x48,48x32", "--clips", "all", "--fps-in", "8", "--caption", "any"]
    code, out, errors = encode("clips", "one.png", *cut, "--out", "enc")
    assert code == 0, errors
    assert "5 files: 6 clips of 5, none of 0" in out and "0 of 6 already encoded" in out
    assert "wrote 6 records; enc holds 6" in out and "step 6 of 6" in errors
    found, wide = records(), (32, 48)
    expected = {
        "a.mp4#0-8": ("it moves", video.read("clips/a.mp4", 9, wide, 0, 8.0)),
        "a.mp4#9-17": ("it moves", video.read("clips/a.mp4", 9, wide, 9, 8.0)),
        "ü größe.mp4": ("größer", video.read("clips/ü größe.mp4", 9, wide[::-1], 0, 8.0)),
        "g.gif": ("any", video.read("clips/g.gif", 9, wide, 0, 8.0)),
        "s": ("any", np.stack(drawn)),
        "one.png": ("any", drawn[0][None]),
    }
    assert found.keys() == expected.keys()
    for name, (caption, pixels) in expected.items():
        assert found[name].caption == caption and len(found[name].states) == len(caption.encode()) + 1
        compare(found[name].latents, encoded(model, pixels), "bfloat16")
        compare(found[name].states, states(model, caption)[: len(found[name].states)], "bfloat16")
    compare(load_file(f"enc/{NOTHING}")["states"], states(model, "")[:1], "bfloat16")
    header = load("enc").header
    assert (header.fps, header.model, header.text_length) == (8, identity(model), 24)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_records_are_of_the_type_asked_for(encode, model, dtype):
    path = clip("a.mp4")
    assert encode("clips", "--out", "enc", "--dtype", dtype)[0] == 0
    (record,) = records().values()
    compare(record.latents, encoded(model, video.read(path, 9, (32, 48))), dtype)
    compare(record.states, states(model, "it moves")[:9], dtype)


@pytest.mark.thorough
def test_a_batch_is_filled_and_shared_by_devices(encode):
    """Three clips in batches of one, two and eight, of which the last lies on all devices."""
    for seed in range(3):
        clip(f"{seed}.mp4", seed=seed)
    for batch in ("1", "2", "8"):
        assert encode("clips", "--out", f"enc{batch}", "--batch", batch, "--dtype", "float32")[0] == 0
    alone, two, eight = (records(f"enc{batch}") for batch in (1, 2, 8))
    for name, record in alone.items():
        for other in (two, eight):
            assert np.allclose(other[name].latents, record.latents, rtol=1e-4, atol=1e-4)
    assert jax.local_device_count() == 8


def test_a_second_run_has_nothing_to_do_and_a_third_only_what_is_new(encode):
    clip("a.mp4"), clip("b.mp4", seed=1, caption="it goes")
    assert encode("clips", "--out", "enc")[0] == 0
    before, made = records(), Path("enc/manifest-00000.json").stat().st_mtime_ns
    code, out, _ = encode("clips", "--out", "enc")
    assert code == 0 and "2 of 2 already encoded" in out and "wrote 0 records; enc holds 2" in out
    assert Path("enc/manifest-00000.json").stat().st_mtime_ns == made
    clip("c.mp4", seed=2)
    Path("clips/b.txt").write_text("it went")
    code, out, _ = encode("clips", "--out", "enc")
    assert code == 0 and "1 of 3 already encoded" in out and "1 older records" in out
    assert "wrote 2 records; enc holds 3" in out
    after = records()
    assert {name: record.caption for name, record in after.items()} == {
        "a.mp4": "it moves", "b.mp4": "it went", "c.mp4": "it moves",
    }  # fmt: skip
    assert np.array_equal(after["b.mp4"].latents, before["b.mp4"].latents)
    # What has been replaced can come back, and another content is another clip.
    Path("clips/b.txt").write_text("it goes")
    clip("c.mp4", seed=3)
    code, out, _ = encode("clips", "--out", "enc")
    assert code == 0 and "1 of 3 already encoded" in out and "wrote 2 records; enc holds 3" in out
    assert records()["b.mp4"].caption == "it goes"
    # What other folders hold stays.
    os.rename("clips", "others")
    os.mkdir("clips")
    clip("d.mp4", seed=4)
    assert "enc holds 4" in encode("clips", "--out", "enc")[1]


@pytest.mark.thorough
def test_a_run_that_is_killed_goes_on(encode, model):
    """kill -9 amid: the next run encodes only what is missing, and the result is that of one run."""
    for index in range(60):
        Image.fromarray(moving(1, 32, 48, index)[0]).save(f"clips/p{index}x.png")
    argv = ["clips", "--images", "--caption", "a picture", "--shard", "0"]
    command = [
        sys.executable,
        "-m",
        "fvdm_jax.data.precompute",
        *argv,
        "--model",
        str(model),
        "--batch",
        "1",
        "--out",
        "enc",
    ]
    environment = os.environ | {"XLA_FLAGS": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while len(list(Path("enc").glob("*.arrayrecord"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    begun = len(load("enc").entries)
    assert 2 <= begun < 60
    kept = {path.name: path.stat().st_ino for path in Path("enc").glob("*.arrayrecord")}
    code, out, errors = encode(*argv, "--out", "enc")
    assert code == 0, errors
    assert f"{begun} of 60 already encoded" in out and f"wrote {60 - begun} records; enc holds 60" in out
    listed = [entry.shard for entry in load("enc").entries][:begun]
    assert all(Path("enc", name).stat().st_ino == kept[name] for name in listed)
    assert not [path for path in Path("enc").iterdir() if path.name.startswith(".")]
    assert encode(*argv, "--out", "whole")[0] == 0
    one, other = records("enc"), records("whole")
    assert one.keys() == other.keys()
    for name, record in one.items():
        assert record.caption == other[name].caption
        # Those of before were encoded by a process with one device, and may be rounded otherwise.
        compare(record.latents, other[name].latents.astype(np.float32), "bfloat16")


def test_nothing_is_left_out_in_silence(encode):
    clip("a.mp4"), clip("b.mp4", 3), clip("c.mp4", caption=None)
    code, out, errors = encode("clips", "--out", "enc")
    last = errors.splitlines()[-1]
    assert code == 2 and "3 files: 1 clips of 1, none of 2" in out
    assert last.startswith("error: clips/b.mp4: 2 of 3 files give no clip; the first: is too short: 3 frames")
    assert "--report" in last and "--allow-drop" in last and not Path("enc").exists()
    code, out, _ = encode("clips", "--report")
    assert code == 0 and "has no caption" in out and "is too short" in out and "9x32x48" in out
    assert not Path("enc").exists()
    code, out, _ = encode("clips", "--out", "enc", "--allow-drop")
    assert code == 0 and list(records()) == ["a.mp4"]
    os.remove("clips/a.mp4")
    assert "gives no clip, and no other does" in encode("clips", "--out", "enc", "--allow-drop")[2]


def test_a_file_that_is_found_damaged_late_stops_the_run_or_is_named(encode):
    clip("a.mp4"), clip("c.mp4", seed=1)
    damage(clip("b.mp4", 30, seed=2), 4)
    argv = ["clips", "--out", "enc"]
    code, _, errors = encode(*argv)
    last = errors.splitlines()[-1]
    assert code == 2 and last.startswith("error: clips/b.mp4") and "--allow-drop" in last
    assert list(records()) == ["a.mp4"]
    code, out, errors = encode(*argv, "--allow-drop")
    assert code == 0 and "1 of 3 already encoded" in out and "wrote 1 records; enc holds 2" in out
    assert "note: left out: " in errors and "clips/b.mp4" in errors.split("left out")[1]
    assert list(records()) == ["a.mp4", "c.mp4"]


@pytest.mark.thorough
def test_processes_share_the_files(encode):
    for seed in range(5):
        clip(f"{seed}.mp4", seed=seed)
    assert "wrote 3 records; enc holds 3" in encode("clips", "--out", "enc", "--process", "0/2")[1]
    assert "wrote 2 records; enc holds 5" in encode("clips", "--out", "enc", "--process", "1/2")[1]
    # Alone, a process takes over, also what the other has encoded.
    Path("clips/1.txt").write_text("it went")
    code, out, _ = encode("clips", "--out", "enc")
    assert code == 0 and "4 of 5 already encoded" in out and "enc holds 5" in out
    assert {record.caption for record in records().values()} == {"it moves", "it went"}


@pytest.mark.parametrize(
    "argv, where, what",
    [
        (["clips"], "--out", "is missing"),
        (["gone", "--out", "e"], "gone", "is no file"),
        (["clips", "--out", "clips/a.mp4"], "--out", "is no folder"),
        (["clips", "--out", "e", "--frames", "9,8"], "--frames", "8 is not of the form 1 + 4n"),
        (["clips", "--out", "e", "--frames", "x"], "--frames", "is not a whole number"),
        (["clips", "--out", "e", "--size", "32"], "--size", "is not HxW"),
        (["clips", "--out", "e", "--size", "32x48,foo"], "--size", "'foo' is not HxW"),
        (["clips", "--out", "e", "--size", "30x40"], "--size", "not a multiple of 16"),
        (["clips", "--out", "e", "--fps", "0"], "--fps", "out of range"),
        (["clips", "--out", "e", "--fps-in", "0"], "--fps-in", "out of range"),
        (["clips", "--out", "e", "--clips", "0"], "--clips", "is no number of clips"),
        (["clips", "--out", "e", "--process", "2/2"], "--process", "is not I/N"),
        (["clips", "--out", "e", "--batch", "0"], "--batch", "not a possible number"),
        (["clips", "--out", "e", "--shard", "-1"], "--shard", "out of range"),
        (["clips", "--out", "e", "--crop", "left"], "--crop", "left"),
        (["clips", "--out", "/proc/e"], "/proc/e", "cannot be made"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(encode, argv, where, what):
    clip("a.mp4")
    code, _, errors = encode(*argv)
    last = errors.splitlines()[-1]
    assert code == 2 and last.startswith(f"error: {where}:") and what in last
    assert not Path("e").exists()


def test_another_cut_needs_another_folder(encode):
    clip("a.mp4")
    assert encode("clips", "--out", "enc")[0] == 0
    code, _, errors = encode("clips", "--out", "enc", "--fps", "7", "--frames", "5")
    assert code == 2 and "fps is 8.0, not 7.0" in errors and "into another folder" in errors


def test_a_model_needs_what_encodes_and_no_more(encode, model):
    """As of Wan 2.2, whose transformers are two."""
    clip("a.mp4")
    shutil.copytree(model, "other", ignore=shutil.ignore_patterns("cache", "dit*"))
    config = json.loads(Path("other/config.json").read_text())
    del config["dit"]
    for change, what in (
        ({"text": ...}, "other has no text"),
        ({"vae": 3}, "is no config of a model"),
        ({"sampling": {"frames": 9, "fps": 8}}, "--size: is missing"),
        ({}, ""),
    ):
        stored = {name: value for name, value in (config | change).items() if value is not ...}
        Path("other/config.json").write_text(json.dumps(stored))
        code, _, errors = encode("clips", "--out", "e", "--model", "other")
        assert (code, what in errors) == (2 if what else 0, True), errors
    assert identity(Path("other")) == identity(model) == load("e").header.model
    os.remove("other/vae.safetensors")
    assert "has no vae.safetensors" in encode("clips", "--out", "e", "--model", "other")[2]


def test_a_full_disk_is_refused(encode, monkeypatch):
    clip("a.mp4")
    monkeypatch.setattr(precompute, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 0))
    code, _, errors = encode("clips", "--out", "deep/er/enc")
    assert code == 2 and "error: --out: the records need" in errors and "are free" in errors


def test_a_run_stops_when_told_to_and_keeps_what_it_has(encode, monkeypatch):
    for seed in range(3):
        clip(f"{seed}.mp4", seed=seed)
    batches, asked = precompute._batches, []

    def interrupted(items, most):
        for batch in batches(items, most):
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(batch)
            yield batch

    monkeypatch.setattr(precompute, "_batches", interrupted)
    code, _, errors = encode("clips", "--out", "enc")
    assert code == 130 and errors.splitlines()[-1] == "stopped"
    assert len(load("enc").entries) == 2


def test_the_flags_are_those_agreed():
    """A flag is a promise; adding, renaming or removing one changes this list first."""
    assert sorted(parser()._option_string_actions) == sorted(
        "-h --help --debug --out --model --frames --size --fps --fps-in --clips --crop --images --caption"
        " --report --allow-drop --dtype --batch --process --distributed --shard".split()
    )


def test_the_rate_is_the_same_whoever_says_it(model):
    said = [parse(["c", "--report", "--model", str(model), *more]).cut for more in ([], ["--fps", "8"])]
    assert said[0] == said[1] and isinstance(said[0].fps, float)
