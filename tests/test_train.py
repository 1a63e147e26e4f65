"""The training program: however it is stopped it goes on to the bit, and on other meshes and processes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from small import train

from fvdm_jax import runs, saving, trainer
from fvdm_jax.program import Refusal
from fvdm_jax.train import main, parse, sizes

ROOT = Path(__file__).resolve().parents[1]
CONFIG = '''
import itertools
import os
import time

from fvdm_jax import levels
from fvdm_jax.config import Training
from fvdm_jax.models.dit import DiTConfig
from fvdm_jax.optimisers import Optimiser


def striking(batch, at, number, wait, times=1):
    """What makes batches; before that of a step it strikes its own process with a signal, after a wait."""
    steps = itertools.count()

    def made(*inputs):
        if next(steps) == at:
            time.sleep(wait)
            for _ in range(times):
                os.kill(os.getpid(), number)
        return batch(*inputs)

    return made


if "STRIKE" in os.environ:
    from fvdm_jax.trainer import Trainer

    Trainer.batch = striking(Trainer.batch, *map(int, os.environ["STRIKE"].split()))


def config(rate=1e-3, **others):
    return Training(**{
        "model": "nowhere", "dit": DiTConfig(32, 64, 2, 2, 4, 4, text_width=16, dtype="float32"),
        "clip": "3x8x4", "text": 5, "optimizer": Optimiser(rate=rate, warmup=4),
        "curriculum": levels.constant(levels.ptss), "average": 0.9, "steps": 20, "save_every": 10,
        "evaluate_every": 10, "held_out": 2, "mesh": "data=8",
    } | others)
'''
COMPARED = ("loss", "gradient", "rate", "error/0", "error/1", "error/2", "error/3", "held_out/ends")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return path


def elsewhere(config: Path, out: Path, *more: str, devices: int = 8, **environment: str) -> subprocess.Popen:
    """The same in a process of its own."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-m", "fvdm_jax.train", str(config), "--out", str(out), "--synthetic", *more]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def ended(config: Path, out: Path, step: int = 20, *more: str) -> tuple[dict, list[dict]]:
    """The last state of a run, on the host, and what it measured."""
    asked = parse([str(config), "--out", str(out), "--synthetic", *more])
    made = trainer.build(asked.settings, sizes(asked))
    checkpoints = saving.Checkpoints(out, asked.settings)
    assert checkpoints.newest() == step
    state, position = checkpoints.restore(made.state)
    assert position == (step, step * asked.settings.batch)
    checkpoints.close()
    state = state._replace(key=jax.random.key_data(state.key))
    lines = [{k: v for k, v in line.items() if k in ("step", *COMPARED)} for line in runs.metrics(out)]
    return jax.tree.map(np.asarray, state), lines


