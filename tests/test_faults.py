"""Faults of training, one by one: what happens is told in a line, and nothing that was learned is lost."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from small import train

from fvdm_jax import budget, goodput, measures, runs, saving, train_run, trainer
from fvdm_jax.config import MUST_MATCH
from fvdm_jax.data import feed
from fvdm_jax.program import Refusal
from fvdm_jax.train import parse, sizes

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"steps": 24, "save_every": 12, "evaluate_every": 6, "held_out": 2, "mesh": "data=8"}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return small.training(tmp_path_factory.mktemp("config"), **SETTINGS)


def ended(config: Path, out: Path, *more: str):
    """The newest state of a run, and its position."""
    asked = parse([str(config), "--out", str(out), "--synthetic", *more])
    made = trainer.build(asked.settings, sizes(asked))
    checkpoints = saving.Checkpoints(out, asked.settings)
    state, position = checkpoints.restore(made.state)
    checkpoints.close()
    return saving.raw(state), position


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def incidents(out: Path) -> list[dict]:
    path = out / runs.INCIDENTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run in which nothing went wrong: its folder, and how long it took."""
    out = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    assert train(config, out) == 0
    return out, time.monotonic() - began


def kind() -> dict[str, str]:
    """What the last bit of a loss may depend on: versions, and what the processor can do."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = re.search(r"^flags\s*: (.*)$", told, re.MULTILINE)
    digest = hashlib.sha256(" ".join(sorted(flags[1].split())).encode()).hexdigest() if flags else ""
    return {name: version(name) for name in ("jax", "jaxlib", "numpy", "flax", "optax")} | {
        "cpu": digest[:16]
    }


def losses(config: Path, out: Path) -> list[float]:
    flags = "--steps", "100", "--save-every", "100", "--evaluate-every", "0"
    assert train(config, out, *flags) == 0
    return [line["loss"] for line in runs.metrics(out)]


@pytest.mark.thorough
def test_a_hundred_losses_are_those_of_the_golden_run(config, tmp_path):
    """To the bit on the same versions and processor (`golden/losses.json` says which), else within 1e-5."""
    golden = json.loads((ROOT / "tests/golden/losses.json").read_text())
    found = losses(config, tmp_path / "run")
    assert len(found) == 100 and found == pytest.approx(golden["losses"], rel=1e-5)
    if golden["made_on"] == kind():
        assert found == golden["losses"]


def changed(monkeypatch, at: int, change) -> None:
    """Batch `at` has latents that `change` has been done to."""
    plain = trainer.Trainer.batch

    def batch(self, latents, text, nothing, number=None):
        if number == at:
            latents = change(latents.copy())
        return plain(self, latents, text, nothing, number)

    monkeypatch.setattr(trainer.Trainer, "batch", batch)


def one_nan(latents):
    latents[3, 1, 0, 1, 2] = np.nan
    return latents


@pytest.mark.thorough
def test_the_ledger_adds_up_to_the_time_on_the_clock(whole):
    out, seconds = whole
    told = goodput.goodput(out)
    spent = sum(told[what] for what in told if what not in ("goodput", "lost"))
    # It begins with the program and ends with the last checkpoint; what remains is closing it.
    assert 0 <= seconds - spent < 0.05 * seconds
    assert {"start", "data", "compile", "step", "save", "evaluation"} <= told.keys()
    assert 0 < told["goodput"] < 1 and told["lost"] == 0 and not incidents(out)


@pytest.mark.thorough
@pytest.mark.fault("T6")
def test_a_nan_changes_nothing_and_the_state_before_is_set_aside(whole, config, tmp_path, monkeypatch, capfd):
    changed(monkeypatch, 13, one_nan)
    out = tmp_path / "run"
    with pytest.raises(
        measures.NotFinite, match=r"step 14: loss nan, .*first in .*, of clips noise 0, "
    ) as no:
        train(config, out)
    assert "--skip such steps; the last checkpoint is sound" in str(no.value)
    assert f"the state after step 13 is in {out / train_run.ASIDE}" in capfd.readouterr().err.replace(
        "\n", ""
    )
    aside, position = ended(config, out / train_run.ASIDE / "step_14")
    assert position.batch == 13 and aside["step"] == 13
    assert incidents(out)[0]["kind"] == "not finite" and len(incidents(out)[0]["clips"]) == 8
    # With the sample mended the run ends as if nothing had been.
    monkeypatch.undo()
    assert train(config, out) == 0
    assert same(ended(config, out)[0], ended(config, whole[0])[0])


@pytest.mark.thorough
@pytest.mark.fault("T6")
def test_steps_that_are_not_finite_may_be_left_out(config, tmp_path, monkeypatch, capfd):
    changed(monkeypatch, 5, one_nan)
    out = tmp_path / "run"
    assert train(config, out, "--steps", "8", "--skip", "1", "--evaluate-every", "0") == 0
    assert "step 6 is left out: loss nan" in capfd.readouterr().err.replace("\n", " ")
    state, position = ended(config, out, "--skip", "1")
    assert position.batch == 8 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))
    assert [line["step"] for line in runs.metrics(out)] == [1, 2, 3, 4, 5, 7, 8]


@pytest.mark.thorough
@pytest.mark.fault("T9")
def test_what_hangs_is_told_of_while_it_does(config, tmp_path, monkeypatch, capfd):
    """The wait for the seventh batch, and the tenth step that is read."""
    get, read = jax.device_get, []

    def slow(told):
        if isinstance(told, dict) and "finite" in told:
            read.append(told)
            time.sleep(3 * (len(read) == 10))
        return get(told)

    changed(monkeypatch, 6, lambda latents: time.sleep(3) or latents)
    monkeypatch.setattr(jax, "device_get", slow)
    monkeypatch.setattr(measures, "HUNG", 0.0)
    monkeypatch.setattr(measures, "LEAST", 1.0)
    assert train(config, tmp_path / "run", "--steps", "12", "--evaluate-every", "0") == 0
    said = re.sub(r"\s+", " ", capfd.readouterr().err)
    for what in ("the wait for data", "step 10"):
        assert re.search(f"{what} has taken 1 s so far, and most steps take [0-9.e-]+ s: something may", said)


@pytest.mark.thorough
@pytest.mark.fault("T7")
def test_a_spike_is_told_of_once(config, tmp_path, monkeypatch):
    changed(monkeypatch, 19, lambda latents: latents * 1e3)
    out = tmp_path / "run"
    assert train(config, out) == 0
    (told,) = incidents(out)
    assert told["kind"] == "spike" and told["step"] == 20 and told["clips"][0] == "noise 0"
    # Its gradient was clipped like others.
    clipped = {line["step"]: line.get("clipped") for line in runs.metrics(out) if "loss" in line}
    assert clipped[20] == 1.0 and set(clipped.values()) <= {0.0, 1.0}


@pytest.mark.fault("T8")
def test_more_bad_records_than_are_allowed_stop_a_run(config, tmp_path, monkeypatch, capfd):
    plain, flags = feed.invented, ("--steps", "2", "--evaluate-every", "0")
    bad = {"clip 3": "cannot be read", "clip 9": "holds nan"}
    monkeypatch.setattr(feed, "invented", lambda *sizes: plain(*sizes)._replace(bad=bad, count=40))
    with pytest.raises(Refusal, match="--max-bad: 2 records of 40 cannot be read, such as clip 3; mend them"):
        train(config, tmp_path / "run", *flags)
    assert train(config, tmp_path / "other", *flags, "--max-bad", "0.05") == 0
    said = re.sub(r"\s+", " ", capfd.readouterr().err)
    assert "clip 9 holds nan; another clip takes its place" in said
    assert "2 records could not be read; others took their places" in said


@pytest.mark.thorough
@pytest.mark.fault("T14", "T16", "T20")
def test_what_fails_beside_training_costs_nothing_but_itself(whole, config, tmp_path, monkeypatch, capfd):
    """Evaluation fails twice, the log cannot be written, the clock runs back: the same state to the bit."""
    plain, calls = train_run.Run._errors, []

    def errors(self, params):
        calls.append(0)
        if len(calls) in (2, 3):
            raise RuntimeError("no luck")
        return plain(self, params)

    monkeypatch.setattr(train_run.Run, "_errors", errors)
    out = tmp_path / "run"
    out.mkdir()
    (out / runs.METRICS).symlink_to("/dev/full")
    (out / goodput.LEDGER).symlink_to("/dev/full")
    monkeypatch.setattr(runs.Log, "__init__", unforgetful(runs.Log.__init__))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600 * len(calls))
    assert train(config, out) == 0
    said = re.sub(r"\s+", " ", capfd.readouterr().err)
    assert said.count("the log cannot be written") == 1 and said.count("RuntimeError: no luck") == 2
    assert [(told["kind"], told["clips"]) for told in incidents(out)] == [("evaluation failed", [])] * 2
    assert same(ended(config, out)[0], ended(config, whole[0])[0])


def unforgetful(init):
    """/dev/full holds no lines, and is not to be replaced by a file without any."""

    def begun(self, folder, step):
        link = (folder / runs.METRICS).readlink()
        (folder / runs.METRICS).unlink()
        init(self, folder, step)
        self._file.close()
        self._file = open(link, "a")

    return begun


@pytest.mark.thorough
@pytest.mark.fault("T20")
def test_an_evaluation_that_always_fails_ends_the_run(config, tmp_path, monkeypatch):
    def errors(self, params):
        raise RuntimeError("no luck")

    monkeypatch.setattr(train_run.Run, "_errors", errors)
    with pytest.raises(RuntimeError, match="no luck"):
        train(config, tmp_path / "run", "--evaluate-every", "8")
    assert ended(config, tmp_path / "run")[1].batch == 12


CHANGES = {
    "model": "elsewhere", "part": "dit_high", "fresh": True, "data": "x", "held_out": 3, "batch": 16,
    "seed": 1, "process": "ddpm", "rank": 2, "scale": 2.0, "where": "attn",
    "average": 0.5, "masters": "bfloat16",
}  # fmt: skip


@pytest.mark.fault("T12")
def test_what_must_match_is_refused_unless_it_is_allowed(config, tmp_path):
    assert {*CHANGES, "dit"} == set(MUST_MATCH)
    asked = parse([str(config), "--out", str(tmp_path), "--synthetic"])
    runs.write_settings(tmp_path, asked.settings, asked.options, config)
    for name, value in CHANGES.items():
        other = dataclasses.replace(asked.settings, **{name: value})
        with pytest.raises(Refusal, match=f"--{name.replace('_', '-')}: is .*--allow-change {name}"):
            runs.check(tmp_path, other, asked.options)
        assert runs.check(tmp_path, other, asked.options, (name,)) == []
    for name, value in {
        "steps": 30,
        "save_every": 5,
        "mesh": "fsdp=8",
        "workers": 2,
        "remat": "none",
    }.items():
        other = dataclasses.replace(asked.settings, **{name: value})
        told = runs.check(tmp_path, other, asked.options | {name: value})
        assert told == [f"{name} is {value} (the run began with {asked.options[name]})"]
    # What another text of the config changes is told of too.
    slower = dataclasses.replace(asked.settings.optimizer, rate=1e-4)
    told = runs.check(tmp_path, dataclasses.replace(asked.settings, optimizer=slower), asked.options)
    assert told == [f"optimizer.rate is 0.0001 (the run began with {asked.settings.optimizer.rate})"]


@pytest.mark.fault("T15")
@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("/proc/run", "--out: /proc/run cannot be written"),
        ("file/run", "--out: .*file/run cannot be written: Not a directory"),
        ("file", "--out: .*file is no folder"),
        ("gs://bucket/run", "--out: gs:/bucket/run is an address"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_compiled(
    config, tmp_path, monkeypatch, out, said
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=said):
        train(config, Path(out))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.fault("T17")
def test_a_device_without_memory_is_a_refusal_that_names_what_is_large(config, tmp_path, monkeypatch):
    def compiled(self, size, meter):
        def step(*inputs):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

        return step

    monkeypatch.setattr(train_run.Run, "compiled", compiled)
    with pytest.raises(
        Refusal, match=r"Out of memory .*largest: \S+ \d+ MiB, \S+ .*; give a smaller --batch"
    ):
        train(config, tmp_path / "run", "--evaluate-every", "0")


@pytest.mark.fault("T13")
def test_a_second_run_is_refused_in_a_line(config, tmp_path):
    from fvdm_jax.presence import Presence

    out = tmp_path / "run"
    Presence(out).take()
    command = [sys.executable, "-m", "fvdm_jax.train", str(config), "--out", str(out), "--synthetic"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"error: --out: .* is in use by process .*\n", done.stderr)
    assert "compiling" not in done.stdout


@pytest.mark.fault("T1")
def test_whether_a_preempted_host_has_time_to_save_is_told(config, tmp_path, monkeypatch):
    asked = parse([str(config), "--synthetic", "--out", str(tmp_path), "--mesh", "data=2,fsdp=4"])
    state = saving.raw(trainer.build(asked.settings, sizes(asked)).state)
    # What is cut or copied among this host's devices is written once.
    assert budget.held(state) == saving.size(state)
    told = budget.told(tmp_path, state, 12)
    found = re.fullmatch(
        r"a checkpoint is at most ([\d.]+) MiB of each host, every 12 steps: about ([\d.]+) s to write,"
        r" where a preempted pod has 15 to 30 s",
        told,
    )
    assert float(found[1]) == pytest.approx(saving.size(state) / 2**20, abs=0.05) and float(found[2]) < 15
    assert not list(tmp_path.iterdir())
    for seconds, sure in ((20, "may have too few"), (99, "has too few")):
        monkeypatch.setattr(budget, "_seconds_a_byte", lambda *_, each=seconds: each / budget.held(state))
        assert f"about {seconds}.0 s to write" in (told := budget.told(tmp_path, state, 12))
        assert told.endswith(f"it {sure}, and then goes on from the last checkpoint: save often")
    monkeypatch.undo()
    assert "cannot be told now" in budget.told(Path("/proc/none"), state, 12)
