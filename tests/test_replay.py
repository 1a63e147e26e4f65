"""Steps of a run made again: the same bits, or the first array and device that has others."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small
from small import train
from test_faults import SETTINGS

from fvdm_jax import integrity, saving, trainer
from fvdm_jax.presence import Presence
from fvdm_jax.program import Refusal
from fvdm_jax.train import parse, sizes

# Two runs of training, and their replays.
pytestmark = pytest.mark.thorough
FLAGS = "--steps", "12", "--save-every", "4", "--evaluate-every", "0", "--mesh", "data=2,fsdp=4"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return small.training(tmp_path_factory.mktemp("config"), **SETTINGS)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(config, out, *FLAGS) == 0
    return out


def content(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.fault("T18")
def test_a_sound_run_says_the_same_again(whole, config, capsys):
    """Between two checkpoints, from the start, and after the last one; while a run has the folder, too."""
    place, before = Presence(whole), content(whole)
    place.take()
    spans = {"8": (5, 8), "3": (1, 4)}
    for step, (first, last) in spans.items():
        assert train(config, whole, *FLAGS, "--replay", step) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[-1] == f"steps {first} to {last} are the same twice, to the bit, and what was saved"
    assert train(config, whole, *FLAGS, "--replay", "14") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "steps 13 to 14 are the same twice, to the bit"
    place.leave()
    assert content(whole) == before


def tampered(config: Path, out: Path, at: int) -> str:
    """Saves the state of a step again with one bit altered, as a faulty chip would have: its path."""
    asked = parse([str(config), "--out", str(out), "--synthetic", *FLAGS])
    made = trainer.build(asked.settings, sizes(asked))
    checkpoints = saving.Checkpoints(out, asked.settings)
    state, position = checkpoints.restore(made.state, only=at)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state.params)
    number = max(range(len(leaves)), key=lambda i: leaves[i][1].size)
    path, leaf = leaves[number]
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    last = (leaf.shape[0] - 1,) + (0,) * (leaf.ndim - 1)
    altered = jax.lax.bitcast_convert_type(bits.at[last].set(bits[last] ^ jnp.uint32(1)), jnp.float32)
    every = [each for _, each in leaves]
    every[number] = jax.device_put(altered, leaf.sharding)
    shutil.rmtree(out / saving.CHECKPOINTS / str(at))
    checkpoints.close()
    checkpoints = saving.Checkpoints(out, asked.settings)
    checkpoints.finish(state._replace(params=jax.tree.unflatten(tree, every)), position)
    checkpoints.close()
    return f"params/{integrity.path_name(path)}"


@pytest.mark.fault("T18")
def test_a_step_that_once_went_wrong_is_found_and_its_array_named(whole, config, tmp_path, capsys):
    """Its digests are right: they were made of what is wrong."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    path = tampered(config, out, 8)
    assert train(config, out, *FLAGS, "--replay", "6") == 1
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"steps 5 to 8, and what was saved, differ: {path} on device ")
    assert told.endswith("first, of 1 arrays")


@pytest.mark.fault("T18")
def test_a_device_that_goes_wrong_now_is_found(whole, config, monkeypatch, capsys):
    plain, calls = trainer.Trainer.batch, []

    def batch(self, latents, text, nothing, number=None):
        calls.append(number)
        if len(calls) == 6:
            latents = latents.copy()
            latents[0, 0, 0, 0, 0] += 1e-3
        return plain(self, latents, text, nothing, number)

    monkeypatch.setattr(trainer.Trainer, "batch", batch)
    assert train(config, whole, *FLAGS, "--replay", "8") == 1
    assert calls == [4, 5, 6, 7] * 2
    assert "steps 5 to 8 made twice, differ: " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.fault("T18")
def test_what_cannot_be_replayed_is_refused(whole, config, tmp_path):
    with pytest.raises(Refusal, match="--out: .* holds no run"):
        train(config, tmp_path / "none", "--replay", "3")
    assert not (tmp_path / "none").exists()
    with pytest.raises(Refusal, match="--replay: 0 is no step"):
        train(config, whole, "--replay", "0")
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in (out / saving.CHECKPOINTS / "8").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(Refusal, match="the checkpoint of step 8 is damaged"):
        train(config, out, *FLAGS, "--replay", "8")
