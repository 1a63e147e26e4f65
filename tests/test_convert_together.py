"""Two converters on one output: one makes it, and the other says so in a line."""

import contextlib
import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_convert_program import ROOT, contents, convert, put, weights

from fvdm_jax import claims
from fvdm_jax.program import Refusal, folder_output

BUSY = "is being made by another process; wait for it, or give another name"


@pytest.fixture
def source(tmp_path) -> Path:
    return put(tmp_path / "in", weights("dit_t2v"))


def test_the_second_is_refused_and_the_first_goes_on(tmp_path, source):
    out = tmp_path / "out"
    with folder_output(out) as draft:
        (draft / "ours").write_text("x")
        with pytest.raises(Refusal, match=BUSY):
            convert(source, out)
        # Another name is free.
        convert(source, tmp_path / "other")
    assert [path.name for path in out.iterdir()] == ["ours"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "other", "out"]


def test_without_locks_the_first_to_end_has_the_name(tmp_path, source, monkeypatch):
    monkeypatch.setattr(claims, "fcntl", None)
    out = tmp_path / "out"
    with pytest.raises(Refusal, match="has been made by another process"), folder_output(out) as draft:
        (draft / "ours").write_text("x")
        convert(source, out)
    whole = contents(out)
    shutil.rmtree(out)
    convert(source, out)
    assert contents(out) == whole and sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_what_a_killed_one_left_is_no_claim(tmp_path):
    with claims.claimed(tmp_path / "out"):
        (lock,) = tmp_path.iterdir()
        with pytest.raises(BlockingIOError), claims.claimed(tmp_path / "out"):
            pass
        assert lock.exists()
    lock.touch()
    lock.with_name(f".fvdm-{claims.HOST}-0000ffff.lock").touch()
    with claims.claimed(tmp_path / "held"), folder_output(tmp_path / "out"):
        # Of any name, but for those that a process holds.
        assert len(list(tmp_path.glob("*.lock"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_sweep_takes_no_lock_that_was_made_anew_meanwhile(tmp_path, monkeypatch):
    """Between its look at a lock and its own hold on it, one process lets go and another takes the name."""
    with claims.claimed(tmp_path / "out"):
        (lock,) = tmp_path.iterdir()
    lock.touch()
    plain, claim = fcntl.flock, contextlib.ExitStack()

    def late(held: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", plain)
        lock.unlink()
        claim.enter_context(claims.claimed(tmp_path / "out"))
        plain(held, how)

    with claim:
        monkeypatch.setattr(fcntl, "flock", late)
        claims.sweep(tmp_path, [lock.name])
        assert lock.exists()


def test_a_lock_that_is_held_for_an_instant_is_waited_for(tmp_path, monkeypatch):
    plain, busy = fcntl.flock, iter([True, True])

    def flock(held: int, how: int) -> None:
        if next(busy, False):
            raise BlockingIOError
        plain(held, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with claims.claimed(tmp_path / "out"):
        assert len(list(tmp_path.iterdir())) == 1


def test_two_started_at_once_leave_one_whole_output(tmp_path, source):
    convert(source, tmp_path / "whole")
    command = [sys.executable, "-m", "convert", str(source), str(tmp_path / "out")]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes and set(codes) <= {0, 2}, said
    for code, (_, errors) in zip(codes, said, strict=True):
        if code:
            last = errors.splitlines()[-1]
            assert BUSY in last or last.endswith(": exists; give a name that is free"), errors
            assert errors.count("error: ") == 1, errors
    # Who came when it was done found it complete.
    assert sum("wrote" in out for out, _ in said) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]
