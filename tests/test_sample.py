"""The program as a user runs it, on a model with random weights that is smaller than the bundled one."""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from PIL import Image

from fvdm_jax import checkpoint, latents, video
from fvdm_jax.commands import parse
from fvdm_jax.program import Refusal, run
from fvdm_jax.progress import Stages
from fvdm_jax.projector import Projector
from fvdm_jax.request import TINY
from fvdm_jax.sample import main
from fvdm_jax.steps import key
from fvdm_jax.studio import Studio

OBJECTS = b"\x93NUMPY\x01\x00\x36\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}".ljust(
    64
) + bytes(8)


@pytest.fixture
def sample(model, here, capfd):
    """Runs the program in an empty folder that has two pictures; gives its exit code and what it printed."""

    def start(*argv: str):
        code = run(main, ["--model", str(model), *argv])
        return code, *capfd.readouterr()

    return start


def test_a_video_a_sheet_and_every_setting(sample):
    code, out, errors = sample(
        "--out", "out.mp4", "--seed", "7", "--prompt", "ein roter Kreis, größer", "--fps", "12"
    )
    assert code == 0, errors
    assert "3 latent frames   ···" in out
    assert "wrote out.mp4 out.png out.json out.latents.safetensors" in out
    assert video.probe("out.mp4")[:5] == ("video", "mov", 48, 32, 9)
    with Image.open("out.png") as sheet:
        assert sheet.size[0] > 3 * 48
    record = json.loads(Path("out.json").read_text("utf-8"))
    asked = {"seed": 7, "prompt": "ein roter Kreis, größer", "fps": 12, "steps": 3, "strength": [1.0] * 3}
    assert record.items() >= asked.items()
    stages = ["load", "compile", "text", "denoise", "decode", "write"]
    assert sorted(record["seconds"]) == sorted(stages) and min(record["seconds"].values()) > 0
    assert record["versions"]["jax"] == jax.__version__ and record["device"]
    assert "has 26 tokens and is cut to the model's 24" in errors and "denoise" in errors


def test_the_same_seed_is_the_same_video_and_another_is_not(sample):
    made = []
    for name, seed in (("one", "1"), ("two", "1"), ("three", str(2**33 + 1))):
        assert sample("--out", f"{name}.mp4", "--seed", seed)[0] == 0
        made.append(video.read(f"{name}.mp4", 9, (32, 48)))
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


@pytest.mark.thorough
def test_noise_may_be_a_files_ours_or_as_wan_has_it(sample):
    shape = (1, 3, 4, 6, 4)
    noise = np.asarray(jax.random.normal(key(1), shape))
    np.save("ours.npy", noise.astype(np.float64))
    np.save("wans.npy", noise[0].transpose(3, 0, 1, 2))
    made = []
    for name, flags in (
        ("seed", ["--seed", "1"]),
        ("ours", ["--noise-file", "ours.npy"]),
        ("wans", ["--noise-file", "wans.npy"]),
    ):
        code, _, said = sample("--out", f"{name}.mp4", *flags)
        assert code == 0, said
        made.append(latents.load(Path(f"{name}.latents.safetensors")))
    assert made[0].shape == shape and all(np.array_equal(made[0], other) for other in made[1:])
    # Made by the same noise or not, latents are decoded again.
    assert sample("--decode", "wans.latents.safetensors", "--out", "again.mp4")[0] == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.zeros((1, 3, 4, 6, 5)), r"holds float64 \[1, 3, 4, 6, 5\]; give floats of \[1, 3, 4, 6, 4\]"),
        (np.zeros((1, 3, 4, 6, 4), int), r"holds int64"),
        (np.full((1, 3, 4, 6, 4), np.nan), "numbers that are not finite"),
        (np.float32(3), r"holds float32 \[\]"),
    ],
)
def test_noise_that_is_none_is_refused(sample, content, said):
    np.save("noise.npy", content)
    code, _, errors = sample("--noise-file", "noise.npy", "--out", "out.mp4")
    assert code == 2 and re.fullmatch(f"error: --noise-file noise.npy: .*{said}.*\n", errors), errors
    assert not Path("out.mp4").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", OBJECTS],
    ids=["empty", "zip", "objects"],
)
def test_a_file_that_holds_no_numbers_is_no_noise(sample, content):
    Path("noise.npy").write_bytes(content)
    code, _, errors = sample("--noise-file", "noise.npy", "--out", "out.mp4")
    assert code == 2 and "is no .npy file of numbers" in errors and errors.count("\n") == 1


def test_small_seeds_are_jaxs():
    for seed in (0, 1, 2**32 - 1):
        assert np.array_equal(jax.random.key_data(key(seed)), jax.random.key_data(jax.random.key(seed)))