def far(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x.astype(np.float64) - y).max()) for x, y in pairs)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> tuple[dict, list[dict]]:
    """A run of twenty steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(config, out) == 0
    return ended(config, out)


def test_a_run_leaves_what_it_should(whole):
    state, lines = whole
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "held_out/ends" in line] == [0, 10, 20]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory) -> Path:
    """A run that was killed at its 14th step, when the checkpoint of the tenth was there."""
    out = tmp_path_factory.mktemp("killed") / "run"
    process = elsewhere(config, out, STRIKE="13 9 4")
    process.communicate(timeout=600)
    assert process.returncode == -9
    assert sorted(path.name for path in (out / "checkpoints").iterdir() if path.name.isdigit()) == ["10"]
    assert [line["step"] for line in runs.metrics(out)][-1] > 10
    return out


@pytest.mark.thorough
@pytest.mark.fault("T11")
def test_a_killed_run_goes_on_to_the_bit(whole, killed, config, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    assert train(config, out) == 0
    state, lines = ended(config, out)
    assert far(state, whole[0]) == 0
    assert lines == whole[1]


@pytest.mark.thorough
@pytest.mark.fault("T10")
def test_a_run_goes_on_over_another_mesh(whole, killed, config, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    assert train(config, out, "--mesh", "fsdp=2,context=2,tensor=2") == 0
    state, lines = ended(config, out)
    # Sums in another order, through ten steps of AdamW at a rate of 1e-3.
    assert 0 < far(state.params, whole[0].params) < 1e-5 and far(state.key, whole[0].key) == 0
    for ours, theirs in zip(lines, whole[1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", ["data=8", "context=4,tensor=2"])
def test_two_processes_are_as_one(whole, config, tmp_path, mesh):
    """Also where a clip lies across both, which then have the same rows to give."""
    address = small.address()
    out = tmp_path / "run"
    joined = "--coordinator", address, "--hosts", "2", "--mesh", mesh, "--host"
    processes = [elsewhere(config, out, *joined, str(i), devices=4) for i in range(2)]
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    state, lines = ended(config, out)
    assert far(state.params, whole[0].params) < 1e-5
    for ours, theirs in zip(lines, whole[1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.fault("T1")
@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(15, 143, marks=pytest.mark.thorough), pytest.param(2, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_ends(whole, config, tmp_path, number, code):
    out = tmp_path / "run"
    process = elsewhere(config, out, STRIKE=f"6 {number} 0")
    said = process.communicate(timeout=600)[1]
    assert process.returncode == code, said
    (saved,) = (int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert 7 <= saved < 10 and f"after step {saved}, which is saved" in said
    if number == 15:
        assert train(config, out) == 0
        state, lines = ended(config, out)
        assert far(state, whole[0]) == 0
        assert lines == whole[1]


@pytest.mark.fault("T1")
def test_a_second_signal_ends_it_at_once_and_leaves_no_half_checkpoint(config, tmp_path):
    out = tmp_path / "run"
    process = elsewhere(config, out, STRIKE="6 15 0 2")
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 143 and "is saved" not in said
    assert not list((out / "checkpoints").iterdir()) and not (out / "owner.json").exists()


@pytest.mark.thorough
def test_what_is_not_finite_stops_the_run(config, tmp_path):
    with pytest.raises(Refusal, match=r"step 2: loss nan, .*noise 0, noise 1") as refused:
        train(config, tmp_path / "run", "--rate", "1e37", "--steps", "9")
    assert "last checkpoint" in refused.value.right


@pytest.mark.thorough
def test_a_run_that_began_otherwise_is_not_gone_on_with(config, tmp_path):
    assert train(config, tmp_path / "run", "--steps", "1", "--evaluate-every", "0") == 0
    for flag, value in (("--seed", "1"), ("--batch", "16"), ("--average", "0.5"), ("--rank", "2")):
        with pytest.raises(Refusal, match=f"error: {flag}: is .*, and the run in .* began with"):
            train(config, tmp_path / "run", "--steps", "1", flag, value)
    assert train(config, tmp_path / "run", "--steps", "2", "--rate", "0.01", "--evaluate-every", "0") == 0


REFUSED = [
    (["--rte", "1"], r"--rte: is no flag; the nearest is --rate"),
    (["--rate", "-1"], r"rate is -1.0; give a positive number"),
    (["--weight", "bumb"], r"--weight: 'bumb' is unknown; give uniform, bump, min_snr"),
    (["--batch", "9", "--parts", "2"], r"--parts: 9 clips do not divide into 2 parts"),
    (["--clip", "3x8"], r"--clip: '3x8' is no size; give FxHxW"),
    (["--dtype", "int8"], r"--dtype: 'int8' is no type to compute in"),
    (["--dropout", "2"], r"--dropout: 2.0 is out of range; give a number from 0 to 1"),
    (["--mesh", "fsdp=3"], r"--mesh: 'fsdp=3' is for 3 devices, and there are 8"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_bad_flags_are_refused(config, tmp_path, more, said):
    with pytest.raises(Refusal) as refused:
        train(config, tmp_path / "run", *more)
    assert re.search(said, str(refused.value)), refused.value
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_refused(config, tmp_path):
    with pytest.raises(Refusal, match="CONFIG.py: is missing"):
        main(["--out", "run"])
    with pytest.raises(Refusal, match="nothing.py: is no file"):
        main(["nothing.py", "--out", "run"])
    with pytest.raises(Refusal, match="--out: is missing"):
        main([str(config)])
    with pytest.raises(Refusal, match="--data: is missing"):
        main([str(config), "--out", str(tmp_path / "run")])
    empty = tmp_path / "empty.py"
    empty.write_text("rate = 1\n")
    with pytest.raises(Refusal, match="empty.py: has no function config"):
        main([str(empty), "--out", "run"])


def test_a_plan_says_what_a_run_takes(config, capsys):
    assert main([str(config), "--plan", "--rank", "3", "--steps", "7"]) == 0
    said = capsys.readouterr().out
    assert "steps 7 (the config has 20)" in said
    assert "3 × 8 × 4 latents, 24 tokens" in said
    assert "text_to_video" in said and "autoregressive" in said
