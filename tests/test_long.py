"""Files of prompts, long videos by windows and by a queue, and what a stop leaves of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_studio import made

from fvdm_jax import latents, programs, video
from fvdm_jax.commands import lines, parse
from fvdm_jax.program import Refusal, run
from fvdm_jax.sample import main

pytestmark = pytest.mark.usefixtures("alone")


def test_a_file_of_prompts_is_as_each_alone_and_compiles_once(here, model, monkeypatch):
    Path("three.jsonl").write_text(
        '{"prompt": "a red circle", "seed": 5}\n{"prompt": "a square", "keep": ["0=a.png:0.5"]}\n\n'
        '{"prompt": "a red circle", "negative": "blue"}\n'
    )
    compiled = []
    compile = programs.compiled
    monkeypatch.setattr(
        programs,
        "compiled",
        lambda say, lowered, what, *o: compiled.append(what) or compile(say, lowered, what, *o),
    )
    flags = ["--model", str(model)]
    assert run(main, [*flags, "--prompts", "three.jsonl", "--out", "v.mp4"]) == 0
    assert compiled.count("denoise (3x4x6)") == 1
    alone = made(model, "--prompt", "a square", "--keep", "0=a.png:0.5")
    assert np.array_equal(latents.load(Path("v-2.latents.safetensors")), alone)
    record = json.loads(Path("v-1.json").read_text())
    assert record["seed"] == 5 and record["prompts"] is None
    # What is there is left; what is missing is made again.
    again = [*flags, "--prompts", "three.jsonl", "--out", "v.mp4"]
    assert lines(parse(again)) == []
    Path("v-3.mp4").unlink()
    assert [one.out.name for one in lines(parse(again))] == ["v-3.mp4"]
    assert len(lines(parse([*again, "--overwrite"]))) == len(lines(parse([*again, "--explain"]))) == 3
    one, two = (json.loads(Path(f"v-{i}.json").read_text())["seconds"] for i in (1, 2))
    assert "load" in one and "compile" in one and two.get("load", 0) < one["load"]
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save("a.png")
    with pytest.raises(Refusal, match="video 2: --out: v-2.mp4 exists"):
        lines(parse(again))
    with pytest.raises(Refusal, match="video 1: --out: v-1.mp4 exists"):
        lines(parse([*again, "--steps", "2"]))


LONG = ["--length", "5", "--overlap", "1", "--anchors", "1", "--keep", "0=a.png"]


@pytest.mark.thorough
def test_a_long_video_goes_on_where_it_was_stopped(here, model, monkeypatch, capfd):
    """5 seconds at 8 a second are 11 latent frames: a window of 3, and 8 more of 1 new frame each."""
    Path("told.txt").write_text("a red circle\na square\n")
    flags = ["--model", str(model), *LONG, "--prompts", "told.txt"]
    assert run(main, [*flags, "--out", "whole.mp4"]) == 0, capfd.readouterr().err
    whole = latents.load(Path("whole.latents.safetensors"))
    assert whole.shape[1] == 11 and video.probe("whole.mp4").frames == 41
    first = made(model, "--prompt", "a red circle", "--keep", "0=a.png")
    assert np.array_equal(whole[:, :3], first)

    class Stop(Exception):
        pass

    add, count = latents.Reel.add, []

    def stopping(reel, piece):
        if len(count) == 4:
            raise Stop
        count.append(piece.shape[1])
        add(reel, piece)

    monkeypatch.setattr(latents.Reel, "add", stopping)
    assert run(main, [*flags, "--out", "cut.mp4"]) == 1
    assert count == [3, 1, 1, 1] and "6 of 11 latent frames are safe" in capfd.readouterr().err
    assert not Path("cut.mp4").exists() and Path("cut.latents.safetensors.part").exists()
    monkeypatch.setattr(latents.Reel, "add", add)
    assert run(main, [*flags, "--out", "cut.mp4"]) == 0
    assert "going on after latent frame 6 of 11" in capfd.readouterr().err
    assert np.array_equal(latents.load(Path("cut.latents.safetensors")), whole)
    assert not Path("cut.latents.safetensors.part").exists()
    one, two = (video.read(f"{name}.mp4", 41, (32, 48)) for name in ("whole", "cut"))
    assert np.array_equal(one, two)
    assert run(main, ["--decode", "whole.latents.safetensors", "--out", "again.mp4"]) == 0
    assert np.array_equal(video.read("again.mp4", 41, (32, 48)), one)
    assert json.loads(Path("again.json").read_text())["segments"] == ["a red circle", "a square"]
    capfd.readouterr()
    assert run(main, [*flags, "--explain"]) == 0
    assert "27 calls of the network in 9 windows; at most 2 frames" in capfd.readouterr().out


def test_a_reel_of_other_settings_is_begun_anew(tmp_path):
    path, shape = tmp_path / "a.latents.safetensors", (1, 4, 2, 2, 3)
    piece = np.arange(24, dtype=np.float32).reshape(1, 2, 2, 2, 3)
    with latents.Reel(path, shape, {"seed": 1}) as reel:
        reel.add(piece)
    with latents.Reel(path, shape, {"seed": 1}) as again:
        assert again.frames == 2 and np.array_equal(again.read(0, 2), piece)
    # A frame that is half there does not count.
    with open(again.part, "ab") as file:
        file.write(b"\0" * 7)
    with latents.Reel(path, shape, {"seed": 1}) as half:
        assert half.frames == 2
    # How work was laid out makes no other video; a seed does, and nothing of it is lost unasked.
    with latents.Reel(path, shape, {"seed": 1, "mesh": "data=2"}) as laid:
        assert laid.frames == 2
    with pytest.raises(Refusal, match="is of a video of other settings that was stopped"):
        latents.Reel(path, shape, {"seed": 2})
    with latents.Reel(path, shape, {"seed": 2}, replace=True) as other:
        assert other.frames == 0
        other.add(piece)
        other.add(np.concatenate([piece, piece], axis=1))
        other.finish()
    assert np.array_equal(latents.load(path), np.concatenate([piece, piece], axis=1))
    assert latents.probe(path).settings == {"seed": 2} and not other.part.exists()


@pytest.mark.thorough
def test_a_queue_makes_a_long_video(here, model, capfd):
    flags = [
        "--model",
        str(model),
        "--length",
        "3",
        "--schedule",
        "rolling",
        "--steps",
        "4",
    ]
    assert run(main, [*flags, "--out", "q.mp4"]) == 0, capfd.readouterr().err
    made = latents.load(Path("q.latents.safetensors"))
    assert (
        run(main, [*flags, "--out", "p.mp4"]) == 0
        and run(main, [*flags, "--out", "r.mp4", "--seed", "1"]) == 0
    )
    same, other = (latents.load(Path(f"{name}.latents.safetensors")) for name in "pr")
    assert made.shape[1] == 7 and np.isfinite(made).all() and np.array_equal(made, same)
    assert all(np.abs(made[:, i] - other[:, i]).max() > 0.1 for i in range(7))
    assert json.loads(Path("q.json").read_text())["overlap"] == 1