def shown(*argv: str) -> np.ndarray:
    """The pictures [t H W 3] of what these flags ask for, before they are written."""
    request = parse(argv)
    made = Studio([request], Stages()).clip(request)
    return np.stack(list(Projector(Stages()).pictures(request, [made])))


def reconstructed(model: Path, pixels: np.ndarray) -> np.ndarray:
    """The clip [t H W 3] as the VAE of the model shows it."""
    networks, params = checkpoint.load(model)
    latents = networks.encode(params, video.to_unit(pixels)[None])
    return video.to_pixels(networks.decode(params, latents))[0].astype(int)


def test_what_is_kept_is_in_the_video(sample, model):
    """A kept first frame comes out as the VAE alone shows it, whatever the others are."""
    keeps = ["--keep", "0=a.png", "--keep", "last=b.png:0.4"]
    pixels = shown("--model", str(model), *keeps)
    alone = reconstructed(model, video.read("a.png", 1, (32, 48)))
    assert np.abs(pixels[0] - alone[0]).max() <= 1
    assert sample("--out", "out.gif", *keeps)[0] == 0
    record = json.loads(Path("out.json").read_text())
    assert record["strength"] == [0.0, 1.0, 0.4] and record["seconds"]["encode"] > 0


@pytest.mark.thorough
def test_a_video_kept_whole_is_its_reconstruction(sample, model):
    noise = np.random.default_rng(1).integers(0, 255, (13, 32, 48, 3), dtype=np.uint8)
    video.write_mp4(Path("in.mp4"), noise, 8)
    pixels = shown("--model", str(model), "--keep", "0-2=in.mp4", "--steps", "1")
    assert np.abs(pixels - reconstructed(model, video.read("in.mp4", 9, (32, 48)))).max() <= 1


def test_explain_prints_the_matrix_and_makes_nothing(sample, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = sample("--explain", "--keep", "0=a.png", "--steps", "4")
    assert code == 0 and "█··" in out and len(out.splitlines()) == 1 + 2 + 1 + 5 + 2
    assert out.splitlines()[-1].startswith("4 calls of the network")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("solver", ["euler", "dpm++"])
def test_every_solver_and_no_guidance(sample, solver):
    code, _, errors = sample("--solver", solver, "--guidance", "1", "--steps", "2", "--out", "out.mp4")
    assert code == 0, errors


def test_existing_files_are_only_replaced_when_asked(sample):
    Path("out.json").write_text("mine")
    code, _, errors = sample("--out", "out.mp4")
    assert code == 2 and errors.startswith("error: --out: out.json exists") and errors.count("\n") == 1
    assert not Path("out.mp4").exists() and Path("out.json").read_text() == "mine"
    assert sample("--out", "out.mp4", "--overwrite")[0] == 0 and Path("out.json").read_text() != "mine"


def test_latents_are_written_first_and_decoded_again(sample):
    assert sample("--out", "one.mp4", "--keep", "0=a.png", "--seed", "3")[0] == 0
    code, out, errors = sample("--decode", "one.latents.safetensors", "--out", "two.mp4")
    assert code == 0 and "3 latent frames   █··" in out, errors
    assert np.array_equal(*(video.read(name, 9, (32, 48)) for name in ("one.mp4", "two.mp4")))
    told, record = (json.loads(Path(name).read_text("utf-8")) for name in ("one.json", "two.json"))
    assert record["seed"] == 3 and record["strength"] == told["strength"]
    assert "denoise" not in record["seconds"] and record["latents"] == "one.latents.safetensors"


def test_a_decode_that_fails_loses_nothing(sample, monkeypatch):
    def fails(*_):
        raise MemoryError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(Projector, "pictures", fails)
        code, _, errors = sample("--out", "one.mp4")
    assert code == 1 and "--decode one.latents.safetensors" in errors
    assert not Path("one.mp4").exists() and not Path("one.json").exists()
    assert sample("--decode", "one.latents.safetensors", "--out", "one.mp4")[0] == 0


@pytest.mark.thorough
def test_tiles_are_announced(sample, monkeypatch):
    monkeypatch.setattr("fvdm_jax.models.streaming.OVERLAP", 1)
    assert sample("--out", "one.mp4")[0] == 0
    code, _, errors = sample("--decode", "one.latents.safetensors", "--out", "two.mp4", "--tiles", "1x2")
    assert code == 0 and "note: frames are decoded in 1x2 blended tiles\n" in errors
    one, two = (video.read(name, 9, (32, 48)).astype(int) for name in ("one.mp4", "two.mp4"))
    assert 0 < np.abs(one - two).mean() < 40


@pytest.mark.thorough
def test_little_memory_brings_tiles(sample, monkeypatch):
    # Room for one of the smaller tiles: what a whole frame needs is more.
    monkeypatch.setattr("fvdm_jax.projector.machine.free", lambda device: 1.0)
    monkeypatch.setattr("fvdm_jax.models.streaming.OVERLAP", 1)
    code, _, errors = sample("--out", "one.mp4")
    assert code == 0 and "since whole ones do not fit in the 0.0 GiB that are free" in errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--decode none.safetensors", "No such file"),
        ("--decode a.png", "is no file of latents"),
        ("--decode cut.latents.safetensors", "is not a whole file"),
        ("--decode a.latents.safetensors --seed 4", "--seed: has no effect with --decode"),
        ("--decode a.latents.safetensors --tiles 2", "is not RxC"),
        ("--decode one.latents.safetensors --fps 0", "--fps: 0.0 is out of range"),
    ],
)
def test_what_cannot_be_decoded_is_refused(sample, model, flags, said):
    saved = model / "saved.latents.safetensors"
    if not saved.exists():
        assert sample("--out", str(saved.with_name("saved.mp4")))[0] == 0
    content = saved.read_bytes()
    Path("one.latents.safetensors").write_bytes(content)
    Path("cut.latents.safetensors").write_bytes(content[:-4])
    code, _, errors = sample(*flags.split(), "--out", "two.mp4")
    assert code == 2 and said in errors and errors.count("\n") == 1, errors
    assert not Path("two.mp4").exists()


