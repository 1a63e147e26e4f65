"""A few seconds of fuzzing for every target, and what fuzzing has found before."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import mutant, refused
from fuzz_targets import TARGETS, Target

from fvdm_jax.program import Refusal

pytestmark = pytest.mark.thorough

HERE = Path(__file__).parent
SECONDS = 8
CRASHES = sorted((HERE / "golden/fuzz").glob("*/*"))


def fuzzed(folder: Path, target: str, seconds: float = SECONDS) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "fuzz.py"), target, f"--seconds={seconds}", f"--crashes={folder}"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
def test_every_mutant_is_refused_or_sound(target, tmp_path):
    done = fuzzed(tmp_path, target)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 uncaught" in done.stdout and not list(tmp_path.iterdir())
    tried, times = (int(done.stdout.split()[i]) for i in (1, 6))
    assert tried > 20 and times > tried // 10, done.stdout


@pytest.mark.parametrize("path", CRASHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_crashed_is_refused_or_sound(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = TARGETS[path.parent.name]
    target.seeds(tmp_path)
    refused(target, tmp_path / "case", path.read_bytes())


def _fails(path: Path, case: bytes) -> None:
    if b"x" in case:
        raise Refusal(path, "has an x")
    if len(case) != 4:
        raise IndexError("not four")


def test_a_crash_is_found_and_kept(tmp_path, monkeypatch, capsys):
    import fuzz

    monkeypatch.setitem(fuzz.TARGETS, "four", Target(lambda folder: [b"four"], _fails, (b"x",)))
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "four", "--seconds=60", f"--crashes={tmp_path}"])
    monkeypatch.setattr(fuzz.resource, "setrlimit", lambda *_: None)
    assert fuzz.main() == 1 and "not four" in capsys.readouterr().err
    (kept,) = tmp_path.glob("four-*/last")
    with pytest.raises(IndexError):
        _fails(kept, kept.read_bytes())


def test_mutants_are_many_and_the_same_at_every_run():
    made = [[mutant(b"a seed of some length", chance, (b"word",)) for _ in range(300)]
            for chance in (random.Random(1), random.Random(1))]  # fmt: skip
    assert made[0] == made[1] and len(set(made[0])) > 250 and any(b"word" in one for one in made[0])
