"""From files as people have them to adapters that other programs read: every program once."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from flax.traverse_util import flatten_dict
from made import clip, damage

import convert.__main__
from fvdm_jax import checkpoint, runs, sample, train
from fvdm_jax.data import precompute, records
from fvdm_jax.program import Refusal

pytestmark = pytest.mark.thorough

GOLDEN = Path(__file__).parent / "golden"
CONFIG = """
from fvdm_jax.config import Training
from fvdm_jax.optimisers import Optimiser


def config(rate=1e-2, rank=4, **others):
    return Training(rank=rank, **{"optimizer": Optimiser(rate=rate), "steps": 6, "batch": 8, "held_out": 1,
                                  "evaluate_every": 6, "sample_every": 6, "mesh": "data=4,fsdp=2"} | others)
"""


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """A folder with a model and clips: real ones, a short, an odd, a slow, and a corrupt one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small.save(tmp_path / "model")
    Path("clips").mkdir()
    for name in ("real.mp4", "real.jpg"):
        shutil.copy(GOLDEN / name, "clips")
        Path("clips", name).with_suffix(".txt").write_text("as it was", "utf-8")
    clip("short.mp4", 3)
    clip("odd.mp4", 17, height=54, width=38)
    clip("slow.mp4", 12, fps=4)
    damage(clip("corrupt.mp4", 17), 4)
    Path("config.py").write_text(CONFIG)
    return tmp_path


def test_from_clips_to_adapters_for_other_programs(corpus, capsys):
    asked = ["clips", "--out", "records", "--model", "model", "--frames", "9", "--size", "32x48", "--images"]
    with pytest.raises(Refusal, match="2 of 6 files give no clip|1 of 6 files give no clip"):
        precompute.main(asked)
    precompute.main([*asked, "--report"])
    report = capsys.readouterr().out
    assert "short.mp4" in report and "odd.mp4" in report
    precompute.main([*asked, "--allow-drop", "--clips", "all"])
    found = records.load("records")
    names = {Path(entry.name).name.split("#")[0] for entry in found.entries}
    assert {"real.mp4", "odd.mp4", "slow.mp4"} <= names and not names & {"short.mp4", "corrupt.mp4"}

    run = ["config.py", "--model", "model", "--data", "records", "--out", "run"]
    if len({entry.bucket for entry in found.entries}) > 1:
        run += ["--held-out", "0", "--sample-every", "0"]
    assert train.main(run) == 0
    measured = runs.metrics(Path("run"))
    assert [line["step"] for line in measured if "loss" in line] == list(range(1, 7))
    assert train.main([*run, "--export", "lora"]) == 0
    assert "blocks/self_attn/q" in capsys.readouterr().out

    sample.main(["--model", "model", "--lora", "lora:1.0", "--out", "made.mp4"])
    sample.main(["--model", "model", "--out", "plain.mp4"])
    assert Path("made.mp4").read_bytes() != Path("plain.mp4").read_bytes()

    params = checkpoint.load(Path("model"), ("dit",))[1]["dit"]
    ours = checkpoint.load_adapters(Path("lora"), params)
    for layout in ("comfy", "pusa", "peft"):
        convert.__main__.main(["lora", layout, "--to", layout])
        (file,) = Path(layout).glob("*.safetensors")
        convert.__main__.main([str(file), f"again_{layout}"])
        again = checkpoint.load_adapters(Path(f"again_{layout}"), params)
        for path, array in flatten_dict(ours.low_rank, sep="/").items():
            np.testing.assert_array_equal(flatten_dict(again.low_rank, sep="/")[path], array)


def test_all_parameters_are_exported_as_a_model(corpus):
    precompute.main(
        ["clips/real.mp4", "clips/odd.mp4", "--out", "records", "--model", "model", "--clips", "all"]
    )
    run = ["config.py", "--model", "model", "--data", "records", "--out", "run", "--rank", "0"]
    run += ["--held-out", "0", "--average", "0.5", "--sample-every", "0"]
    assert train.main(run) == 0 and train.main([*run, "--export", "new"]) == 0
    networks, params = checkpoint.load(Path("new"))
    base = checkpoint.load(Path("model"))[1]
    assert networks == checkpoint.describe(Path("model"))
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), params, base)
    assert all(jax.tree.leaves(same["vae"])) and not all(jax.tree.leaves(same["dit"]))
    sample.main(["--model", "new", "--out", "made.mp4"])
    with pytest.raises(Refusal, match="--export: new exists"):
        train.main([*run, "--export", "new"])


def test_the_first_sample_is_the_base_models(corpus):
    precompute.main(
        ["clips/real.mp4", "clips/odd.mp4", "--out", "records", "--model", "model", "--clips", "all"]
    )
    run = ["config.py", "--model", "model", "--data", "records", "--steps", "2", "--evaluate-every", "0"]
    assert train.main([*run, "--out", "run"]) == 0
    assert train.main([*run, "--out", "fast", "--rate", "0.1"]) == 0
    names = [f"samples/step_{step:06d}_{task}.mp4" for step in (0, 2) for task in ("text", "image")]
    first, last = ([Path(out, name).read_bytes() for name in names] for out in ("run", "fast"))
    assert first[:2] == last[:2] and first[2] != last[2]
    assert first[0] != first[2]