def test_latents_of_another_model_are_refused(sample):
    assert sample("--out", "one.mp4")[0] == 0
    with pytest.raises(Refusal, match="holds latents .* of .*tiny they would be"):
        parse(["--decode", "one.latents.safetensors", "--model", str(TINY)])


@pytest.mark.parametrize(
    "change",
    [
        {"strength": ["a", 1, 1]}, {"strength": [0.5]}, {"strength": None},
        {"strength": [float("nan"), 1, 1]},
        {"size": "x"}, {"size": [32, 49]}, {"size": [48, 32]}, {"frames": 10}, {"frames": 13}, {"fps": 0},
        {"prompt": ["a"]}, {"prompt": "a\0b"}, {"keep": 7}, {"seed": -1},
        {"model": "nowhere"}, {"model": "a\0"},
    ],
)  # fmt: skip
def test_what_latents_say_of_themselves_is_checked(model, tmp_path, change):
    path = tmp_path / "a.latents.safetensors"
    settings = small.SAMPLING | {"seed": 0, "keep": [], "strength": [0, 1, 0.5], "model": str(model)}
    latents.save(path, np.zeros((1, 3, 4, 6, 4)), settings)
    flags = ["--decode", str(path), "--out", str(tmp_path / "a.mp4")]
    assert parse(flags).strength == [0, 1, 0.5]
    # What only the user may say is not taken from the file.
    latents.save(
        path, np.zeros((1, 3, 4, 6, 4)), settings | {"overwrite": True, "out": "x.mp4", "explain": True}
    )
    assert (parse(flags).overwrite, parse(flags).out.name, parse(flags).explain) == (False, "a.mp4", False)
    latents.save(path, np.zeros((1, 3, 4, 6, 4)), settings | change)
    with pytest.raises(Refusal):
        parse(flags)


def test_file_names_that_are_no_text_lose_nothing(sample):
    os.rename("a.png", b"caf\xe9.png")
    code, out, errors = sample("--keep", "0=caf\udce9.png", "--out", "o\udce9.mp4")
    assert code == 0, errors
    assert json.loads(Path("o\udce9.json").read_text("utf-8"))["keep"] == ["0=caf?.png"]
    assert sample("--decode", "o\udce9.latents.safetensors", "--out", "b.mp4")[0] == 2
    assert sample("--decode", "o\udce9.latents.safetensors", "--out", "c.mp4")[0] == 0


@pytest.mark.thorough
def test_a_prompt_is_encoded_once(sample, monkeypatch):
    assert sample("--out", "one.mp4", "--prompt", "once")[0] == 0
    loaded = []
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda folder, parts: loaded.extend(parts) or load(folder, parts))
    assert sample("--out", "two.mp4", "--prompt", "once")[0] == 0
    assert "text" not in loaded and np.array_equal(
        *(video.read(n, 9, (32, 48)) for n in ("one.mp4", "two.mp4"))
    )
    assert sample("--out", "three.mp4", "--prompt", "twice")[0] == 0 and "text" in loaded


@pytest.mark.parametrize("damage", ["cut", "scrambled", "another"])
def test_damaged_weights_are_refused(sample, model, tmp_path, damage):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    content = (copy / "vae.safetensors").read_bytes()
    other = {
        "cut": content[:-100],
        "scrambled": b"\xff" * 100,
        "another": (copy / "text.safetensors").read_bytes(),
    }
    (copy / "vae.safetensors").write_bytes(other[damage])
    code, out, errors = sample("--model", str(copy), "--out", "out.mp4")
    assert code == 2 and "vae.safetensors" in errors.splitlines()[-1], errors
    assert "Traceback" not in errors and not Path("out.mp4").exists()
